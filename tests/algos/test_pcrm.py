"""PCRM as a reward model against the method card (pcrm.md, P-3 and P-6; the rest is in test_dpo_pcrm.py)."""

from __future__ import annotations

from math import exp, log1p
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.algos.bt import BT
from alignkit.algos.pcrm import PCRM
from alignkit.batch import Batch
from alignkit.constraint import Constraint
from alignkit.heads import Scalar


def softplus(x: float) -> float:
    return log1p(exp(x))


def pair(chosen: list[int], rejected: list[int]) -> Batch:
    width = max(len(chosen), len(rejected))
    ids = torch.tensor([one + [0] * (width - len(one)) for one in (chosen, rejected)])
    mask = torch.arange(width) < torch.tensor([[len(chosen)], [len(rejected)]])
    one = torch.ones(2, 1, dtype=torch.long)
    return Batch(one, one.bool(), ids, mask, torch.zeros(2, dtype=torch.long), [{"id": 0}] * 2, ["c", "r"])


def cost(algo: PCRM, scores: list[list[float]], batch: Batch, ceiling: float | None = None) -> Any:
    """The loss where the tokens have these scores, and the response that of its last one."""
    tokens = torch.tensor(scores, dtype=torch.float64)
    last = tokens[[0, 1], batch.lengths - 1][:, None]
    model = SimpleNamespace(
        outputs=lambda b, tokens=False, t=tokens: (last, t[..., None] if tokens else None),
        head=Scalar(),
        margins=lambda z: (z[0::2] - z[1::2]).squeeze(-1),
    )
    batch = algo.whole(model, batch, torch.Generator())
    if ceiling is not None:
        batch.extra["ceiling"] = torch.full((2,), ceiling, dtype=torch.float64)
    return algo.loss(model, batch)


APART = pair([5, 6, 2], [7, 8, 2])  # from the first token on


@pytest.mark.parametrize(("d", "wanted"), [(0.0, 0.693147), (1.0, 0.313262)])
def test_p3_a_high_ceiling_is_bradley_terry(d: float, wanted: float) -> None:
    algo = PCRM()
    found = float(cost(algo, [[0, 0, d], [0, 0, 0]], APART, 24.920160).total)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert float(BT().pair_losses(torch.tensor([d]), [0.0])) == pytest.approx(wanted, abs=1e-6)


P6 = [[0.5, 1.0, 2.0], [0.2, 0.1, -0.5]]


@pytest.mark.parametrize(
    ("readout", "weight", "wanted"),
    [("token_mean", 1, 0.3595932), ("token_mean", 0, 0.3247996), ("last", 1, 0.1577795), ("last", 0, 0.0788897)],
)
def test_p6_readout(readout: Any, weight: float, wanted: float) -> None:
    """The tokens of the two responses differ from the first one to the last."""
    batch = pair([5, 6, 2], [7, 8, 9])
    found = cost(PCRM(readout=readout, constraint=Constraint(weight=weight)), P6, batch, 5.0)
    assert float(found.total) == pytest.approx(wanted, abs=1e-6)
    assert found.count == 1


def test_token_mean_begins_where_the_responses_part_and_the_shorter_one_holds_its_last_score() -> None:
    """Tokens 1 to 3 count; the rejected response ends at 2, and a token is its own ceiling's: d = .5, 2.5, 3.5 at 5."""
    batch = pair([5, 6, 7, 2], [5, 9, 2])
    found = cost(PCRM(readout="token_mean"), [[9, 1, 2, 3], [0, 0.5, -0.5, 99]], batch, 5.0)
    wanted = sum(softplus(-d) + softplus(d - 5) for d in (0.5, 2.5, 3.5)) / 3
    assert float(found.total) == pytest.approx(wanted, abs=1e-6)
    # a token after they have parted counts though it is the same one
    again = cost(PCRM(readout="token_mean"), [[9, 1, 2], [0, 0.5, -0.5]], pair([5, 6, 2], [5, 9, 2]), 5.0)
    assert float(again.total) == pytest.approx(sum(softplus(-d) + softplus(d - 5) for d in (0.5, 2.5)) / 2, abs=1e-6)


def test_equal_responses_have_no_tokens_to_mean() -> None:
    assert float(cost(PCRM(readout="token_mean"), P6, pair([5, 6, 2], [5, 6, 2]), 5.0).total) == 0


def test_the_ceiling_is_that_of_the_lengths_after_they_part() -> None:
    """2 and 4 tokens from the second one on: s = .5, so 14.960080 of (10, .001, -5); past its half are none."""
    found = cost(PCRM(), [[0, 0, 7, 0, 0], [0, 0, 0, 0, 0]], pair([5, 6, 2], [5, 9, 8, 7, 2]))
    assert found.metrics == pytest.approx(
        {"ceiling": 14.960080, "margin": 7.0, "past_target": 0.0, "preference_accuracy": 1.0}, abs=1e-5
    )
    assert cost(PCRM(), [[0, 0, 8, 0, 0], [0] * 5], pair([5, 6, 2], [5, 9, 8, 7, 2])).metrics["past_target"] == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_is_in_both_terms(smoothing: float) -> None:
    """-(1-e) log s(d) - e log s(-d) - (1-e) log s(t-d) - e log s(d-t) at d = .5, t = 4.980020: .9833485 with e = .1 (P-7)."""
    found = cost(PCRM(smoothing=smoothing), [[0, 0, 0.5], [0, 0, 0]], APART, 4.980020)
    assert float(found.total) == pytest.approx(0.9833485 if smoothing else 0.4853464, abs=1e-6)


def test_random_ceilings_are_drawn_anew_between_low_and_high() -> None:
    batch = pair([5, 2], [6, 2])
    many = Batch(*(torch.cat([getattr(batch, n)] * 400) for n in ("prompt_ids", "prompt_mask", "response_ids", "mask", "group")),
                 rows=batch.rows * 400, responses=batch.responses * 400)  # fmt: skip
    algo = PCRM(constraint=Constraint(kind="random", low=4.0, high=6.0))
    one, same, other = (algo.whole(None, many, torch.Generator().manual_seed(i)).extra["ceiling"] for i in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(one[0::2], one[1::2])
    assert (
        4 <= float(one.min()) < 4.1 and 5.9 < float(one.max()) <= 6 and float(one.mean()) == pytest.approx(5, abs=0.1)
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"beta1": 0.0}, "beta1"), ({"weight": -1.0}, "weight"), ({"low": 6.0}, "must not be above"), ({"beta3": -11.0}, "reversed")],
)  # fmt: skip
def test_bad_constraints_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Constraint(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", ["mean", "all", "pattern"])
def test_token_mean_needs_a_score_of_each_token(pooling: Any) -> None:
    with pytest.raises(ValueError, match="readout=token_mean needs pooling=last or eos"):
        PCRM(readout="token_mean", pooling=pooling)
