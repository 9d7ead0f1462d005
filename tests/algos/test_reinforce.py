"""REINFORCE with its baselines, against the vectors of the baselines card and numbers worked by hand."""

from __future__ import annotations

import json

import pytest
import torch

from alignkit.algos.reinforce import Reinforce
from alignkit.decode import Decode
from alignkit.rewards.rule import Constant


def advantages(batch) -> list[float]:
    """One a response: it lies on each of its tokens."""
    return batch.advantages[:, 0].tolist()


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([1.0, 0.0, 0.0, 1.0], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ([1.0, 0.0, 0.0, 0.0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_rloo_vectors(make_batch, scores, wanted):
    batch = Reinforce(k=4).credit(make_batch([4], [1, 2, 3, 1], scores=scores))
    assert advantages(batch) == pytest.approx(wanted, abs=1e-6)


def test_rloo_looks_at_its_own_prompt_only(make_batch):
    """Two prompts: (1, 0) -> (1, -1), whatever the other's (5, 9) -> (-4, 4)."""
    batch = Reinforce(k=2).credit(make_batch([2, 2], scores=[1.0, 0.0, 5.0, 9.0]))
    assert advantages(batch) == [1.0, -1.0, -4.0, 4.0]


def test_other_baselines(make_batch):
    """scores (1, 0, 5, 10), mean 4: none leaves them, batch and a fresh queue subtract 4."""
    scores = [1.0, 0.0, 5.0, 10.0]
    for kind, wanted in [("none", scores), ("batch", [-3.0, -4.0, 1.0, 6.0]), ("fifo", [-3.0, -4.0, 1.0, 6.0])]:
        batch = Reinforce(k=2, baseline=kind).credit(make_batch([2, 2], scores=scores))
        assert advantages(batch) == wanted, kind


def test_fifo_remembers(make_batch):
    """Queue of 3: after (1, 2) the mean is 1.5; after (6, 7) it holds (2, 6, 7), mean 5."""
    algo = Reinforce(k=2, baseline="fifo", queue=3)
    assert advantages(algo.credit(make_batch([2], scores=[1.0, 2.0]))) == [-0.5, 0.5]
    assert advantages(algo.credit(make_batch([2], scores=[6.0, 7.0]))) == [1.0, 2.0]
    resumed = Reinforce(k=2, baseline="fifo", queue=3)
    resumed.load_state(json.loads(json.dumps(algo.state())))
    assert resumed.state() == algo.state()
    assert advantages(resumed.credit(make_batch([1], scores=[5.0]))) == [-1.0]  # of (6, 7, 5)


@pytest.mark.parametrize("kind", ["leave_one_out", "batch", "fifo"])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("k", [3, 4])
def test_no_signal_means_exactly_no_advantage(make_batch, kind, value, k):
    """A constant reward teaches nothing, and no rounding noise is left for Adam to blow up."""
    batch = make_batch([k, k])
    algo = Reinforce(k=k, baseline=kind)
    for _ in range(2):
        credited = algo.credit(batch.with_(scores=Constant(value=value)(batch)))
        assert (credited.advantages == 0).all()


def test_constant_reward_without_baseline_is_a_signal(make_batch):
    batch = make_batch([2], [1, 3])
    credited = Reinforce(k=2, baseline="none").credit(batch.with_(scores=Constant(value=0.5)(batch)))
    assert credited.advantages.tolist() == [[0.5, 0.0, 0.0], [0.5, 0.5, 0.5]]


def test_loss_by_hand(policy, rows):
    """-(1/B) sum_i (1/k) sum_j A_ij lp_ij over 2 prompts of 2 samples, in plain Python."""
    algo = Reinforce(k=2, max_new_tokens=4)
    batch = algo.sample(policy, rows(2), None, torch.Generator().manual_seed(0))
    assert batch.group.tolist() == [0, 0, 1, 1]
    batch = algo.credit(batch.with_(scores=torch.tensor([1.0, 0.0, 0.25, 0.75])))
    lp = policy.forward(batch).detach().sum(1).tolist()
    wanted = -(1.0 * lp[0] - 1.0 * lp[1] - 0.5 * lp[2] + 0.5 * lp[3]) / 2 / 2
    loss = algo.loss(policy, batch)
    assert loss.count == 2.0
    assert float(loss.total.detach()) / loss.count == pytest.approx(wanted, rel=1e-5)


def test_temperature_shapes_the_samples_not_the_log_probabilities(policy, rows):
    """Near temperature 0 all samples are the greedy response; its log-probabilities are the model's own."""
    algo = Reinforce(k=3, temperature=1e-4, max_new_tokens=4)
    batch = algo.sample(policy, rows(2), None, torch.Generator().manual_seed(0))
    greedy = policy.generate(rows(2), 3, Decode(max_new_tokens=4, greedy=True))
    assert torch.equal(batch.response_ids, greedy.response_ids)
    torch.testing.assert_close(batch.logprobs, greedy.logprobs)
    assert (batch.logprobs[batch.mask] < -1e-3).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 0, "baseline": "none"}, "k"),
        ({"k": 1}, "k"),  # the default baseline needs two
        ({"temperature": 0.0}, "temperature"),
        ({"queue": 0}, "queue"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        Reinforce(**settings)


def test_one_sample_is_allowed_with_a_global_baseline():
    assert Reinforce(k=1, baseline="fifo").k == 1
