"""Facts about the estimators (baselines.md, "Estimator facts to assert in tests"), exact instead of sampled.

Two prompts, each a softmax bandit of four arms. The expectation over groups of four responses is a sum over all 4⁴
groups, so that no seed decides.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from alignkit.algos.dr_grpo import DrGRPO
from alignkit.algos.grpo import GRPO
from alignkit.algos.reinforce import Reinforce
from alignkit.algos.remax import ReMax
from alignkit.algos.rloo import RLOO

ARMS, N = 4, 4
GROUPS = torch.tensor(list(itertools.product(range(ARMS), repeat=N)))  # (256, 4)
LOGITS = {"hard": torch.tensor([-1.5, 0.0, 0.5, 0.2]), "even": torch.tensor([0.6, 0.1, -0.3, 0.4])}
REWARDS = {"hard": torch.tensor([1.0, 0.0, 0.0, 0.0]), "even": torch.tensor([1.0, 0.0, 1.0, 0.0])}


def expected(make_batch, algo, prompt: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(true gradient, mean estimate, variance / |mean|²) of d E[R] / d logits."""
    p, r = LOGITS[prompt].double().softmax(0), REWARDS[prompt].double()
    true = p * (r - (p * r).sum())
    arms = GROUPS
    if isinstance(algo, ReMax):  # the likeliest arm beside each group, the greedy response
        arms = torch.cat([GROUPS, p.argmax().expand(len(GROUPS), 1)], dim=1)
    batch = make_batch([arms.shape[1]] * len(arms), [1] * arms.numel(), scores=r[arms].flatten().tolist())
    batch.extra["given"] = (torch.arange(arms.shape[1]) >= N).repeat(len(arms))
    batch = algo.credit(batch)
    advantages = batch.advantages[:, 0].double().view(-1, N)
    score = torch.eye(ARMS, dtype=torch.float64)[GROUPS] - p  # d log pi(y) / d logits
    estimates = (advantages[..., None] * score).mean(1)  # of each group
    weight = p[GROUPS].prod(1)
    mean = (weight[:, None] * estimates).sum(0)
    variance = float((weight * (estimates - mean).square().sum(1)).sum())
    return true, mean, variance / float(mean.square().sum())


def ratio(true: torch.Tensor, mean: torch.Tensor) -> float:
    return float((true @ mean) / (true @ true))


@pytest.mark.parametrize("prompt", LOGITS)
@pytest.mark.parametrize(
    ("algo", "wanted"),
    [
        (Reinforce(k=N, baseline="none"), 1.0),
        (ReMax(k=N), 1.0),
        (RLOO(k=N), 1.0),
        (DrGRPO(k=N), 0.75),  # (n - 1) / n
    ],
    ids=["no baseline", "remax", "rloo", "group mean"],
)
def test_bias_is_in_the_scale_only(make_batch, algo, wanted, prompt):
    true, mean, _ = expected(make_batch, algo, prompt)
    torch.testing.assert_close(mean, wanted * true, atol=1e-6, rtol=1e-5)


def test_deviation_weighs_prompts(make_batch):
    """GRPO keeps the direction inside each prompt, and gives the harder prompt more weight than the true gradient does."""
    found = {}
    for prompt in LOGITS:
        true, mean, _ = expected(make_batch, GRPO(k=N), prompt)
        assert float(torch.cosine_similarity(true, mean, dim=0)) == pytest.approx(1.0, abs=1e-3)
        found[prompt] = ratio(true, mean)
    assert found["hard"] > 1.05 * found["even"] > 1.05


def test_a_baseline_lowers_the_variance(make_batch):
    """Variance / |mean|² with a leave-one-out baseline is below that without one where rewards are mostly 1."""
    spread = [expected(make_batch, algo, "even")[2] for algo in (Reinforce(k=N, baseline="none"), RLOO(k=N))]
    assert spread[1] < spread[0]
