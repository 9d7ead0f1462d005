"""Tensor functions against numbers worked by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit import ops

RAGGED = torch.tensor([0, 0, 0, 3, 1, 1])  # ids need not be in order, only adjacent

RAGGED = torch.tensor([0, 0, 0, 3, 1, 1])
rows_of_rewards = st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=1, max_size=4)


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
    with pytest.raises(ValueError, match="logits must have rank 2"):
        ops.token_logprobs(torch.zeros(2, 3, 4), torch.zeros(6).long())
    with pytest.raises(ValueError, match="x must have rank 1"):
        ops.group_mean(torch.zeros(2, 2), torch.zeros(2).long())
    with pytest.raises(ValueError, match="scores must have rank 1"):
        ops.baseline("none", torch.zeros(2, 2), torch.zeros(2).long(), [])


# ---- log-probabilities with a temperature, and their gradient ---------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("rows", [6, 3000])  # 3000 rows of 300 numbers are more than are worked on at a time
def test_token_logprobs_are_log_softmax(dtype, tolerance, tempered, rows):
    """Values and gradient of log_softmax(logits / tau) at the ids, worked in float64; the gradient has the logits' type."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, 300, generator=generator)).to(dtype).requires_grad_()
    ids = torch.randint(300, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    tau = 0.5 + torch.rand(rows, generator=generator) if tempered else None
    found = ops.token_logprobs(logits, ids, tau)
    found.backward(upstream.to(found.dtype))

    exact = logits.detach().double().requires_grad_()
    scaled = exact if tau is None else exact / tau[:, None].double()
    wanted = scaled.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    wanted.backward(upstream.double())
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)


def test_token_logprobs_leave_the_logits_alone():
    """Neither pass writes into the logits: the graph of others may need them."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        before = logits.detach().clone()
        ops.token_logprobs(logits, torch.tensor([0, 1, 2, 3])).sum().backward()
        assert torch.equal(logits.detach(), before)


def test_temperature_of_each_row():
    """p = (.8, .2): at tau 1/2 squares, .64 / .68; at tau 1 as it is."""
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
    found = ops.token_logprobs(logits, torch.tensor([0, 0]), torch.tensor([0.5, 1.0]))
    close(found, [math.log(0.64 / 0.68), math.log(0.8)])


# ---- KL, groups, shaping ----------------------------------------------------------------------------------------------


def test_kl_estimators():
    """baselines.md, "Shared definitions": .5 → .5, .125, .106531; -.5 → -.5, .125, .148721; nothing where pi = ref."""
    logprobs, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.5, -3.0])
    close(ops.kl(logprobs, ref, "k1"), [0.5, -0.5, 0.0])
    close(ops.kl(logprobs, ref, "k2"), [0.125, 0.125, 0.0])
    close(ops.kl(logprobs, ref, "k3"), [0.106531, 0.148721, 0.0])
    with pytest.raises(ValueError, match="k4"):
        ops.kl(logprobs, ref, "k4")


def test_kl_estimators_in_expectation():
    """p = (.7, .2, .1) against uniform: k1 and k3 have KL(p || ref) as their mean; k3 is never negative. As losses k1 has
    no expected gradient, k2 that of the KL."""
    logits = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log().requires_grad_()
    ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    p = logp.exp()
    true = (p * (logp - ref)).sum()
    for kind in ("k1", "k3"):
        assert float((p * ops.kl(logp, ref, kind)).sum().detach()) == pytest.approx(float(true.detach()))
    assert (ops.kl(logp, ref, "k3") >= 0).all()
    (wanted,) = torch.autograd.grad(true, logits, retain_graph=True)
    grads = {
        k: torch.autograd.grad((p.detach() * ops.kl(logp, ref, k)).sum(), logits, retain_graph=True)[0]
        for k in ("k1", "k2")
    }
    close(grads["k1"], [0.0] * 3, 1e-12)
    close(grads["k2"], wanted.tolist(), 1e-12)


def test_group_std_has_ddof_1():
    """(1, 2, 6), mean 3: (4 + 1 + 9) / 2 = 7; a group of one: 0; (10, 20): 50."""
    close(ops.group_std(torch.tensor([1.0, 2, 6, 5, 10, 20]), RAGGED), [7**0.5] * 3 + [0.0] + [50**0.5] * 2)


def test_centred():
    close(ops.centred(torch.tensor([1.0, 2, 6, 5, 10, 20]), RAGGED), [-2.0, -1, 3, 0, -5, 5])


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("value", [0.1, 0.7, -123.456])
def test_equal_values_have_exactly_no_spread(n, value):
    x, group = torch.full((2 * n,), value), torch.arange(2).repeat_interleave(n)
    assert (ops.centred(x, group) == 0).all()
    assert (ops.group_std(x, group) == 0).all()


def test_best_and_worst():
    """Groups (1, 6, 2), (5), (20, 10): rows 1 and 0, 3 and 3, 4 and 5; the first among equals; infinities are values."""
    best, worst = ops.best_and_worst(torch.tensor([1.0, 6, 2, 5, 20, 10]), RAGGED)
    assert (best.tolist(), worst.tolist()) == ([1, 3, 4], [0, 3, 5])
    best, worst = ops.best_and_worst(torch.tensor([2.0, 2, 2, 7, 7, 0]), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert (best.tolist(), worst.tolist()) == ([0, 3], [1, 5])
    best, worst = ops.best_and_worst(torch.tensor([-5.0, -3, -4, -1, -2]), torch.tensor([0, 0, 0, 1, 1]))
    assert (best.tolist(), worst.tolist()) == ([1, 3], [0, 4])


def test_overlong():
    """baselines.md: L_max 20480, c 4096: 16000 → 0, 16384 → 0, 18432 → -.5, 20480 → -1, 21000 → -1."""
    lengths = torch.tensor([16000, 16384, 18432, 20480, 21000])
    close(ops.overlong(lengths, 20480, 4096), [0.0, 0.0, -0.5, -1.0, -1.0])


def test_whiten():
    """(1, 2 | 6), mean 3, variance 7 with ddof 1; masked cells stay 0 and do not count."""
    x = torch.tensor([[1.0, 2.0, 50.0], [6.0, 50.0, 50.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    std = 7**0.5
    close(ops.whiten(x, mask), [[-2 / std, -1 / std, 0.0], [3 / std, 0.0, 0.0]])
    close(ops.whiten(x, mask, shift=False), [[-2 / std + 3, -1 / std + 3, 0.0], [3 / std + 3, 0.0, 0.0]])
    assert (ops.whiten(torch.zeros(2, 3), mask) == 0).all()
    assert (ops.whiten(torch.ones(1, 1), torch.ones(1, 1).bool()) == 0).all()


@pytest.mark.parametrize(
    ("shape", "step", "wanted"),
    [
        # from 1 to .01 over steps 0 to 10; then constant
        ("linear", 0, 1.0),
        ("linear", 5, 0.505),
        ("linear", 10, 0.01),
        ("linear", 99, 0.01),
        ("cosine", 5, 0.505),
        ("cosine", 2, 0.01 + 0.99 * (1 + math.cos(math.pi / 5)) / 2),
        ("cosine", 10, 0.01),
        ("exponential", 0, 1.0),
        ("exponential", 5, 0.1),
        ("exponential", 10, 0.01),
        ("exponential", 50, 0.01),
    ],
)
def test_scheduled(shape, step, wanted):
    assert ops.scheduled({"start": 1.0, "end": 0.01, "shape": shape, "steps": 11}, step, 100) == pytest.approx(wanted)


def test_scheduled_over_the_run():
    """Linear and over all steps where nothing else is said: the last step has the end value; one step has the start."""
    spec = {"start": 0.0, "end": 4.0}
    assert [ops.scheduled(spec, step, 5) for step in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert ops.scheduled(spec, 0, 1) == 0.0
    with pytest.raises(ValueError, match="staircase"):
        ops.scheduled({**spec, "shape": "staircase"}, 0, 5)


def mask_of(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_gae_vector():
    """Baselines card, PPO: r = (-.05, .02, .99), V = (.2, .4, .6), gamma 1, lambda .95."""
    rewards, values = torch.tensor([[-0.05, 0.02, 0.99]]), torch.tensor([[0.2, 0.4, 0.6]])
    advantages, returns = ops.gae(rewards, values, mask_of(3), 1.0, 0.95)
    close(advantages, [[0.710975, 0.5905, 0.39]])
    close(returns, [[0.910975, 0.9905, 0.99]])


def test_gae_discounts():
    """gamma .5, lambda .5: A_2 = 2 - 1 = 1; A_1 = 1 + .5 * 1 - 3 + .25 * 1 = -1.25; returns 1.75 and 2."""
    advantages, returns = ops.gae(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]), mask_of(2), 0.5, 0.5)
    close(advantages, [[-1.25, 1.0]])
    close(returns, [[1.75, 2.0]])


def test_gae_of_ragged_rows():
    """Whatever stands behind a response, in values or rewards, a row is what it is alone; padding gets 0."""
    rewards, values = (
        torch.tensor([[1.0, 2.0, 99.0], [1.0, 2.0, 3.0]]),
        torch.tensor([[3.0, 1.0, 88.0], [1.0, 1.0, 1.0]]),
    )
    advantages, returns = ops.gae(rewards, values, mask_of(2, 3), 0.5, 0.5)
    close(advantages[0], [-1.25, 1.0, 0.0])
    close(returns[0], [1.75, 2.0, 0.0])
    alone = ops.gae(rewards[1:], values[1:], mask_of(3), 0.5, 0.5)
    assert torch.equal(advantages[1:], alone[0])
    assert torch.equal(returns[1:], alone[1])


def test_gae_at_the_ends():
    """lambda 0 is the temporal difference, gamma 0 the reward less the value."""
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    close(ops.gae(rewards, values, mask_of(2), 1.0, 0.0)[0], [[1.0 + 1.0 - 3.0, 1.0]])
    close(ops.gae(rewards, values, mask_of(2), 0.0, 1.0)[0], [[-2.0, 1.0]])


def ragged_tensor(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = mask_of(*(len(r) for r in rows))
    out = torch.full(mask.shape, 7.0, dtype=torch.float64)
    out[mask] = torch.tensor([v for r in rows for v in r], dtype=torch.float64)
    return out, mask


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows_of_rewards, st.floats(0, 1), st.integers(0, 5))
def test_gae_with_lambda_one(rows, gamma, seed):
    """The returns are the discounted sums of rewards, whatever the values, and advantages what is above the value."""
    rewards, mask = ragged_tensor(rows)
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    advantages, returns = ops.gae(rewards, values, mask, gamma, 1.0)
    for i, row in enumerate(rows):
        wanted = [sum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))]
        close(returns[i, : len(row)], wanted, 1e-9)
        close(advantages[i, : len(row)], [w - v for w, v in zip(wanted, values[i].tolist(), strict=False)], 1e-9)


def test_whiten_again():
    """(1, 3), (2, 2): mean 2, sample variance 2 / 3; padding is 0 and does not count."""
    x = torch.tensor([[1.0, 3.0, 50.0], [2.0, 2.0, -50.0]])
    found = ops.whiten(x, mask_of(2, 2, 3)[:2])
    step = math.sqrt(3 / 2)
    close(found, [[-step, step, 0.0], [0.0, 0.0, 0.0]], 1e-5)
    close(ops.whiten(x, mask_of(2, 2, 3)[:2], shift=False), [[2 - step, 2 + step, 0.0], [2.0, 2.0, 0.0]], 1e-5)


@pytest.mark.parametrize("x", [[[0.3]], [[0.7, 0.7, 0.7]]])
def test_whiten_without_a_spread_is_zero(x):
    """One token, or equal ones: no NaN and no noise to blow up."""
    x = torch.tensor(x)
    assert float(ops.whiten(x, torch.ones_like(x).bool()).abs().max()) < 1e-2


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows_of_rewards)
def test_whiten_properties(rows):
    x, mask = ragged_tensor(rows)
    found = ops.whiten(x, mask)
    assert (found[~mask] == 0).all()
    kept = found[mask]
    assert abs(float(kept.mean())) < 1e-6
    if len(kept) > 1 and float(x[mask].std()) > 0.1:
        assert float(kept.std()) == pytest.approx(1.0, abs=1e-4)


def test_explained_variance(make_batch):
    """Returns (1, 2, 3, 4) have variance 1.25; exact values 1, a constant 0, values 2 off by ± .5: 1 - .25 / 1.25 = .8."""
    batch = make_batch([1, 1], [3, 1])
    returns = torch.tensor([[1.0, 2, 3], [4, 99, 99]])
    for values, wanted in [
        ([[1.0, 2, 3], [4, 0, 0]], 1.0),
        ([[7.0, 7, 7], [7, 0, 0]], 0.0),
        ([[11.0, 12, 13], [14, 0, 0]], 1.0),  # a bias is no variance
        ([[1.5, 1.5, 3.5], [3.5, 0, 0]], 0.8),
        ([[4.0, 3, 2], [1, 0, 0]], -3.0),
    ]:
        found = ops.explained_variance(batch.with_(returns=returns, values=torch.tensor(values)))
        assert found == pytest.approx(wanted, abs=1e-6)


def test_last_token():
    assert ops.last_token(mask_of(1, 3)).tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize(
    ("d", "wanted"), [(0.5, (0.5, 0.125, 0.106531)), (-0.5, (-0.5, 0.125, 0.148721)), (0.0, (0, 0, 0))]
)
def test_kl_estimators_again(d, wanted):
    """Baselines card: k1, k2 and k3 of one log-ratio."""
    found = [float(ops.kl(torch.tensor([[d - 1.0]]), torch.tensor([[-1.0]]), k)) for k in ("k1", "k2", "k3")]
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [(9.0, 0.201024), (6.0, 0.2), (6.3, 0.2 * (1 + 0.05 * 0.0256)), (0.0, 0.2 * (1 - 0.2 * 0.0256)), (-9.0, 0.198976)],
)
def test_adapt_kl(kl, wanted):
    """Baselines card: .2 at KL 9, target 6, n 256, horizon 10 000 becomes .201024; the error is within ± .2."""
    assert ops.adapt_kl(0.2, kl, 6.0, 256, 10_000) == pytest.approx(wanted, abs=1e-9)


def sizes_of(macro: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [m[k].unique_consecutive(return_counts=True)[1].tolist() for m, k in zip(macro, mask, strict=True)]


@pytest.mark.parametrize(
    ("lengths", "n", "wanted"),
    [
        ((8,), 3, [[3, 3, 1, 1]]),  # card E1
        ((7,), 3, [[3, 3, 1]]),  # card E2, without the empty macro
        ((1, 2, 3, 4), 1, [[1], [1, 1], [1, 1, 1], [1, 1, 1, 1]]),
        ((1, 2, 3, 4), 3, [[1], [1, 1], [2, 1], [3, 1]]),
        ((5, 9), 100, [[4, 1], [8, 1]]),
    ],
)
def test_fixed_macros(lengths, n, wanted):
    mask = mask_of(*lengths)
    assert sizes_of(ops.fixed_macros(mask, n), mask) == wanted


def test_perplexity_macros():
    """Card E4: cuts at the rising tokens 3 and 5, then the last; a fall to the padding's 0 starts none."""
    perplexity = torch.tensor([[5, 3, 2, 4, 3.5, 6, 1, 1], [2, 2, 2, 3, 1, 1, 1, 1]])
    mask = mask_of(7, 5, 8)[:2]
    assert sizes_of(ops.perplexity_macros(-perplexity.log() * mask, mask), mask) == [[3, 2, 1, 1], [3, 1, 1]]


def test_sized_macros():
    """What is left over forms one macro; a list longer than the response is cut."""
    mask = mask_of(8, 5, 1)
    found = ops.sized_macros(mask, [[2, 3], [1, 1, 10], [5]])
    assert sizes_of(found, mask) == [[2, 3, 2, 1], [1, 1, 2, 1], [1]]


def test_macro_sum():
    """Rows of 3 and 2 tokens: (1 + 2), 3 and 4, 5; the padding's 9 is in no macro."""
    mask = mask_of(3, 2)
    macro = ops.fixed_macros(mask, 2)
    assert ops.macro_sum(torch.tensor([[1.0, 2, 3], [4, 5, 9]]), macro, mask).tolist() == [[3, 3], [4, 5]]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("equal", [1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1]),
        ("unit", [0, 0, 1, 0, 1, 1]),
        ("position", [6 / 11, 3 / 11, 2 / 11, 2 / 3, 1 / 3, 1]),  # 1, 1/2, 1/3 over 11/6; 1, 1/2 over 3/2
    ],
)
def test_macro_weights(kind, wanted):
    mask = mask_of(6)
    weights, discount = ops.macro_weights(ops.fixed_macros(mask, 3), mask, kind, 0.5)
    close(weights, [wanted])
    close(discount, [[1, 0.5, 0.25, 1, 0.5, 1]])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 99))
def test_macro_properties(lengths, n, seed):
    """Ids start at 0 and never skip, the last token is alone, and weights sum to 1 within each macro."""
    mask, generator = mask_of(*lengths), torch.Generator().manual_seed(seed)
    reference = -torch.rand(mask.shape, generator=generator) * mask
    sizes = [torch.randint(1, 6, (5,), generator=generator).tolist() for _ in lengths]
    starts = torch.rand(mask.shape, generator=generator) < 0.4
    for macro in (
        ops.fixed_macros(mask, n),
        ops.perplexity_macros(reference, mask),
        ops.sized_macros(mask, sizes),
        ops.macros(starts, mask),
    ):
        for row, length in zip(macro.tolist(), lengths, strict=True):
            ids = row[:length]
            assert ids[0] == 0
            assert all(b - a in (0, 1) for a, b in pairwise(ids))
            assert ids.count(ids[-1]) == 1
        count = ops.macro_sum(torch.ones(mask.shape), macro, mask)
        for kind in ("equal", "unit", "position"):
            weights, discount = ops.macro_weights(macro, mask, kind, 0.9)
            assert (weights[~mask] == 0).all()
            close(ops.macro_sum(weights, macro, mask), (count > 0).float().tolist())
            same = ops.macro_sum(torch.full(mask.shape, 3.5) * weights, macro, mask)
            close(same[count > 0], [3.5] * int((count > 0).sum()), 1e-5)
            close(discount[mask & ops.last_token(mask)], [1.0] * len(lengths))


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        # from step 0 to step 4, the last of five
        ({"start": 1.0, "end": 0.0}, {0: 1.0, 1: 0.75, 2: 0.5, 4: 0.0}),
        ({"start": 0.0, "end": 1.0, "shape": "linear"}, {0: 0.0, 1: 0.25, 4: 1.0}),
        ({"start": 1.0, "end": 0.0, "shape": "cosine"}, {0: 1.0, 1: 0.5 + 0.5 * math.sqrt(0.5), 2: 0.5, 4: 0.0}),
        ({"start": 0.16, "end": 0.01, "shape": "exponential"}, {0: 0.16, 1: 0.08, 2: 0.04, 3: 0.02, 4: 0.01}),
        # over its own steps, then constant: an exponential decay with a floor
        ({"start": 0.4, "end": 0.1, "shape": "exponential", "steps": 3}, {0: 0.4, 1: 0.2, 2: 0.1, 3: 0.1, 99: 0.1}),
        ({"start": 1.0, "end": 0.5, "steps": 2}, {0: 1.0, 1: 0.5, 2: 0.5, 4: 0.5}),
        ({"start": 1.0, "end": 0.5, "shape": "cosine", "steps": 3}, {1: 0.75, 2: 0.5, 50: 0.5}),
        ({"start": 0.3, "end": 0.3}, {0: 0.3, 3: 0.3, 9: 0.3}),
    ],
)
def test_scheduled_again(spec, values):
    for step, wanted in values.items():
        assert ops.scheduled(spec, step, 5) == pytest.approx(wanted, abs=1e-9), step


def test_scheduled_in_a_run_of_one_step():
    assert ops.scheduled({"start": 0.3, "end": 0.1}, 0, 1) == 0.3


def test_scheduled_of_an_unknown_shape():
    with pytest.raises(ValueError, match="staircase"):
        ops.scheduled({"start": 1.0, "end": 0.0, "shape": "staircase"}, 0, 5)
