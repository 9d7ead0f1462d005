"""The released RLHF variant of ESRL against its card: F5, F6, F8, E-2 and E-3."""

from __future__ import annotations

import json

import pytest
import torch

from alignkit import ops
from alignkit.algos.esrl_released import ESRLReleased
from alignkit.algos.ppo import PPO

Q = [[0.9, 0.8, 0.95], [0.4, 0.5, 0.3], [0.99, 0.99, 0.97], [0.2, 0.15, 0.25]]
C_REL = [3.1501666, 1.6086827, 3.6291501, 1.2465207]


class Fake:
    """A policy that has generated ``batch``."""

    device = torch.device("cpu")

    def __init__(self, batch) -> None:
        self.batch = batch

    def generate(self, rows, n, how, *, temperature=None, generator=None):
        assert how.top, "the probability of the likeliest token is asked for"
        return self.batch


def kept(batch, top, **settings):
    batch.extra["top"] = torch.tensor(top)
    return ESRLReleased(**settings).sample(Fake(batch), [{}] * len(batch), None, torch.Generator())


def ids(batch) -> list[int]:
    return [row["id"] for row in batch.rows]


# ---- capability and dropping -----------------------------------------------------------------------------------------


def test_e3_capability():
    found = ops.released_capability(torch.tensor(Q), torch.ones(4, 3, dtype=torch.bool))
    assert found.tolist() == pytest.approx(C_REL, abs=1e-6)


def test_capability_ends_with_the_response():
    """What follows the end-of-sequence token is garbage: .9 and .8 alone, (e^.9 .9 + e^.8 .8) / 2 + 1."""
    mask = torch.tensor([[True, True, False]])
    assert ops.released_capability(torch.tensor(Q[:1]), mask).tolist() == pytest.approx([2.9970380], abs=1e-6)


@pytest.mark.parametrize(
    ("share", "left"),
    [(0.3, [0, 1, 3]), (0.5, [1, 3]), (0.75, [3]), (0.99, [3]), (0.24, [0, 1, 2, 3]), (0.0, [0, 1, 2, 3])],
)
def test_e3_the_most_confident_leave(make_batch, share, left):
    """The order is 2, 0, 1, 3; floor(share * 4) leave, so .3 takes one (the release rounds up: 2 and 0); one stays."""
    assert ids(kept(make_batch([1] * 4), Q, drop=share)) == left


@pytest.mark.parametrize(("n", "leave"), [(1, 0), (3, 0), (8, 2), (10, 3), (16, 4), (32, 9)])
def test_the_default_share_is_rounded_down(make_batch, n, leave):
    """floor(.3 B) of the whole batch: a batch of one is never emptied."""
    top = torch.linspace(0.1, 0.9, n)[:, None].expand(n, 3).tolist()
    assert ids(kept(make_batch([1] * n), top)) == list(range(n - leave))


def test_a_share_that_is_whole_is_not_rounded(make_batch):
    """.29 of 100 inputs are 29, although .29 * 100 is 28.999999999999996 in floats."""
    top = torch.linspace(0.1, 0.9, 100)[:, None].expand(100, 3).tolist()
    assert len(kept(make_batch([1] * 100), top, drop=0.29)) == 71


def test_every_field_is_filtered(make_batch):
    """Row 2 of lengths (1, 2, 3, 2) leaves with its three tokens, which stay counted as sampled."""
    whole = make_batch([1] * 4, [1, 2, 3, 2], prompts=[2, 3, 4, 2])
    batch = kept(whole, Q, drop=0.3)
    assert batch.probe_tokens == 3
    assert int(batch.mask.sum()) + batch.probe_tokens == 8
    assert batch.lengths.tolist() == [1, 2, 2]
    assert batch.responses == ["r0", "r1", "r3"]
    assert batch.extra["row"].tolist() == [0, 1, 3]
    assert batch.prompt_mask.sum(1).tolist() == [2, 3, 2]
    assert len(batch.group.unique_consecutive()) == 3
    shapes = {getattr(batch, name).shape for name in ("response_ids", "mask", "logprobs")}
    assert shapes == {(3, 2)}


def test_inputs_leave_with_all_their_responses(make_batch):
    """Two responses an input: capabilities are means over both, (.9, .8, .95 …) and so on; the second input leaves."""
    batch = kept(make_batch([2, 2]), [Q[1], Q[3], Q[0], Q[2]], k=2, drop=0.5)
    assert ids(batch) == [0, 0]
    assert batch.probe_tokens == 6


def test_a_real_policy_drops_its_surest_inputs(policy, rows):
    """6 inputs, floor(.5 * 6) leave; probabilities are of the unfiltered model although samples are filtered."""
    algo = ESRLReleased(drop=0.5, top_k=3, max_new_tokens=4)
    everyone = ESRLReleased(drop=0.0, top_k=3, max_new_tokens=4)
    batch = algo.sample(policy, rows(6), None, torch.Generator().manual_seed(0))
    whole = everyone.sample(policy, rows(6), None, torch.Generator().manual_seed(0))
    assert whole.probe_tokens == 0
    assert batch.probe_tokens == int(whole.mask.sum()) - int(batch.mask.sum()) > 0
    order = ops.released_capability(whole.extra["top"], whole.mask).argsort()
    assert ids(batch) == sorted(order[:3].tolist())
    assert (whole.extra["top"][whole.mask].log() >= whole.logprobs[whole.mask] - 1e-5).all()


# ---- queues ----------------------------------------------------------------------------------------------------------


def test_e2_whitening(make_batch):
    """Queue (.2, .4, .6, .8) of 5, rewards (.9, .3, .1): less the mean .54, over the population deviation .3006659.

    One token a response and values 0, so the returns are the whitened rewards.
    """
    algo = ESRLReleased(queue=5, kl=0.0)
    algo.load_state({"scores": [0.2, 0.4, 0.6, 0.8], "advantages": []})
    batch = make_batch([1] * 3, [1] * 3, scores=[0.9, 0.3, 0.1]).with_(values=torch.zeros(3, 1))
    batch = algo.credit(batch)
    white = [1.1973421, -0.7982281, -1.4634182]
    assert batch.returns[:, 0].tolist() == pytest.approx(white, abs=1e-5)
    assert algo.state()["scores"] == pytest.approx([0.6, 0.8, 0.9, 0.3, 0.1])
    # a queue of its own whitens the advantages: mean -.354768, population deviation 1.130606
    assert algo.state()["advantages"] == pytest.approx(white, abs=1e-5)
    assert batch.advantages[:, 0].tolist() == pytest.approx([1.372813, -0.392232, -0.980581], abs=1e-5)


def test_the_first_queue_holds_scores(make_batch):
    """One a response, also one that is 0; tokens without a reward of their own are not in it."""
    algo = ESRLReleased(kl=0.0)
    algo.credit(make_batch([1, 1], [1, 3], scores=[0.5, 2.0]).with_(values=torch.zeros(2, 3)))
    assert algo.state()["scores"] == [0.5, 2.0]


def test_padding_is_not_whitened(make_batch):
    """The release shifts padding to -mean / std; here it stays 0."""
    batch = make_batch([1, 1], [1, 3], scores=[0.5, 2.0]).with_(values=torch.zeros(2, 3))
    batch = ESRLReleased(kl=0.0).credit(batch)
    assert batch.advantages[0, 1:].tolist() == [0.0, 0.0]
    assert batch.returns[0, 1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("score", [0.0, 0.5])
def test_rewards_without_a_spread_teach_nothing(make_batch, score):
    """Queues that are empty or hold equal rewards, as at the first step of a rare or constant reward: no NaN."""
    batch = make_batch([1, 1], [1, 1], scores=[score] * 2).with_(values=torch.zeros(2, 1))
    credited = ESRLReleased(kl=0.0).credit(batch)
    assert credited.returns.tolist() == credited.advantages.tolist() == [[0.0], [0.0]]


def test_a_constant_reward_does_not_blow_up_the_returns(make_batch):
    """Tokens without a reward of their own are not divided by the deviation, about 0, of rewards that are all equal."""
    batch = make_batch([1, 1], [2, 3], scores=[0.5] * 2).with_(values=torch.zeros(2, 3))
    credited = ESRLReleased(kl=0.0).credit(batch)
    assert float(credited.returns.abs().max()) < 100
    assert torch.isfinite(credited.advantages).all()


def test_queues_survive_json(make_batch):
    algo, resumed = ESRLReleased(queue=4), ESRLReleased(queue=4)
    batch = make_batch([1] * 3, [1, 2, 3], scores=[0.9, 0.3, 0.1])
    batch = batch.with_(values=torch.zeros(3, 3), ref_logprobs=batch.logprobs * 0.5)
    algo.credit(batch)
    resumed.load_state(json.loads(json.dumps(algo.state())))
    assert torch.equal(resumed.credit(batch).advantages, algo.credit(batch).advantages)
    assert resumed.state() == algo.state()


# ---- PPO on the rest -------------------------------------------------------------------------------------------------


def test_f8_by_hand(make_batch):
    """Log-ratios (.5, -.2, .1) at kl .1, score 1, V = (.2, .4, .6), gamma = lambda = .95, no queue.

    r = (-.05, .02, .99), the KL of -.2 not clamped at 0; A_3 = .39; A_2 = .02 + .57 - .4 + .9025 A_3 = .541975;
    A_1 = -.05 + .38 - .2 + .9025 A_2 = .619132.
    """
    batch = make_batch([1], scores=[1.0]).with_(
        logprobs=torch.tensor([[0.5, -0.2, 0.1]]),
        ref_logprobs=torch.zeros(1, 3),
        values=torch.tensor([[0.2, 0.4, 0.6]]),
    )
    batch = ESRLReleased(queue=0).credit(batch)
    assert batch.advantages[0].tolist() == pytest.approx([0.619132, 0.541975, 0.39], abs=1e-5)
    assert batch.returns[0].tolist() == pytest.approx([0.819132, 0.941975, 0.99], abs=1e-5)


def test_without_dropping_and_queues_it_is_ppo(make_batch):
    generator = torch.Generator().manual_seed(0)
    batch = make_batch([1] * 3, [2, 5, 3], scores=[0.3, -1.0, 30.0])
    lp, ref, values, new = (torch.randn(3, 5, generator=generator) * batch.mask for _ in range(4))
    batch = batch.with_(logprobs=lp, ref_logprobs=ref, values=values)
    ppo, algo = PPO(kl=0.1, gamma=0.95, whiten="none", reward_clip=10.0), ESRLReleased(queue=0)
    wanted, found = ppo.credit(batch), algo.credit(batch)
    assert torch.equal(found.advantages, wanted.advantages)
    assert torch.equal(algo.objective(new, found).total, ppo.objective(new, wanted).total)


def test_released_values_are_the_defaults():
    """One response, top_k 50, top_p .95, 30 % leave, reward clip 10, KL .1, 4 epochs, queues of 1000."""
    algo = ESRLReleased()
    assert (algo.k, algo.top_k, algo.top_p, algo.drop, algo.reward_clip) == (1, 50, 0.95, 0.3, 10.0)
    assert (algo.kl, algo.clip, algo.critic.clip, algo.epochs, algo.queue) == (0.1, 0.2, 0.2, 4, 1000)
    assert (algo.gamma, algo.lam) == (0.95, 0.95)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 0}, "k"),
        ({"temperature": 0.0}, "temperature"),
        ({"clip": -0.2}, "clip"),
        ({"drop": 1.0}, "drop"),
        ({"drop": -0.1}, "drop"),
        ({"queue": -1}, "queue"),
        ({"gamma": 1.5}, "gamma"),
        ({"lam": -0.5}, "lam"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        ESRLReleased(**settings)
