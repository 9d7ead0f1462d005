"""Pure tensor functions that several methods share. They check rank and dtype, then compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from alignkit.batch import Batch


def _rank(name: str, x: Tensor, rank: int) -> None:
    if x.dim() != rank:
        raise ValueError(f"{name} must have rank {rank}, has shape {tuple(x.shape)}")


def token_logprobs(logits: Tensor, ids: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Log-probabilities of ``ids``: logits (..., V), ids (...), temperature (...) that divides the logits → (...) float32.

    Works through the rows in chunks, back and forth, so that no second array of N × V numbers is held besides the
    logits and their gradient, and none in float32 where the logits are not.
    """
    _rank("logits", logits, ids.dim() + 1)
    scale = None if temperature is None else temperature.to(_wide(logits.dtype)).reciprocal().flatten()
    logprobs: Tensor = _TokenLogprobs.apply(logits.flatten(0, -2), ids.flatten(), scale)
    return logprobs.view_as(ids)


class _TokenLogprobs(torch.autograd.Function):
    """log p = x[id] - logsumexp(x) of x = logits * scale; d log p / d logits = scale * (onehot(id) - softmax(x))."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, scale: Tensor | None) -> Tensor:
        lse = torch.empty(len(ids), device=logits.device, dtype=_wide(logits.dtype))
        logprobs = torch.empty_like(lse)
        for part in _chunks(logits):
            x = logits[part].to(lse.dtype)
            x = x if scale is None else x * scale[part, None]
            lse[part] = x.logsumexp(-1)
            logprobs[part] = x.gather(-1, ids[part, None]).squeeze(-1) - lse[part]
        ctx.save_for_backward(logits, ids, lse, *([] if scale is None else [scale]))
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, lse, *scale = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for part in _chunks(logits):
            x = logits[part].to(lse.dtype)
            x = x - lse[part, None] if not scale else torch.addcmul(-lse[part, None], x, scale[0][part, None])
            up = upstream[part, None] * scale[0][part, None] if scale else upstream[part, None]
            grad[part] = x.exp_().mul_(-up).scatter_add_(-1, ids[part, None], up)
        return grad, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows whose logits fit a processor's cache (2 MB); on a GPU 64 times as many."""
    rows = max(1, (1 << 19) * (64 if logits.is_cuda else 1) // logits.shape[-1])
    return (slice(i, i + rows) for i in range(0, len(logits), rows))


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats over the last axis: (..., V) → (...)."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row over the tokens that count: (B, T), (B, T) bool → (B,). An empty row gives 0."""
    _rank("x", x, 2)
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """(B,) mean over the rows of the same group, for each row; groups are adjacent, sizes may differ."""
    _rank("x", x, 1)
    _, index, sizes = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    sums: Tensor = torch.zeros(len(sizes), dtype=x.dtype, device=x.device).index_add_(0, index, x)
    means: Tensor = (sums / sizes)[index]
    return means


def leave_one_out(x: Tensor, group: Tensor) -> Tensor:
    """(B,) mean of the *other* rows of the group (RLOO, arXiv 2402.14740). A group of one gets its own value,
    hence advantage zero. Equal values give exactly that value: means are taken of differences from the first."""
    _, index, sizes = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    n = sizes[index].to(x.dtype)
    first = x[sizes.cumsum(0) - sizes][index]
    apart = x - first
    others = first + (n * group_mean(apart, group) - apart) / (n - 1).clamp(min=1)
    return torch.where(n > 1, others, x)


def best_and_worst(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """((G,), (G,)) rows with the highest and the lowest score of each group, two different ones where there are two; the
    first among equals."""
    _, index, sizes = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    padded = torch.full((len(sizes), int(sizes.max())), math.nan, dtype=scores.dtype, device=scores.device)
    starts = sizes.cumsum(0) - sizes
    padded[index, torch.arange(len(scores), device=scores.device) - starts[index]] = scores
    best, worst = padded.nan_to_num(-math.inf).argmax(1), padded.nan_to_num(math.inf).argmin(1)
    worst = torch.where((worst == best) & (sizes > 1), (best + 1) % sizes, worst)
    return starts + best, starts + worst


def centred(x: Tensor, group: Tensor) -> Tensor:
    """(B,) less the mean of the row's group; exactly 0 for equal values, since the first is taken off before."""
    _, index, sizes = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    apart = x - x[sizes.cumsum(0) - sizes][index]
    return apart - group_mean(apart, group)


def group_std(x: Tensor, group: Tensor) -> Tensor:
    """(B,) sample standard deviation (ddof 1) over the rows of the same group, for each row; 0 for a group of one
    and exactly 0 for equal values."""
    _, index, sizes = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    n = sizes[index].to(x.dtype)
    std: Tensor = (group_mean(centred(x, group).square(), group) * n / (n - 1).clamp(min=1)).sqrt()
    return std


def moments(seen: list[float], new: Tensor) -> list[float]:
    """[number, mean, sum of squared deviations] of what was seen and of ``new`` (B,) together (Chan et al. 1979)."""
    n, mean, squares = seen
    m, x = len(new), new.double()
    apart = float(x.mean()) - mean
    whole = n + m
    return [whole, mean + apart * m / whole, squares + float((x - x.mean()).square().sum()) + apart**2 * n * m / whole]


def whiten(x: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """x (B, T) to mean 0 and sample variance 1 over the tokens that count; ``shift=False`` keeps the mean. 0 elsewhere."""
    _rank("x", x, 2)
    n = mask.sum()
    mean = (x * mask).sum() / n.clamp(min=1)
    variance = ((x - mean).square() * mask).sum() / (n - 1).clamp(min=1)
    white = (x - mean) * (variance + 1e-8).rsqrt()
    return (white if shift else white + mean) * mask


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(pi || ref) at each sampled token, elementwise, with d = log pi - log ref (Schulman's k1, k2, k3).

    ``k1`` d: unbiased as a value, no expected gradient as a loss; ``k2`` d²/2: the right gradient as a loss;
    ``k3`` exp(-d) + d - 1: unbiased and never negative.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return (-d).clamp(max=20).exp() + d - 1
    raise ValueError(f"the KL estimator must be k1, k2 or k3, not '{estimator}'")


def adapt_kl(coefficient: float, kl: float, target: float, n: int, horizon: int) -> float:
    """The controller of Ziegler et al. (arXiv 1909.08593): a proportional step towards ``target``, at most ±20 %, for n
    of ``horizon`` samples."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * n / horizon)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over right-padded rows: (B, T) each → advantages, returns (B, T).

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the end; A_t = delta_t + gamma lam A_{t+1}; returns = A + V.
    """
    _rank("rewards", rewards, 2)
    values = values * mask
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = (rewards + gamma * following - values) * mask
    advantages = torch.zeros_like(delta)
    ahead = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        ahead = delta[:, t] + gamma * lam * ahead
        advantages[:, t] = ahead
    return advantages, (advantages + values) * mask


def explained_variance(batch: Batch) -> float:
    """1 - Var(returns - values) / Var(returns) over the tokens that count: 1 is a perfect critic, 0 a constant one."""
    assert batch.returns is not None and batch.values is not None
    returns, values = batch.returns[batch.mask], batch.values[batch.mask]
    return float(1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8))


def overlong(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """(B,) DAPO's soft penalty (arXiv 2503.14476): 0 up to ``limit - buffer`` tokens, falling to -1 at ``limit``, -1 beyond."""
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


def released_capability(top: Tensor, mask: Tensor) -> Tensor:
    """(B,) C_rel = 1 + mean_t exp(q_t) q_t of the likeliest token's probability q (B, T), as ESRL's released code has it."""
    return 1 + masked_mean(top.exp() * top, mask)


def last_token(mask: Tensor) -> Tensor:
    """(B, T) bool, true at the last token that counts of each row."""
    return mask & (mask.sum(1, keepdim=True) == mask.cumsum(1))


# ---- macro actions (MA-RLHF, arXiv 2410.02743) --------------------------------------------------------------------


def macros(starts: Tensor, mask: Tensor) -> Tensor:
    """(B, T) int64 index of each token's macro action from bool ``starts`` (B, T) of macros; the last token that counts
    is always a macro of its own, so that averaging does not dilute the score; padding has the index of the last."""
    first = torch.zeros_like(mask)
    first[:, 0] = True
    return ((starts | last_token(mask)) & mask & ~first).long().cumsum(1)


def fixed_macros(mask: Tensor, n: int) -> Tensor:
    """Macros of n tokens, counted from the start of the response: n = 1 is token level."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return macros((place % n == 0).expand_as(mask), mask)


def perplexity_macros(ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """A macro starts where the reference model's token perplexity rises above that of the token before."""
    rises = torch.nn.functional.pad(ref_logprobs[:, 1:] < ref_logprobs[:, :-1], (1, 0))
    return macros(rises, mask)


def sized_macros(mask: Tensor, sizes: list[list[int]]) -> Tensor:
    """Macros of the given sizes, row by row; what is left over forms one last macro."""
    starts = torch.zeros_like(mask)
    for i, row in enumerate(sizes):
        ends = torch.tensor(row).cumsum(0)
        starts[i, ends[ends < mask.shape[1]].to(mask.device)] = True
    return macros(starts, mask)


def macro_sum(x: Tensor, macro: Tensor, mask: Tensor) -> Tensor:
    """(B, M) sums of x (B, T) over the tokens of each macro."""
    sums = torch.zeros(len(x), int(macro.max()) + 1, dtype=x.dtype, device=x.device)
    return sums.scatter_add_(1, macro, x * mask)


def macro_weights(macro: Tensor, mask: Tensor, kind: str, gamma: float) -> tuple[Tensor, Tensor]:
    """((B, T), (B, T)) share of each token in its macro's value, summing to 1 within a macro, and gamma^j of its j-th token.

    ``equal`` 1/n each; ``unit`` all on the last token; ``position`` 1, 1/2, 1/3 …, normalised.
    """
    starts = torch.nn.functional.pad(macro[:, 1:] != macro[:, :-1], (1, 0), value=True)
    place = torch.arange(macro.shape[1], device=macro.device).expand_as(macro)
    j = place - torch.where(starts, place, 0).cummax(1).values
    if kind == "unit":
        following = torch.nn.functional.pad(macro[:, 1:], (0, 1), value=-1)
        weights = ((following != macro) | last_token(mask)).float()
    else:
        weights = 1.0 / (j + 1) if kind == "position" else torch.ones_like(j, dtype=torch.float32)
    weights = weights * mask
    return weights / macro_sum(weights, macro, mask).gather(1, macro).clamp(min=1e-8), gamma ** j.float()


# ---- HL-Gauss critic (arXiv 2403.03950) ---------------------------------------------------------------------------


def hl_gauss_target(y: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """(..., m) mass that a Gaussian around y (...) puts on each bin between ``edges`` (m + 1,), normalised to the support.

    y is clamped to the support first: far outside, both numerator and denominator would vanish.
    """
    y = y.clamp(float(edges[0]), float(edges[-1]))
    cdf = torch.special.ndtr((edges - y[..., None]) / sigma)
    mass: Tensor = cdf.diff(dim=-1) / (cdf[..., -1:] - cdf[..., :1])
    return mass


def hl_gauss_value(logits: Tensor, edges: Tensor) -> Tensor:
    """(...) mean of the bins' centres under softmax(logits (..., m))."""
    return (logits.softmax(-1) * (edges[:-1] + edges[1:]) / 2).sum(-1)


# ---- schedules ----------------------------------------------------------------------------------------------------


def warmup_decay(step: int, steps: int, warmup: int, schedule: str, floor: float = 0.0) -> float:
    """Factor on the learning rate at ``step`` (0-based): linear warm-up over ``warmup`` steps, then constant,
    linear, cosine or inverse-square-root decay towards ``floor`` at ``steps``."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":
        return max(floor, math.sqrt(max(warmup, 1) / (step + 1)))
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return floor + (1 - floor) * (1 - done)
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    raise ValueError(f"unknown schedule '{schedule}'")


def scheduled(spec: dict[str, Any], step: int, steps: int) -> float:
    """Value at ``step`` (0-based) of ``{start, end, shape, steps}``: from start to end over ``steps`` (default: the run),
    linear, cosine, or exponential (start * (end / start)^share); constant at end afterwards."""
    share = min(1.0, step / max(1, (spec.get("steps") or steps) - 1))
    start, end = float(spec["start"]), float(spec["end"])
    shape = spec.get("shape", "linear")
    if shape == "linear":
        return start + (end - start) * share
    if shape == "cosine":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
    if shape == "exponential":
        return float(start * (end / start) ** share)
    raise ValueError(f"shape must be linear, cosine or exponential, not '{shape}'")


def fifo(queue: list[float], new: list[float], size: int) -> list[float]:
    """The last ``size`` rewards after pushing a step's: the oldest leave first (as in ESRL's released code)."""
    return [*queue, *new][-size:] if size else []


def baseline(kind: str, scores: Tensor, group: Tensor, queue: list[float]) -> Tensor:
    """(B,) what REINFORCE subtracts from scores (B,): ``none``, ``fifo`` (mean of the queue), ``batch`` (mean of the
    scores) or ``leave_one_out`` (mean of the other samples of the same prompt)."""
    _rank("scores", scores, 1)
    if kind == "none":
        return torch.zeros_like(scores)
    if kind == "fifo":
        return torch.full_like(scores, sum(queue) / max(1, len(queue)))
    if kind == "batch":
        return (scores[0] + (scores - scores[0]).mean()).expand_as(scores)  # exact for equal scores
    if kind == "leave_one_out":
        return leave_one_out(scores, group)
    raise ValueError(f"unknown baseline '{kind}'")


def samples_by_capability(c: Tensor, k_min: int, k_max: int) -> Tensor:
    """(n,) samples of each input: ``clip(floor(k_max (1 - C) + 0.5), k_min, k_max)``; alignkit's rule, not the paper's.

    Halves round up also where C was rounded to float32.
    """
    return (k_max * (1 - c.double()) + 0.5 + 1e-6).floor().clamp(k_min, k_max).long()


def temperature_by_capability(c: Tensor, tau_min: float, tau_max: float) -> Tensor:
    """(n,) temperature of each input: ``tau_min + (tau_max - tau_min) (1 - C)``; alignkit's rule, not the paper's."""
    return tau_min + (tau_max - tau_min) * (1 - c)


def log_odds(averages: Tensor) -> Tensor:
    """log(P / (1 - P)) of P = exp(a), elementwise, for a below 0 (arXiv 2403.07691)."""
    return averages - torch.log(-torch.expm1(averages.clamp(max=-1e-7)))


def length_ratio(ids: Tensor, mask: Tensor) -> Tensor:
    """How alike the two responses of each pair are in length (arXiv 2404.00978, released code): ids, mask (N, 2, T) → (N,).

    Both are measured from the first position at which they differ, end-of-sequence included: the shorter over the longer,
    in [0, 1]. Two equal responses are as alike as can be: 1 (the released code gives 0).
    """
    first, second = (torch.where(mask[:, i], ids[:, i], -1) for i in (0, 1))
    differ = first != second
    divergence = differ.long().argmax(1)
    lengths = mask.sum(2) - divergence[:, None]
    ratio = lengths.amin(1) / lengths.amax(1).clamp(min=1)
    return torch.where(differ.any(1), ratio, torch.ones_like(ratio))


def angular(cosine: Tensor) -> Tensor:
    """Similarity in [1/2, 1] from a cosine cut to [0, 1]: (pi - arccos c) / pi (arXiv 2404.00978, released code)."""
    return 1 - torch.arccos(cosine.clamp(0, 1)) / torch.pi


def ceiling(similarity: Tensor, beta1: float, beta2: float, beta3: float) -> Tensor:
    """delta* = beta1 / (s + beta2) + beta3: the soft upper limit of a pair's margin (arXiv 2404.00978, released code)."""
    return beta1 / (similarity + beta2) + beta3
