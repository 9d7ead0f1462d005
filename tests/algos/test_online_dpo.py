"""Online DPO against the method card (baselines.md, "Online DPO" and "Offline preference losses")."""

from __future__ import annotations

import math

import pytest
import torch
from running import SMALL_RL, SMALL_SEQ2SEQ, train

from alignkit.algos.online_dpo import OnlineDPO


def mean(loss) -> float:
    return float(loss.total.detach()) / loss.count


def scored(make_batch, lp: list[float], ref: list[float], scores: list[float], lengths: list[int], **settings):
    """Loss of pairs with summed log-probabilities ``lp`` and ``ref``, spread evenly over ``lengths`` tokens."""
    algo = OnlineDPO(**settings)
    n = torch.tensor(lengths)[:, None]
    batch = make_batch([2] * (len(lp) // 2), lengths, scores=scores)
    batch = batch.with_(ref_logprobs=torch.tensor(ref)[:, None] / n * batch.mask)
    batch.extra["lp"] = torch.tensor(lp)  # travels with its row
    batch = algo.credit(batch)
    logprobs = batch.extra["lp"][:, None] / batch.lengths[:, None] * batch.mask
    return algo.objective(logprobs, batch)


@pytest.mark.parametrize(("kind", "wanted"), [("dpo", 0.598139), ("ipo", 9.0)])
@pytest.mark.parametrize("turned", [False, True])
def test_card_vectors(make_batch, kind, wanted, turned):
    """lp+ -10, lp- -14, ref -11, -13, lengths 5, 7, beta = tau = .1: delta 2; IPO on sums, the paper's form. Which of the
    two was sampled first does not matter."""
    lp, ref, scores, lengths = [-10.0, -14.0], [-11.0, -13.0], [1.0, 0.0], [5, 7]
    if turned:
        lp, ref, scores, lengths = lp[::-1], ref[::-1], scores[::-1], lengths[::-1]
    loss = scored(make_batch, lp, ref, scores, lengths, preference=kind)
    assert mean(loss) == pytest.approx(wanted, abs=1e-5)
    assert loss.count == 1


def test_antisymmetric(make_batch):
    """Chosen and rejected changed over: the margin's sign turns, -log sigmoid(-.2) = .598139 + .2."""
    loss = scored(make_batch, [-10.0, -14.0], [-11.0, -13.0], [0.0, 1.0], [5, 7])
    assert mean(loss) == pytest.approx(0.598139 + 0.2, abs=1e-5)


@pytest.mark.parametrize(("kind", "wanted"), [("dpo", math.log(2)), ("ipo", 25.0)])
def test_at_the_start_model(make_batch, kind, wanted):
    """pi = pi_ref: ln 2 (building_blocks_policy.md, invariants); IPO (1 / (2 * .1))² = 25."""
    loss = scored(make_batch, [-3.0, -9.0], [-3.0, -9.0], [1.0, 0.0], [2, 3], preference=kind)
    assert mean(loss) == pytest.approx(wanted, abs=1e-5)


def test_ties_are_dropped(make_batch):
    """Card: ties → drop. The card's pair beside a tied one: the mean is over the one that differs."""
    lp, ref = [-10.0, -14.0, -1.0, -7.0], [-11.0, -13.0, -2.0, -2.0]
    loss = scored(make_batch, lp, ref, [1.0, 0.0, 0.3, 0.3], [5, 7, 2, 2])
    assert loss.count == 1
    assert mean(loss) == pytest.approx(0.598139, abs=1e-5)


def test_a_batch_of_ties_has_no_gradient(make_batch):
    algo = OnlineDPO()
    batch = make_batch([2, 2], scores=[0.1, 0.1, 0.7, 0.7])
    batch = algo.credit(batch.with_(ref_logprobs=batch.logprobs))
    logprobs = batch.logprobs.clone().requires_grad_()
    loss = algo.objective(logprobs, batch)
    loss.total.backward()
    assert float(loss.total.detach()) == 0
    assert loss.count == 0
    assert (logprobs.grad == 0).all()


def test_best_and_worst_of_k(make_batch):
    """The pair of each prompt is its best and worst response, the first among equals; groups stay apart."""
    batch = make_batch([4, 4], scores=[0.0, 3.0, -1.0, 3.0, 2.0, 2.0, 1.0, 2.0])
    batch = OnlineDPO(k=4).credit(batch.with_(ref_logprobs=batch.logprobs))
    assert batch.responses == ["r1", "r2", "r4", "r6"]
    assert batch.group.tolist() == [0, 0, 1, 1]


def test_missing_eos_penalty_decides(make_batch):
    """The better response was cut off: its reward 1 - 2 = -1 is below the other's 0."""
    batch = make_batch([2], scores=[1.0, 0.0])
    batch.extra["ended"] = torch.tensor([False, True])
    batch = OnlineDPO(missing_eos_penalty=2.0).credit(batch.with_(ref_logprobs=batch.logprobs))
    assert batch.responses == ["r1", "r0"]


def test_gradient(make_batch):
    """At pi = pi_ref: -beta / 2 on each token of the chosen, + beta / 2 of the rejected; none on padding."""
    algo = OnlineDPO(beta=0.5)
    batch = make_batch([2], [1, 2], scores=[1.0, 0.0])
    batch = algo.credit(batch.with_(ref_logprobs=batch.logprobs))
    logprobs = batch.logprobs.clone().requires_grad_()
    algo.objective(logprobs, batch).total.backward()
    assert logprobs.grad.tolist() == [[-0.25, 0.0], [0.25, 0.25]]


def test_the_start_model_is_needed():
    assert OnlineDPO().wants_reference


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 1}, "k"),
        ({"temperature": 0.0}, "temperature"),
        ({"beta": 0.0}, "beta"),
        ({"kl": 0.1}, "kl"),
        ({"mle_weight": 0.5}, "mle_weight"),
        ({"kl": {"start": 0.0, "end": 0.1}}, "kl"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        OnlineDPO(**settings)


def test_a_run(tmp_path):
    words = ["+algo=online_dpo", "algo.k=3", "algo.steps=2"]
    result, _ = train(tmp_path, *words, *[w for w in SMALL_RL if "steps" not in w], *SMALL_SEQ2SEQ)
    assert result["status"] == "finished"
