"""RLOO against the method card (baselines.md, "RLOO") and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_RL, train

from alignkit.algos.rloo import RLOO


def advantages(batch) -> list[float]:
    return batch.advantages[:, 0].tolist()


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([1.0, 0.0, 0.0, 1.0], [0.666667, -0.666667, -0.666667, 0.666667]),
        ([1.0, 0.0, 0.0, 0.0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_card_vectors(make_batch, scores, wanted):
    """A_i = R_i - mean of the others, which is 4/3 (R_i - mean R)."""
    batch = RLOO(k=4).credit(make_batch([4], [1, 2, 3, 1], scores=scores))
    assert advantages(batch) == pytest.approx(wanted, abs=1e-5)
    spread = [4 / 3 * (r - sum(scores) / 4) for r in scores]
    assert advantages(batch) == pytest.approx(spread, abs=1e-6)
    assert (batch.advantages[~batch.mask] == 0).all()


def test_each_prompt_has_its_own_baseline(make_batch):
    """(1, 0) and (5, 9): each response's baseline is its sibling."""
    assert advantages(RLOO(k=2).credit(make_batch([2, 2], scores=[1.0, 0.0, 5.0, 9.0]))) == [1.0, -1.0, -4.0, 4.0]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("value", [0.1, 0.7, -3.3])
def test_equal_rewards_give_exactly_nothing(make_batch, value, whiten):
    batch = RLOO(k=3, whiten=whiten).credit(make_batch([3, 3], scores=[value] * 6))
    assert (batch.advantages == 0).all()


def test_kl_goes_into_the_reward(make_batch):
    """Card: k1 summed over tokens inside R. log-ratios (.5, -.2, .1) sum to .4; at .1 the reward 1 becomes .96; its
    sibling (KL 0, reward 0) is the baseline: ± .96."""
    batch = make_batch([2], [3, 3], scores=[1.0, 0.0])
    apart = torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.0, 0.0]])
    batch = RLOO(k=2, kl=0.1).credit(batch.with_(ref_logprobs=batch.logprobs - apart))
    assert advantages(batch) == pytest.approx([0.96, -0.96], abs=1e-5)


def test_kl_of_padding_is_not_charged(make_batch):
    batch = make_batch([2], [1, 3], scores=[1.0, 0.0])
    batch = RLOO(k=2, kl=0.1).credit(batch.with_(ref_logprobs=batch.logprobs - 1.0))
    assert advantages(batch) == pytest.approx([0.9 + 0.3, -0.3 - 0.9], abs=1e-5)


def test_reward_clip_comes_before_the_kl(make_batch):
    """Rewards 3 and -9 cut to ± 2, less .1 * 3 and .1 * 0: 1.7 and -2."""
    batch = make_batch([2], scores=[3.0, -9.0])
    ref = batch.logprobs - torch.tensor([[1.0], [0.0]])
    batch = RLOO(k=2, kl=0.1, reward_clip=2.0).credit(batch.with_(ref_logprobs=ref))
    assert advantages(batch) == pytest.approx([3.7, -3.7], abs=1e-5)


def test_whitening(make_batch):
    """(1, 0, 5, 9) → advantages (1, -1, -4, 4): mean 0, sample variance 34 / 3."""
    batch = RLOO(k=2, whiten=True).credit(make_batch([2, 2], [1, 2, 3, 3], scores=[1.0, 0.0, 5.0, 9.0]))
    std = (34 / 3) ** 0.5
    assert advantages(batch) == pytest.approx([1 / std, -1 / std, -4 / std, 4 / std], abs=1e-5)


def test_paper_loss(make_batch):
    """-A lp(y), mean over responses: advantages (1, -1, -4, 4), lp (-1, -2, -3, -6) → (1 - 2 - 12 + 24) / 4."""
    algo = RLOO(k=2)
    batch = algo.credit(make_batch([2, 2], [1, 2, 1, 3], scores=[1.0, 0.0, 5.0, 9.0]))
    logprobs = torch.tensor([[-1.0, -50, -50], [-1.5, -0.5, -50], [-3.0, -50, -50], [-1.0, -2.0, -3.0]])
    loss = algo.objective(logprobs, batch)
    assert float(loss.total) / loss.count == pytest.approx((1 - 2 - 12 + 24) / 4, abs=1e-5)


@pytest.mark.parametrize(("ratio", "sign", "wanted"), [(1.3, 1, -1.2), (1.3, -1, 1.3), (0.7, 1, -0.7), (0.7, -1, 0.8)])
def test_sequence_ratio_clips_as_a_whole(make_batch, ratio, sign, wanted):
    """The clip vectors of the card's PPO section, rho being the product over the tokens: each token's own lies inside
    1 ± .2, and the response counts once, whatever its length."""
    algo = RLOO(k=2, ratio="sequence")
    batch = make_batch([2], [3, 2], scores=[0.0, 0.0])
    batch = batch.with_(advantages=torch.tensor([[float(sign)], [0.0]]) * batch.mask)
    step = torch.tensor(ratio, dtype=torch.float64).log() / 3
    loss = algo.objective(batch.logprobs.double() + step * batch.mask, batch)
    assert float(loss.total) / loss.count == pytest.approx(wanted / 2, abs=1e-5)


def test_sequence_ratio_on_policy(make_batch):
    """At pi = pi_old: value -mean A = 0, gradient -A / B on every token, as of -A lp(y)."""
    algo = RLOO(k=2, ratio="sequence")
    batch = algo.credit(make_batch([2], [1, 3], scores=[1.0, 0.0]))
    logprobs = batch.logprobs.clone().requires_grad_()
    loss = algo.objective(logprobs, batch)
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(0.0, abs=1e-6)
    assert (logprobs.grad / loss.count).tolist() == [[-0.5, 0.0, 0.0], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize("extra", [{"mle_weight": 0.5}, {"kl": 0.5, "kl_in": "loss", "kl_estimator": "k3"}])
def test_what_is_added_to_the_loss_does_not_depend_on_the_ratio(policy, rows, extra):
    """At pi = pi_old the policy gradient is the same for both ratios; so must be what settings add to it."""
    batch = policy.generate(rows(2), 3, RLOO(max_new_tokens=4).decoding, generator=torch.Generator().manual_seed(0))
    batch = batch.with_(scores=torch.tensor([1.0, 0.0, 0.0, 0.3, 0.2, 0.9]), ref_logprobs=batch.logprobs - 0.5)
    added = []
    for ratio in ("none", "sequence"):
        algo, plain = RLOO(k=3, ratio=ratio, **extra), RLOO(k=3, ratio=ratio)
        credited = plain.credit(batch)
        whole, part = algo.loss(policy, credited), plain.loss(policy, credited)
        assert whole.count == part.count
        added.append(float((whole.total - part.total).detach()) / whole.count)
    assert added[0] > 0.01
    assert added[1] == pytest.approx(added[0], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 1}, "k"),
        ({"temperature": 0.0}, "temperature"),
        ({"clip": 0.0}, "clip"),
        ({"epochs": 2}, "ratio"),
        ({"minibatches": 2}, "ratio"),
        ({"kl": -1.0}, "kl"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        RLOO(**settings)


def test_several_epochs_with_the_ratio():
    assert RLOO(epochs=2, minibatches=2, ratio="sequence").epochs == 2


def test_a_run(tmp_path):
    """Two epochs on the clipped ratio, KL in the reward."""
    words = ["+algo=rloo", "algo.ratio=sequence", "algo.epochs=2", "algo.kl=0.05", "algo.steps=3"]
    result, _ = train(tmp_path, *words, *[w for w in SMALL_RL if "steps" not in w], *SMALL_CAUSAL)
    assert result["status"] == "finished"
    assert result["tokens"]["trained"] == 2 * result["tokens"]["sampled"]
