"""REBEL against the method card (rebel_refuel.md, "Worked examples") and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_RL, train

from alignkit import losses
from alignkit.algos.rebel import REBEL


def objective(make_batch, apart: list[float], rewards: list[float], **settings):
    """Loss per pair of responses whose summed log pi / pi_t is ``apart``; 1 and 3 tokens, which must not matter."""
    algo = REBEL(**settings)
    batch = algo.credit(make_batch([2] * (len(apart) // 2), [1, 3] * (len(apart) // 2), scores=rewards))
    steps = torch.tensor(apart, dtype=torch.float64)[:, None] / batch.lengths[:, None] * batch.mask
    loss = algo.objective(batch.logprobs.double() + steps, batch)
    return float(loss.total) / loss.count


@pytest.mark.parametrize(
    ("apart", "rewards", "eta", "form", "wanted"),
    [
        ([0.30, -0.10], [1.5, 0.5], 1.0, "code", 0.36),  # E1
        ([0.30, -0.10], [1.5, 0.5], 2.0, "code", 2.56),  # E1
        ([0.30, -0.10], [1.5, 0.5], 2.0, "paper", 0.64),  # E1: 2.56 = 4 x .64
        ([0.0, 0.0], [1.0, 0.0], 2.0, "code", 4.0),  # E2
        ([2.0, 0.0], [3.0, 0.0], 1.0, "code", 1.0),  # E5
        ([2.0, 0.0], [3.0, 0.0], 1.0, "paper", 1.0),  # E5
        ([2.0, 0.0], [3.0, 0.0], 2.0, "paper", 4.0),  # E5
        ([2.0, 0.0], [3.0, 0.0], 2.0, "code", 16.0),  # E5
    ],
)
def test_card_vectors(make_batch, apart, rewards, eta, form, wanted):
    assert objective(make_batch, apart, rewards, eta=eta, form=form) == pytest.approx(wanted, abs=1e-5)


def test_mean_over_pairs_of_one_prompt(make_batch):
    """E1 and E5's first: (.36 + 1) / 2. Rewards are compared inside a prompt only."""
    assert objective(make_batch, [0.3, -0.1, 2.0, 0.0], [1.5, 0.5, 3.0, 0.0]) == pytest.approx(0.68, abs=1e-5)


def test_e2_gradient(make_batch):
    """E2, first step (D = 0), eta 2, dr 1: dL/dD = 2 (0 - 2) = -4; on each token of y -4, of y' +4, none on padding."""
    algo = REBEL(eta=2.0)
    batch = algo.credit(make_batch([2], [1, 2], scores=[1.0, 0.0]))
    logprobs = batch.logprobs.clone().requires_grad_()
    loss = algo.objective(logprobs, batch)
    loss.total.backward()
    assert (logprobs.grad / loss.count).tolist() == [[-4.0, 0.0], [4.0, 4.0]]


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize(
    ("start", "rewards", "wanted"),
    [
        ([0.5, 0.5], [1.0, 0.0], [0.731059, 0.268941]),
        ([0.5, 0.3, 0.2], [1.0, 0.0, -1.0], [0.784399, 0.173139, 0.042463]),
    ],
)
def test_e3_exact_minimiser(start, rewards, wanted, form):
    """E3: gradient descent on all pairs of a tabular policy ends at pi ~ pi_t exp(eta r)."""
    eta = 1.0
    old = torch.tensor(start, dtype=torch.float64).log()
    r = torch.tensor(rewards, dtype=torch.float64)
    pairs = torch.combinations(torch.arange(len(start))).flatten()  # rows 2i and 2i + 1
    theta = old.clone().requires_grad_()
    for _ in range(200):
        log_ratios = theta.log_softmax(0) - old
        loss = losses.rebel(log_ratios[pairs], r[pairs], eta, form == "paper")
        (grad,) = torch.autograd.grad(loss.total / loss.count, theta)
        theta = (theta - 0.3 * grad).detach().requires_grad_()
    assert theta.softmax(0).tolist() == pytest.approx(wanted, abs=1e-6)


def test_minimiser_goes_with_eta():
    """eta 2 on a reward of 1: odds e² (both forms have the same minimiser)."""
    log_ratios = torch.tensor([2.0, 0.0]) - torch.tensor([2.0, 0.0]).exp().mean().log()
    for scaled in (False, True):
        assert float(losses.rebel(log_ratios, torch.tensor([1.0, 0.0]), 2.0, scaled).total) == pytest.approx(
            0, abs=1e-9
        )


def test_equal_rewards_are_kept_with_target_zero(make_batch):
    """Card, ambiguities: equal rewards stay with target 0: (.4² + .36) / 2, and D = 0 costs exactly nothing."""
    assert objective(make_batch, [0.3, -0.1, 0.3, -0.1], [0.7, 0.7, 1.5, 0.5]) == pytest.approx((0.16 + 0.36) / 2)
    assert objective(make_batch, [0.2, 0.2], [0.7, 0.7]) == pytest.approx(0, abs=1e-12)


def test_identical_responses_are_left_out(make_batch):
    """Card, ambiguities: "Equal rewards: keep (target 0) unless texts are identical": two equal responses beside E1's pair
    leave the mean over one pair, .36."""
    algo = REBEL()
    batch = make_batch([2, 2], [3, 3, 1, 3], scores=[0.7, 0.7, 1.5, 0.5]).with_(responses=["a", "a", "b", "c"])
    batch.response_ids[1] = batch.response_ids[0]
    batch = algo.credit(batch)
    apart = torch.zeros_like(batch.logprobs)
    apart[-2:, 0] = torch.tensor([0.3, -0.1])
    loss = algo.objective(batch.logprobs + apart, batch)
    assert float(loss.total) / loss.count == pytest.approx(0.36, abs=1e-4)


def test_kl_is_in_the_reward(make_batch):
    """r = score - kl (logp - logp_ref), summed: 1 - .1 * (.5 + .1) = .94 against 0; D = 0, eta 1: .8836."""
    algo = REBEL(kl=0.1)
    batch = make_batch([2], [2, 2], scores=[1.0, 0.0])
    ref = batch.logprobs - torch.tensor([[0.5, 0.1], [0.0, 0.0]])
    batch = algo.credit(batch.with_(ref_logprobs=ref))
    loss = algo.objective(batch.logprobs, batch)
    assert float(loss.total) / loss.count == pytest.approx(0.94**2, abs=1e-5)


def test_best_and_worst_of_k(make_batch):
    """Of 5 samples the best and the worst make the pair; D = 0: (5 - -2)² = 49 and (3 - 1)² = 4."""
    algo = REBEL(k=5, pairs="best_worst")
    scores = [1.0, -2.0, 5.0, 0.0, 4.0, 1.0, 2.0, 3.0, 2.0, 1.0]
    batch = algo.credit(make_batch([5, 5], scores=scores))
    assert sorted(batch.scores.tolist()) == [-2.0, 1.0, 3.0, 5.0]
    assert batch.group.tolist() == [0, 0, 1, 1]
    loss = algo.objective(batch.logprobs, batch)
    assert float(loss.total) / loss.count == pytest.approx((49 + 4) / 2)


def test_best_and_worst_of_equal_rewards_are_two_responses(make_batch):
    """A group without a best still gives a pair of different rows with target 0."""
    algo = REBEL(k=3, pairs="best_worst")
    batch = algo.credit(make_batch([3], scores=[0.5] * 3))
    assert len(set(batch.responses)) == 2
    assert float(algo.objective(batch.logprobs, batch).total) == 0.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 1}, "k"),
        ({"k": 3}, "k"),  # pairs=two takes two
        ({"temperature": 0.0}, "temperature"),
        ({"eta": 0.0}, "eta"),
        ({"kl": 0.1, "kl_in": "loss"}, "kl_in"),
        ({"kl": {"start": 0.0, "end": 0.1}, "kl_in": "loss"}, "kl_in"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        REBEL(**settings)


def test_a_run(tmp_path):
    """Four passes over the samples of a step, as released."""
    words = ["+algo=rebel", "algo.epochs=4", "algo.kl=0.05", "algo.steps=2", "algo.k=2", "algo.pairs=two"]
    result, _ = train(tmp_path, *words, *[w for w in SMALL_RL if "steps" not in w], *SMALL_CAUSAL)
    assert result["status"] == "finished"
    assert result["samples"] == 2 * 4 * 2
