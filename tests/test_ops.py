"""Tensor functions against numbers worked by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit import ops

RAGGED = torch.tensor([0, 0, 0, 3, 1, 1])  # ids need not be in order, only adjacent


def close(found: torch.Tensor, wanted: object, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), atol=tolerance, rtol=0)


def test_token_logprobs():
    """p = (.7, .1, .2): log .7, log .1, log .2; scores shifted by a constant are the same distribution."""
    logits = torch.tensor([0.7, 0.1, 0.2]).log().expand(1, 3, 3) + torch.tensor([0.0, 5.0, -80.0])[None, :, None]
    found = ops.token_logprobs(logits, torch.tensor([[0, 1, 2]]))
    close(found, [[math.log(0.7), math.log(0.1), math.log(0.2)]], 1e-5)


def test_token_logprobs_keeps_rows_and_steps_apart():
    """Row b, step t has probability 1/2 at token b + t and the rest spread evenly: V = 5, (1/2)/4 = 1/8 elsewhere."""
    probs = torch.full((2, 3, 5), 1 / 8)
    for b in range(2):
        for t in range(3):
            probs[b, t, b + t] = 1 / 2
    ids = torch.tensor([[0, 1, 4], [1, 4, 3]])
    half, eighth = math.log(1 / 2), math.log(1 / 8)
    close(ops.token_logprobs(probs.log(), ids), [[half, half, eighth], [half, eighth, half]])


def test_token_logprobs_of_half_precision_come_in_float32():
    found = ops.token_logprobs(torch.zeros(1, 1, 300, dtype=torch.bfloat16), torch.tensor([[7]]))
    assert found.dtype == torch.float32
    close(found, [[-math.log(300)]], 1e-5)


def test_token_logprobs_gradient():
    """d log p_y / d logits = onehot(y) - p."""
    logits = torch.tensor([[[0.7, 0.1, 0.2]]]).log().requires_grad_()
    ops.token_logprobs(logits, torch.tensor([[1]])).sum().backward()
    close(logits.grad, [[[-0.7, 0.9, -0.2]]])


def test_entropy():
    """Uniform over 4: log 4. Card E-3's (.7, .1, .1, .1): H = log 4 (1 - .3216102). A certain token: 0."""
    probs = torch.tensor([[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [1.0, 1e-30, 1e-30, 1e-30]])
    close(ops.entropy(probs.log()), [math.log(4), math.log(4) * (1 - 0.3216102), 0.0])


def test_masked_mean():
    """(1 + 3) / 2; (4 + 5 + 6) / 3; an empty row gives 0, not NaN."""
    x = torch.tensor([[1.0, 3.0, 99.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    close(ops.masked_mean(x, mask), [2.0, 5.0, 0.0])


def test_group_mean_of_ragged_groups():
    """Groups of 3, 1 and 2: (1 + 2 + 6) / 3 = 3; 5; (10 + 20) / 2 = 15."""
    close(ops.group_mean(torch.tensor([1.0, 2, 6, 5, 10, 20]), RAGGED), [3.0, 3, 3, 5, 15, 15])


def test_leave_one_out_of_ragged_groups():
    """(2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2; a group of one gets its own value; a pair gets each other's."""
    close(ops.leave_one_out(torch.tensor([1.0, 2, 6, 5, 10, 20]), RAGGED), [4.0, 3.5, 1.5, 5, 20, 10])


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_leave_one_out_of_equal_values_is_exactly_that_value(n):
    """Groups without a signal must give advantage 0, not rounding noise that Adam would blow up."""
    for value in (0.01, 0.03, 0.1, 0.3, 0.7, 1.0, 123.456):
        x = torch.full((n,), value)
        assert torch.equal(ops.leave_one_out(x, torch.zeros(n, dtype=torch.long)), x), value


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.floats(-10, 10), min_size=2, max_size=5), min_size=1, max_size=4), st.floats(-5, 5))
def test_leave_one_out_properties(groups, shift):
    """RLOO advantages are n / (n - 1) times the distance to the group's mean, and a constant does not move them."""
    x = torch.tensor([v for g in groups for v in g], dtype=torch.float64)
    group = torch.tensor([i for i, g in enumerate(groups) for _ in g])
    advantages = x - ops.leave_one_out(x, group)
    wanted = [len(g) / (len(g) - 1) * (v - sum(g) / len(g)) for g in groups for v in g]
    close(advantages, wanted, 1e-9)
    moved = x + shift
    close(moved - ops.leave_one_out(moved, group), advantages.tolist(), 1e-9)


def test_fifo_drops_the_oldest():
    """Card E-2: M = 5, four old and three new rewards, so the two oldest leave."""
    assert ops.fifo([0.2, 0.4, 0.6, 0.8], [0.9, 0.3, 0.1], 5) == [0.6, 0.8, 0.9, 0.3, 0.1]


def test_fifo_short_and_long():
    assert ops.fifo([], [1.0, 2.0], 5) == [1.0, 2.0]
    assert ops.fifo([1.0], [2.0, 3.0, 4.0], 2) == [3.0, 4.0]
    old = [1.0]
    ops.fifo(old, [2.0], 5)
    assert old == [1.0], "the queue that came in is left alone"


def test_baseline_kinds():
    """scores (1, 2, 6, 5, 10, 20): none 0; queue (1, 2) has mean 1.5, an empty one 0; their mean is 44 / 6."""
    scores = torch.tensor([1.0, 2, 6, 5, 10, 20])
    close(ops.baseline("none", scores, RAGGED, [9.0]), [0.0] * 6)
    close(ops.baseline("fifo", scores, RAGGED, [1.0, 2.0]), [1.5] * 6)
    close(ops.baseline("fifo", scores, RAGGED, []), [0.0] * 6)
    close(ops.baseline("batch", scores, RAGGED, [9.0]), [44 / 6] * 6)
    close(ops.baseline("leave_one_out", scores, RAGGED, [9.0]), [4.0, 3.5, 1.5, 5, 20, 10])


def test_unknown_baseline():
    with pytest.raises(ValueError, match="median"):
        ops.baseline("median", torch.zeros(2), torch.zeros(2).long(), [])


@pytest.mark.parametrize(
    ("step", "schedule", "floor", "wanted"),
    [
        # warm-up of 4: the first step is 1/4 of the rate, the fourth the whole rate
        (0, "cosine", 0.0, 0.25),
        (1, "linear", 0.0, 0.5),
        (3, "constant", 0.0, 1.0),
        # then 8 steps of decay, from step 4 to 12; half of it is done at step 8, a quarter at step 6
        (4, "linear", 0.0, 1.0),
        (8, "linear", 0.0, 0.5),
        (8, "linear", 0.2, 0.6),
        (12, "linear", 0.2, 0.2),
        (8, "cosine", 0.0, 0.5),
        (6, "cosine", 0.0, 0.5 * (1 + math.sqrt(0.5))),
        (12, "cosine", 0.1, 0.1),
        (11, "constant", 0.0, 1.0),
        # sqrt(4 / 16)
        (15, "inverse_sqrt", 0.0, 0.5),
        (15, "inverse_sqrt", 0.7, 0.7),
    ],
)
def test_warmup_decay(step, schedule, floor, wanted):
    assert ops.warmup_decay(step, 12, 4, schedule, floor) == pytest.approx(wanted, abs=1e-12)


def test_warmup_decay_without_warmup_and_without_decay():
    assert ops.warmup_decay(0, 10, 0, "linear") == 1.0
    assert ops.warmup_decay(0, 10, 0, "inverse_sqrt") == 1.0
    assert ops.warmup_decay(3, 4, 4, "cosine") == 1.0
    with pytest.raises(ValueError, match="staircase"):
        ops.warmup_decay(5, 10, 0, "staircase")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k_max", [1, 3, 5, 8, 10, 15])
def test_samples_by_capability_rounds_halves_up(k_max, dtype):
    """clip(floor(k_max (1 - C) + 1/2), 1, k_max), worked in exact fractions for C = 0, .01, …, 1."""
    hundredths = range(101)
    wanted = [min(max(math.floor(k_max * (1 - Fraction(i, 100)) + Fraction(1, 2)), 1), k_max) for i in hundredths]
    c = torch.tensor([i / 100 for i in hundredths], dtype=dtype)
    assert ops.samples_by_capability(c, 1, k_max).tolist() == wanted


def test_rank_errors_name_the_argument():
    with pytest.raises(ValueError, match="logits must have rank 3"):
        ops.token_logprobs(torch.zeros(2, 3), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="ids must have rank 2"):
        ops.token_logprobs(torch.zeros(2, 3, 4), torch.zeros(6).long())
    with pytest.raises(ValueError, match="x must have rank 1"):
        ops.group_mean(torch.zeros(2, 2), torch.zeros(2).long())
    with pytest.raises(ValueError, match="scores must have rank 1"):
        ops.baseline("none", torch.zeros(2, 2), torch.zeros(2).long(), [])
