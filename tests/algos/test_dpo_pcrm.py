"""PCRM's ceiling, alone and with DPO, against the method card (pcrm.md, numeric checks P-1, P-2, P-4, P-5, P-7)."""

from __future__ import annotations

import pytest
import torch
from running import tokens

from alignkit import losses, ops
from alignkit.algos._pref import Pairs
from alignkit.algos.dpo import DPO
from alignkit.algos.dpo_pcrm import DPOPCRM
from alignkit.batch import Batch
from alignkit.constraint import Constraint


def pair(chosen: list[int], rejected: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded with 0, as the card writes them."""
    ids = torch.tensor([[chosen, rejected]])
    return ids, ids != 0


def prepared(algo: DPOPCRM, logprobs: torch.Tensor, ref: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Pairs:
    """The pairs with their ceilings, as a step has them."""
    flat = ids.flatten(0, 1)
    rows = [{"id": i // 2} for i in range(len(flat))]
    one = torch.ones(len(flat), 1, dtype=torch.long)
    group = torch.arange(len(flat)) // 2
    batch = Batch(one, one.bool(), flat, mask.flatten(0, 1), group, rows, ["y"] * len(flat))
    ceiling = algo.whole(None, batch, torch.Generator()).extra["ceiling"]
    return Pairs(logprobs, ref, ids, mask, extra={"ceiling": ceiling.view(-1, 2)})


def dpo_pcrm(**constraint: object) -> DPOPCRM:
    return DPOPCRM(constraint=Constraint(**{"beta1": 20.0, "beta3": -15.0, **constraint}))


P7 = (torch.tensor([[-40.0, -50.0]], dtype=torch.float64), torch.tensor([[-43.0, -48.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("betas", "wanted"),
    [
        ((20, 0.001, -15), [4.980020, 7.197558, 9.968789, 24.920160]),
        ((10, 0.001, -5), [4.990010, 6.098779, 7.484395, 14.960080]),
        ((30, 0.001, -25), [4.970030, 8.296337, 12.453184, 34.880240]),
    ],
)
def test_p1_ceilings(betas: tuple[float, float, float], wanted: list[float]) -> None:
    similarity = torch.tensor([1, 0.9, 0.8, 0.5], dtype=torch.float64)
    assert ops.ceiling(similarity, *betas).tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("d", "loss", "gradient"),
    [(0, 0.699863, -0.493307), (1, 0.331412, -0.250955), (2.5, 0.157779, 0), (4, 0.331412, 0.250955),
     (6, 1.315737, 0.728586), (10, 5.006761, 0.993262)],
)  # fmt: skip
def test_p2_loss_and_gradient_at_a_ceiling_of_5(d: float, loss: float, gradient: float) -> None:
    """Through the method: log pi/ref of the chosen one is d / beta."""
    logprobs = torch.tensor([[d / 0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    ids, mask = tokens([3, 3])
    algo = dpo_pcrm(kind="fixed", fixed=5.0)
    found = algo.pair_losses(prepared(algo, logprobs, torch.zeros(1, 2), ids, mask))
    found.sum().backward()
    assert found.tolist() == pytest.approx([loss], abs=1e-6)
    assert float(logprobs.grad[0, 0]) / 0.1 == pytest.approx(gradient, abs=1e-6)


def test_p4_length_ratio() -> None:
    ids, mask = pair([5, 6, 7, 11, 12, 13, 14, 15, 2, 0], [5, 6, 7, 21, 22, 2, 0, 0, 0, 0])
    assert ops.length_ratio(ids, mask).tolist() == [0.5]
    assert ops.length_ratio(ids.flip(1), mask.flip(1)).tolist() == [0.5]
    pairs = prepared(dpo_pcrm(beta1=10.0, beta3=-5.0), torch.zeros(1, 2), torch.zeros(1, 2), ids, mask)
    assert pairs.extra["ceiling"][0].tolist() == pytest.approx([14.960080] * 2, abs=1e-5)


def test_length_ratio_of_equal_responses_is_1_and_of_a_prefix_0() -> None:
    """Equal ones are the most alike (the released code takes them for the least); a pad that is also a token is none."""
    ids = torch.tensor([[[5, 6, 2], [5, 6, 2]], [[5, 6, 2], [5, 6, 0]], [[5, 0, 2], [5, 0, 0]]])
    mask = torch.tensor([[[1, 1, 1], [1, 1, 1]], [[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [1, 0, 0]]]).bool()
    assert ops.length_ratio(ids, mask).tolist() == [1.0, 0.0, 0.0]


def test_p5_angular() -> None:
    cosine = torch.tensor([1, 0.9, 0.5, 0, -0.3], dtype=torch.float64)
    assert ops.angular(cosine).tolist() == pytest.approx([1, 0.856434, 0.666667, 0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize(
    ("lengths", "smoothing", "wanted"), [([4, 4], 0.0, 0.4853464), ([4, 2], 0.0, 0.4740770), ([4, 4], 0.1, 0.9833485)]
)
def test_p7_dpo(lengths: list[int], smoothing: float, wanted: float) -> None:
    """Policy over reference +3 and -2, beta .1: d = .5; s = 1 and .5, delta* of (20, .001, -15)."""
    algo = dpo_pcrm()
    algo.smoothing = smoothing
    pairs = prepared(algo, *P7, *tokens(lengths))
    assert algo.pair_losses(pairs).tolist() == pytest.approx([wanted], abs=1e-6)


def test_p7_gradient() -> None:
    logprobs = P7[0].clone().requires_grad_()
    algo = dpo_pcrm()
    algo.pair_losses(prepared(algo, logprobs, P7[1], *tokens([4, 4]))).sum().backward()
    assert float(logprobs.grad[0, 0]) / 0.1 == pytest.approx(-0.3663345, abs=1e-6)


def test_without_weight_it_is_dpo() -> None:
    algo = dpo_pcrm(weight=0.0)
    pairs = prepared(algo, *P7, *tokens([4, 4]))
    torch.testing.assert_close(algo.pair_losses(pairs), DPO().pair_losses(pairs))


def test_the_least_loss_is_at_half_the_ceiling() -> None:
    """2 softplus(-delta* / 2), here of 4.5: .200413; what lies past it is counted."""
    d = torch.linspace(0, 4.5, 10, dtype=torch.float64)
    loss = losses.logistic(d) + losses.logistic(4.5 - d)
    even = torch.tensor(2.25, dtype=torch.float64)
    assert float(losses.logistic(even) * 2) == pytest.approx(0.200413, abs=1e-6)
    assert float(loss.min()) > 0.200413
    algo = dpo_pcrm(kind="fixed")
    logprobs = torch.tensor([[22.4, 0.0], [22.6, 0.0]])
    found = algo.metrics(prepared(algo, logprobs, torch.zeros(2, 2), *tokens([3, 3], [3, 3])))
    assert found == {"ceiling": 4.5, "past_target": 0.5}


def test_a_ceiling_that_would_reverse_preferences_is_refused() -> None:
    with pytest.raises(ValueError, match="reversed"):
        Constraint(beta1=10, beta3=-15)
