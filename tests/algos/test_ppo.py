"""PPO against the vectors of the baselines card, "PPO for LMs", and numbers worked by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from alignkit.algos.ppo import PPO
from alignkit.critic import Critic

VALUES, LOG_RATIOS = [0.2, 0.4, 0.6], [0.5, -0.2, 0.1]


@pytest.fixture
def rollout(make_batch):
    """The card's response of three tokens, score 1; the start model's log-probabilities are 0."""
    batch = make_batch([1], scores=[1.0])
    zeros = torch.zeros(1, 3)
    return batch.with_(logprobs=torch.tensor([LOG_RATIOS]), ref_logprobs=zeros, values=torch.tensor([VALUES]))


class Scripted:
    """A policy that gives prepared log-probabilities, and value outputs beside or after them."""

    def __init__(self, logprobs, values, shared: bool = False) -> None:
        self.logprobs, self.values, self.shared = torch.tensor(logprobs), torch.tensor(values)[..., None], shared

    def score(self, batch, temperature=None):
        return self.logprobs, self.values if self.shared else None

    def value_outputs(self, batch):
        return self.values


def mean(loss) -> float:
    return float(loss.total.detach()) / loss.count


# ---- rewards, advantages, returns ------------------------------------------------------------------------------------


def test_credit_vector(rollout):
    """r = (-.05, .02, .99); A = (.710975, .5905, .39); returns = (.910975, .9905, .99)."""
    algo = PPO(kl=0.1, whiten="none")
    assert algo.token_rewards(rollout)[0].tolist() == pytest.approx([-0.05, 0.02, 0.99], abs=1e-6)
    batch = algo.credit(rollout)
    assert batch.advantages[0].tolist() == pytest.approx([0.710975, 0.5905, 0.39], abs=1e-6)
    assert batch.returns[0].tolist() == pytest.approx([0.910975, 0.9905, 0.99], abs=1e-6)


def test_whitening_leaves_the_returns(rollout):
    """Mean of A .563825, deviations (.14715, .026675, -.173825), sample variance .0262896, deviation .162141."""
    batch = PPO(kl=0.1).credit(rollout)
    assert batch.advantages[0].tolist() == pytest.approx([0.907545, 0.164518, -1.072062], abs=1e-4)
    assert batch.returns[0].tolist() == pytest.approx([0.910975, 0.9905, 0.99], abs=1e-6)
    scaled = PPO(kl=0.1, whiten="scale").credit(rollout)
    assert (scaled.advantages - batch.advantages)[0].tolist() == pytest.approx([0.563825] * 3, abs=1e-6)


def test_whitening_is_over_the_tokens_that_count(make_batch):
    """Advantages 1; 3; 2, 2: mean 2, sample variance 2 / 3. The padding of the short rows stays 0."""
    batch = make_batch([1, 1, 1], [1, 1, 2], scores=[1.0, 3.0, 2.0]).with_(values=torch.zeros(3, 2))
    found = PPO(kl=0.0, lam=1.0).credit(batch).advantages
    step = math.sqrt(3 / 2)
    assert found.flatten().tolist() == pytest.approx([-step, 0.0, step, 0.0, 0.0, 0.0], abs=1e-5)


def test_kl_in_the_loss_is_not_in_the_reward(rollout):
    """r = (0, 0, 1). As k2 in the loss: mean of (.25, .04, .01) / 2 is .05; times .1; the value loss is weighted 0."""
    algo = PPO(kl=0.1, kl_in="loss", kl_estimator="k2", whiten="none", critic=Critic(weight=0.0))
    assert algo.token_rewards(rollout).tolist() == [[0.0, 0.0, 1.0]]
    batch = algo.credit(rollout).with_(advantages=torch.zeros(1, 3))
    assert mean(algo.loss(Scripted([LOG_RATIOS], [VALUES]), batch)) == pytest.approx(0.005, abs=1e-7)


def test_score_is_clipped_and_a_cut_response_pays(make_batch):
    """Scores 5 and -5 within ± 2; the second response has no end and pays .5. They stand on the last token."""
    batch = make_batch([1, 1], [1, 2], scores=[5.0, -5.0])
    batch.extra["ended"] = torch.tensor([True, False])
    algo = PPO(kl=0.0, reward_clip=2.0, missing_eos_penalty=0.5)
    assert algo.token_rewards(batch).tolist() == [[2.0, 0.0], [0.0, -2.5]]


# ---- the clipped loss ------------------------------------------------------------------------------------------------


def objective(make_batch, ratio: float, advantage: float, **settings) -> tuple[float, float]:
    """Loss of one token, and its derivative by the log-probability."""
    batch = make_batch([1], [1]).with_(logprobs=torch.zeros(1, 1), advantages=torch.tensor([[advantage]]))
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    loss = PPO(**settings).objective(logprobs, batch)
    loss.total.backward()
    return mean(loss), float(logprobs.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted", "gradient"),
    [(1.3, 1.0, -1.2, 0.0), (1.3, -1.0, 1.3, 1.3), (0.7, 1.0, -0.7, -0.7), (0.7, -1.0, 0.8, 0.0), (1.1, 2.0, -2.2, -2.2)],
)  # fmt: skip
def test_clip_table(make_batch, ratio, advantage, wanted, gradient):
    """The card's four cases and one inside the clip; what is clipped has no gradient, the rest -rho A."""
    assert objective(make_batch, ratio, advantage) == pytest.approx((wanted, gradient), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted", "gradient"),
    [(5.0, -1.0, 3.0, 0.0), (2.0, -1.0, 2.0, 2.0), (0.5, -1.0, 0.8, 0.0), (5.0, 1.0, -1.2, 0.0), (5.0, -2.0, 6.0, 0.0)],
)  # fmt: skip
def test_dual_clip(make_batch, ratio, advantage, wanted, gradient):
    """With A < 0 the loss is at most c |A|, c = 3; a positive advantage does not see it."""
    assert objective(make_batch, ratio, advantage, dual_clip=3.0) == pytest.approx((wanted, gradient), abs=1e-5)


def test_without_the_dual_clip_the_loss_is_not_bounded(make_batch):
    assert objective(make_batch, 5.0, -1.0)[0] == pytest.approx(5.0, abs=1e-5)


def test_loss_is_a_mean_over_tokens(make_batch):
    """At pi = pi_old the loss is -A: rows of 1 and 3 tokens with A = 4 and 0, so -4 / 4 and not -4 / 2."""
    batch = make_batch([1, 1], [1, 3])
    batch = batch.with_(advantages=torch.tensor([[4.0, 0, 0], [0, 0, 0]]))
    assert mean(PPO().objective(batch.logprobs, batch)) == pytest.approx(-1.0)


# ---- the critic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_value_loss_vector(make_batch, shared):
    """V_old .5, V .9, return 1, clip .2: 1/2 max(.1², .3²) = .045; it enters with weight .1 by default."""
    batch = make_batch([1], [1]).with_(
        logprobs=torch.zeros(1, 1), advantages=torch.zeros(1, 1), values=torch.tensor([[0.5]]), returns=torch.ones(1, 1)
    )
    loss = PPO().loss(Scripted([[0.0]], [[0.9]], shared), batch)
    assert mean(loss) == pytest.approx(0.0045, abs=1e-7)
    assert loss.metrics["value_loss"] == pytest.approx(0.045, abs=1e-6)


def test_value_loss_without_a_clip(make_batch):
    batch = make_batch([1], [1]).with_(
        logprobs=torch.zeros(1, 1), advantages=torch.zeros(1, 1), values=torch.tensor([[0.5]]), returns=torch.ones(1, 1)
    )
    algo = PPO(critic=Critic(clip=None, weight=2.0))
    assert mean(algo.loss(Scripted([[0.0]], [[0.9]]), batch)) == pytest.approx(2 * 0.005, abs=1e-7)


# ---- the adaptive KL coefficient -------------------------------------------------------------------------------------


def drifted(make_batch, nats: list[float], lengths: list[int] | None = None):
    """Responses whose log-ratios to the start model sum to ``nats``."""
    batch = make_batch([1] * len(nats), lengths or [1] * len(nats))
    apart = (torch.tensor(nats) / batch.lengths)[:, None] * batch.mask
    return batch.with_(logprobs=apart, ref_logprobs=torch.zeros_like(apart))


@pytest.mark.parametrize(
    ("nats", "wanted"),
    [(9.0, 0.201024), (6.6, 0.2 * (1 + 0.1 * 0.0256)), (6.0, 0.2), (0.0, 0.2 * (1 - 0.2 * 0.0256))],
)
def test_controller(make_batch, nats, wanted):
    """Coefficient .2, target 6, n 256, horizon 10 000; the error is bounded by .2 on either side."""
    algo = PPO(kl=0.2, kl_target=6.0, kl_horizon=10_000)
    assert algo.adapt(drifted(make_batch, [nats] * 256)) == pytest.approx(nats, abs=1e-4)
    assert algo.kl == pytest.approx(wanted, abs=1e-6)


def test_kl_is_of_whole_responses(make_batch):
    """Sums 2 and 6, mean 4 nats a response, whatever the lengths 1 and 3; without a target the coefficient stays."""
    algo = PPO(kl=0.2)
    assert algo.adapt(drifted(make_batch, [2.0, 6.0], [1, 3])) == pytest.approx(4.0)
    assert algo.kl == 0.2


def test_the_adapted_coefficient_is_state(make_batch):
    algo, resumed = (PPO(kl=0.2, kl_target=6.0) for _ in range(2))
    algo.adapt(drifted(make_batch, [9.0] * 256))
    resumed.load_state(json.loads(json.dumps(algo.state())))
    assert resumed.kl == algo.kl != 0.2


# ---- with a real policy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_one_before_the_first_update(policy, rows, temperature):
    """Samples carry the log-probabilities of the policy that is trained, at its temperature."""
    algo = PPO(k=2, temperature=temperature, max_new_tokens=5)
    batch = algo.sample(policy, rows(3), None, torch.Generator().manual_seed(0))
    batch = batch.with_(advantages=torch.ones_like(batch.logprobs))
    logprobs = policy.forward(batch, torch.full((len(batch),), temperature)).detach()
    torch.testing.assert_close(batch.logprobs, logprobs, atol=1e-4, rtol=0)
    loss = algo.objective(logprobs, batch)
    assert mean(loss) == pytest.approx(-1.0, abs=1e-4)
    assert loss.metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 0}, "k"),
        ({"temperature": 0.0}, "temperature"),
        ({"clip": 0.0}, "clip"),
        ({"gamma": 1.1}, "gamma"),
        ({"gamma": -0.1}, "gamma"),
        ({"lam": 1.1}, "lam"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"kl": 0.0, "kl_target": 6.0}, "kl_target"),
        ({"kl_target": -1.0}, "kl_target"),
        ({"kl": {"start": 0.1, "end": 0.0}, "kl_target": 6.0}, "kl_target"),
        ({"kl_target": 6.0, "kl_horizon": 0}, "kl_horizon"),
        ({"kl": -0.1}, "kl"),
        ({"reward_clip": -1.0}, "reward_clip"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        PPO(**settings)
