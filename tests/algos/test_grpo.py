"""GRPO against the method card (baselines.md, "GRPO, Dr. GRPO, DAPO") and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_RL, SMALL_SEQ2SEQ, train

from alignkit.algos.grpo import GRPO


def advantages(batch) -> list[float]:
    return batch.advantages[:, 0].tolist()


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([1.0, 0.0, 0.0, 1.0], [0.865875, -0.865875, -0.865875, 0.865875]),
        ([1.0, 0.0, 0.0, 0.0], [1.4997, -0.4999, -0.4999, -0.4999]),
    ],
)
def test_card_vectors(make_batch, scores, wanted):
    """(R - mean) / (std + 1e-4), the deviation with ddof 1: with ddof 0 the first would be ± .9998."""
    batch = GRPO(k=4).credit(make_batch([4], [1, 2, 3, 1], scores=scores))
    assert advantages(batch) == pytest.approx(wanted, abs=1e-4)
    assert advantages(batch) != pytest.approx([0.9998, -0.9998, -0.9998, 0.9998], abs=1e-2)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 123.456])
@pytest.mark.parametrize("k", [3, 7])
def test_all_equal_group_is_exactly_zero(make_batch, value, k):
    """Card: exactly 0, no NaN; the other group is not touched by it."""
    batch = GRPO(k=k).credit(make_batch([k, k], scores=[value] * k + [1.0] + [0.0] * (k - 1)))
    assert (batch.advantages[:k] == 0).all()
    assert (batch.advantages[k:] != 0).all()


def test_mean_over_tokens_then_over_responses(make_batch):
    """Card, aggregation: token losses [1, 1] and [-1, -1, -1, -1] → 0 (advantages -1 and 1 at ratio 1)."""
    algo = GRPO(k=2)
    batch = make_batch([2], [2, 4])
    batch = batch.with_(advantages=torch.tensor([[-1.0], [1.0]]) * batch.mask)
    loss = algo.objective(batch.logprobs, batch)
    assert float(loss.total) / loss.count == pytest.approx(0.0, abs=1e-6)
    loss = algo.objective(batch.logprobs, batch.with_(advantages=batch.advantages * torch.tensor([[1.0], [3.0]])))
    assert float(loss.total) / loss.count == pytest.approx((1 - 3) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted"), [(1.3, 1, -1.2), (1.3, -1, 1.3), (0.7, 1, -0.7), (0.7, -1, 0.8)]
)
def test_clip_vectors(make_batch, ratio, advantage, wanted):
    """The card's PPO vectors, each token by itself: the second of two tokens stays at ratio 1, loss -A."""
    batch = make_batch([1], [2])
    batch = batch.with_(advantages=torch.full((1, 2), float(advantage)))
    logprobs = batch.logprobs.double()
    logprobs[0, 0] += torch.tensor(ratio, dtype=torch.float64).log()
    loss = GRPO().objective(logprobs, batch)
    assert float(loss.total) / loss.count == pytest.approx((wanted - advantage) / 2, abs=1e-5)


@pytest.mark.parametrize(("apart", "k3"), [(0.5, 0.106531), (-0.5, 0.148721)])
def test_kl_is_k3_in_the_loss(policy, rows, apart, k3):
    """Card: log pi - log ref = ± .5 at each token gives .106531 / .148721; at pi = pi_old the rest is -mean A = 0."""
    algo = GRPO(k=2, kl=0.04, max_new_tokens=4)
    batch = algo.sample(policy, rows(2), None, torch.Generator().manual_seed(0))
    batch = algo.credit(batch.with_(scores=torch.tensor([1.0, 0, 0, 1]), ref_logprobs=batch.logprobs - apart))
    loss = algo.loss(policy, batch)
    assert float(loss.total.detach()) / loss.count == pytest.approx(0.04 * k3, abs=1e-5)


def test_kl_stands_in_one_place_only(policy, rows):
    """In the loss it does not touch the advantages; in the reward it does not touch the loss. Never both."""
    batch = policy.generate(rows(1), 2, GRPO(max_new_tokens=4).decoding, generator=torch.Generator().manual_seed(0))
    ref = batch.logprobs - torch.tensor([[2.0], [0.0]]) * batch.mask
    batch = batch.with_(scores=torch.tensor([1.0, 0.0]), ref_logprobs=ref)
    without = GRPO(k=2, kl=0.0)
    plain = without.credit(batch)
    in_loss = GRPO(k=2, kl=1.0).credit(batch)
    assert torch.equal(in_loss.advantages, plain.advantages)
    algo = GRPO(k=2, kl=1.0, kl_in="reward", kl_estimator="k1")
    in_reward = algo.credit(batch)  # 1 - 2 n against 0: the order is turned round
    assert advantages(in_reward)[0] < 0 < advantages(plain)[0]
    assert torch.equal(algo.loss(policy, in_reward).total, without.loss(policy, in_reward).total)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"k": 1}, "k"), ({"temperature": 0.0}, "temperature"), ({"clip": 0.0}, "clip"), ({"eps": 0.0}, "eps")],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        GRPO(**settings)


def test_defaults_of_the_paper():
    """Card's table: mean of each sequence, then mean; k3 in the loss, .04; symmetric clip of .2."""
    algo = GRPO()
    assert (algo.normalize, algo.kl, algo.kl_in, algo.kl_estimator, algo.clip) == ("responses", 0.04, "loss", "k3", 0.2)


@pytest.mark.parametrize("model", [SMALL_CAUSAL, SMALL_SEQ2SEQ], ids=["causal", "seq2seq"])
def test_a_run(tmp_path, model):
    words = ["+algo=grpo", "algo.k=3", "algo.epochs=2", "algo.minibatches=2", "algo.steps=3"]
    result, _ = train(tmp_path, *words, *[w for w in SMALL_RL if "steps" not in w], *model)
    assert result["status"] == "finished"
    assert result["samples"] == 3 * 4 * 3
