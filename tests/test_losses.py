"""Losses against numbers worked by hand. A loss is a sum and its divisor; the quotient is what the cards print."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit import losses, ops
from alignkit.batch import Loss


def mean(loss: Loss) -> float:
    return float(loss.total.detach()) / loss.count


# two prompts; the first has two responses of 2 and 1 tokens, the second one of 3
LOGPROBS = torch.tensor([[-1.0, -2.0, -50.0], [-3.0, -50.0, -50.0], [-1.0, -1.0, -2.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
GROUP = torch.tensor([0, 0, 1])


def test_nll():
    """Sums 3, 3 and 4 over 6 tokens and 3 rows: 10 / 6 and 10 / 3. Padding (-50) is left out."""
    tokens, sequences = losses.nll(LOGPROBS, MASK), losses.nll(LOGPROBS, MASK, "sequences")
    assert (float(tokens.total), tokens.count) == (10.0, 6.0)
    assert (float(sequences.total), sequences.count) == (10.0, 3.0)
    assert tokens.metrics["nll"] == sequences.metrics["nll"] == pytest.approx(10 / 6)


@pytest.mark.parametrize(
    ("normalize", "total", "count"),
    [
        # advantages 1, -1, 2: rows -1 * -3 = 3, 1 * -3 = -3, -2 * -4 = 8
        ("groups", (3 - 3) / 2 + 8, 2.0),
        ("sequences", 3 - 3 + 8, 3.0),
        ("tokens", 3 - 3 + 8, 6.0),
    ],
)
def test_policy_gradient(normalize, total, count):
    advantages = torch.tensor([1.0, -1.0, 2.0])[:, None].expand(3, 3)
    loss = losses.policy_gradient(LOGPROBS, advantages, MASK, GROUP, normalize)
    assert float(loss.total) == pytest.approx(total)
    assert loss.count == count


def test_policy_gradient_of_each_token():
    """Advantages may differ inside a row: -(1 * -1 + 10 * -2) = 21; the masked 99 does not count."""
    loss = losses.policy_gradient(
        LOGPROBS[:1], torch.tensor([[1.0, 10.0, 99.0]]), MASK[:1], torch.tensor([0]), "sequences"
    )
    assert float(loss.total) == 21.0


@pytest.mark.parametrize(
    ("normalize", "wanted"),
    [
        # baselines card, "Aggregation": token losses [1, 1] and [-1, -1, -1, -1]
        ("tokens", -1 / 3),
        ("sequences", (2 - 4) / 2),
        ("groups", (2 - 4) / 2),  # two prompts of one response each
    ],
)
def test_aggregation_vector(normalize, wanted):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    advantages = torch.tensor([1.0, -1.0])[:, None].expand(2, 4)
    loss = losses.policy_gradient(torch.full((2, 4), -1.0), advantages, mask, torch.tensor([0, 1]), normalize)
    assert mean(loss) == pytest.approx(wanted)


def test_policy_gradient_gradient():
    """d total / d lp_t = -A_t / k where the mask is true, else 0; nothing flows into the advantages."""
    logprobs = LOGPROBS.clone().requires_grad_()
    advantages = torch.tensor([[1.0] * 3, [-1.0] * 3, [2.0] * 3]).requires_grad_()
    losses.policy_gradient(logprobs, advantages, MASK, GROUP, "groups").total.backward()
    assert logprobs.grad.tolist() == [[-0.5, -0.5, 0.0], [0.5, 0.0, 0.0], [-2.0, -2.0, -2.0]]
    assert advantages.grad is None


def test_one_response_a_prompt_makes_groups_and_sequences_equal():
    advantages = torch.tensor([1.0, -1.0, 2.0])[:, None].expand(3, 3)
    apart = torch.tensor([4, 5, 6])
    groups = losses.policy_gradient(LOGPROBS, advantages, MASK, apart, "groups")
    sequences = losses.policy_gradient(LOGPROBS, advantages, MASK, apart, "sequences")
    assert mean(groups) == mean(sequences) == pytest.approx(8 / 3)


def test_unknown_normalisation():
    with pytest.raises(ValueError, match="rows"):
        losses.policy_gradient(LOGPROBS, LOGPROBS, MASK, GROUP, "rows")


@pytest.mark.parametrize(
    ("normalize", "length", "wanted"),
    [
        ("responses", 0, 0.0),
        ("tokens", 0, -0.333333),
        ("constant", 8, -0.125),
        ("sequences", 0, -1.0),
        ("groups", 0, -1.0),
    ],
)
def test_aggregate_vectors(normalize, length, wanted):
    """baselines.md, "Shared definitions": [1, 1] and [-1, -1, -1, -1] → 0; -.333333; with constant 8: -.125; sums -1."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    x = torch.tensor([[1.0, 1.0, 77.0, 77.0], [-1.0] * 4])
    total, count = losses.aggregate(x, mask, torch.tensor([0, 0]), normalize, length)
    assert float(total) / count == pytest.approx(wanted, abs=1e-6)


def test_aggregate_of_groups_of_unequal_size():
    """Prompts of 2 and 1 responses: ((3 + 1) / 2 + 8) / 2 = 5; a response each: (3 + 1 + 8) / 3 = 4."""
    x, mask = torch.tensor([[1.0, 2.0], [1.0, 9.0], [4.0, 4.0]]), torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    for normalize, wanted in (
        ("groups", 5.0),
        ("sequences", 4.0),
        ("tokens", 12 / 5),
        ("responses", (1.5 + 1 + 4) / 3),
    ):
        total, count = losses.aggregate(x, mask, GROUP, normalize)
        assert float(total) / count == pytest.approx(wanted), normalize


@pytest.mark.parametrize("normalize", ["tokens", "responses", "sequences", "groups", "constant"])
def test_aggregate_adds_up(normalize):
    """Sums and divisors of the parts are those of the whole: a micro-batch never changes the mean."""
    parts = [
        losses.aggregate(LOGPROBS[part], MASK[part], GROUP[part], normalize, 8) for part in (slice(0, 2), slice(2, 3))
    ]
    total, count = losses.aggregate(LOGPROBS, MASK, GROUP, normalize, 8)
    assert sum(n for _, n in parts) == count
    assert float(sum(t for t, _ in parts)) == pytest.approx(float(total))


def test_aggregate_names_the_unknown():
    with pytest.raises(ValueError, match="rows"):
        losses.aggregate(LOGPROBS, MASK, GROUP, "rows")


def clipped(ratio: list[float], advantage: list[float], **settings) -> Loss:
    """Loss of one response whose tokens have these ratios and advantages, mean over tokens."""
    old = torch.full((1, len(ratio)), -2.0, dtype=torch.float64)
    now = old + torch.tensor([ratio], dtype=torch.float64).log()
    mask = torch.ones(1, len(ratio), dtype=torch.bool)
    return losses.clipped(
        now, old, torch.tensor([advantage], dtype=torch.float64), mask, torch.tensor([0]), "tokens", **settings
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "wanted"),
    [
        # baselines.md, "PPO for LMs": eps .2
        (1.3, 1, {}, -1.2),
        (1.3, -1, {}, 1.3),
        (0.7, 1, {}, -0.7),
        (0.7, -1, {}, 0.8),
        # inside the range nothing is cut
        (1.1, 1, {}, -1.1),
        (0.9, -1, {}, 0.9),
        # "GRPO, Dr. GRPO, DAPO": the wider upper side
        (1.3, 1, {"high": 0.28}, -1.28),
        (1.3, -1, {"high": 0.28}, 1.3),
        (0.7, -1, {"high": 0.28}, 0.8),
        (0.5, -1, {"low": 0.4, "high": 0.28}, 0.6),
        # dual clip, c = 3: a negative advantage costs at most 3 |A|; a positive one is left alone
        (5.0, -1, {"dual": 3.0}, 3.0),
        (5.0, -2, {"dual": 3.0}, 6.0),
        (2.0, -1, {"dual": 3.0}, 2.0),
        (5.0, 1, {"dual": 3.0}, -1.2),
    ],
)
def test_clip_vectors(ratio, advantage, settings, wanted):
    assert mean(clipped([ratio], [advantage], **settings)) == pytest.approx(wanted, abs=1e-5)


def test_clipped_tokens_have_no_gradient():
    """Where the clip binds the gradient is 0; elsewhere -rho A. Two tokens, mean over both."""
    old = torch.zeros(1, 2, dtype=torch.float64)
    now = torch.tensor([[1.3, 0.7]], dtype=torch.float64).log().requires_grad_()
    loss = losses.clipped(now, old, torch.ones(1, 2), torch.ones(1, 2).bool(), torch.tensor([0]), "tokens")
    loss.total.backward()
    assert now.grad.tolist() == [pytest.approx([0.0, -0.7])]
    assert loss.metrics["clip_fraction"] == 0.5


def test_clip_fraction_counts_only_where_the_clip_binds():
    """Of ratios 1.3 (A 1: cut), 1.3 (A -1: not), .7 (A -1: cut), 1 (not): a half."""
    loss = clipped([1.3, 1.3, 0.7, 1.0], [1.0, -1.0, -1.0, 1.0])
    assert loss.metrics["clip_fraction"] == 0.5


def test_sequence_level_ratio():
    """exp(sum of log-ratios): 1.1 * 1.1 * 1.1 = 1.331 is cut to 1.2 though no token is outside; .9 * 1.1 = .99 is not.
    Each response counts once; padding counts in neither."""
    ratio = torch.tensor([[1.1, 1.1, 1.1], [0.9, 1.1, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    loss = losses.clipped(
        ratio.log(), torch.zeros(2, 3), torch.ones(2, 3), mask, torch.tensor([0, 0]), "sequences", level="sequence"
    )
    assert loss.count == 2
    assert mean(loss) == pytest.approx(-(1.2 + 0.99) / 2)
    assert loss.metrics["clip_fraction"] == 0.5


@pytest.mark.parametrize(
    ("apart", "rewards", "eta", "code", "paper"),
    [
        ((0.30, -0.10), (1.5, 0.5), 1.0, 0.36, 0.36),
        ((0.30, -0.10), (1.5, 0.5), 2.0, 2.56, 0.64),
        ((0.0, 0.0), (1.0, 0.0), 2.0, 4.0, 1.0),
        ((2.0, 0.0), (3.0, 0.0), 2.0, 16.0, 4.0),
    ],
)
def test_rebel_vectors(apart, rewards, eta, code, paper):
    """rebel_refuel.md, E1, E2 and E5: the code's form is eta² times the paper's."""
    for scaled, wanted in ((False, code), (True, paper)):
        loss = losses.rebel(torch.tensor(apart), torch.tensor(rewards), eta, scaled)
        assert mean(loss) == pytest.approx(wanted, abs=1e-5)


def test_rebel_turned_round_is_the_same():
    """Both differences change sign together; rewards get no gradient."""
    apart, rewards = torch.tensor([0.3, -0.1], requires_grad=True), torch.tensor([1.5, 0.5], requires_grad=True)
    loss = losses.rebel(apart, rewards, 2.0)
    assert mean(losses.rebel(apart.flip(0), rewards.flip(0), 2.0)) == pytest.approx(mean(loss))
    loss.total.backward()
    assert apart.grad.tolist() == pytest.approx([-3.2, 3.2])  # 2 (.4 - 2)
    assert rewards.grad is None


def test_preference_vectors():
    """baselines.md, "Offline preference losses": delta 2 at .1: DPO .598139, IPO 9; TRL's IPO, on averages over lengths
    5 and 7, 1/5 + 1/7: 21.688980. At pi = pi_ref DPO is ln 2 and IPO 25."""
    margins = torch.tensor([2.0, 1 / 5 + 1 / 7, 0.0], dtype=torch.float64)
    assert losses.preference(margins, "dpo", 0.1).tolist()[::2] == pytest.approx([0.598139, math.log(2)], abs=1e-5)
    assert losses.preference(margins, "ipo", 0.1).tolist() == pytest.approx([9.0, 21.688980, 25.0], abs=1e-5)


def test_preference_is_antisymmetric():
    """-log sigmoid(d) - -log sigmoid(-d) = -d: chosen and rejected changed over turn the logit's sign."""
    margins = torch.tensor([0.3, 2.0, -40.0, 300.0], dtype=torch.float64)
    one, other = losses.preference(margins, "dpo", 0.5), losses.preference(-margins, "dpo", 0.5)
    torch.testing.assert_close(one - other, -0.5 * margins)
    assert torch.isfinite(one).all()


def test_unknown_preference():
    with pytest.raises(ValueError, match="hinge"):
        losses.preference(torch.zeros(1), "hinge", 0.1)


@pytest.mark.parametrize(
    ("value", "old", "wanted", "gradient"),
    [
        (0.9, 0.5, 0.045, 0.0),  # baselines card: V went past its clip, .7, whose error counts: 1/2 .3²
        (0.6, 0.5, 0.08, -0.4),  # inside the clip: 1/2 .4²
        (0.1, 0.5, 0.405, -0.9),  # past the clip the wrong way: 1/2 .9², and V is pulled back
        (1.5, 1.0, 0.125, 0.5),  # beyond the return: 1/2 .5² is more than 1/2 .2²
    ],
)
def test_clipped_value(value, old, wanted, gradient):
    """1/2 max((V - R)², (clip(V, V_old ± .2) - R)²) towards R = 1."""
    values = torch.tensor([[value]], requires_grad=True)
    loss = losses.clipped_value(values, torch.tensor([[old]]), torch.ones(1, 1), 0.2)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(wanted, abs=1e-6)
    assert float(values.grad) == pytest.approx(gradient, abs=1e-6)


def test_value_without_a_clip():
    loss = losses.clipped_value(torch.tensor([[0.9]]), torch.tensor([[0.5]]), torch.ones(1, 1), None)
    assert float(loss) == pytest.approx(0.005)


def test_hl_gauss():
    """hl_gauss card: uniform logits cost log 8; the target's own logits its entropy 1.199472, the least there is."""
    edges = torch.linspace(-1, 1, 9)
    y = torch.full((1, 3), 0.3)
    own = ops.hl_gauss_target(torch.tensor(0.3), edges, 0.1875).clamp(min=1e-30).log()
    logits = torch.stack([torch.zeros(8), own, own + torch.linspace(-1, 1, 8)])[None].requires_grad_()
    loss = losses.hl_gauss(logits, y, edges, 0.1875)
    assert loss[0, :2].tolist() == pytest.approx([math.log(8), 1.199472], abs=1e-5)
    assert float(loss[0, 2].detach()) > 1.199472 + 1e-3
    loss.sum().backward()
    p = ops.hl_gauss_target(torch.tensor(0.3), edges, 0.1875)
    torch.testing.assert_close(logits.grad[0, 0], 1 / 8 - p, atol=1e-6, rtol=0)  # softmax - target
    assert float(logits.grad[0, 1].abs().max()) < 1e-6
