"""Losses against numbers worked by hand. A loss is a sum and its divisor; the quotient is what the cards print."""

from __future__ import annotations

import pytest
import torch

from alignkit import losses
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
