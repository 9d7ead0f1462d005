"""Pure tensor functions that several methods share. They check rank and dtype, then compute."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _rank(name: str, x: Tensor, rank: int) -> None:
    if x.dim() != rank:
        raise ValueError(f"{name} must have rank {rank}, has shape {tuple(x.shape)}")


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of ``ids``: logits (B, T, V), ids (B, T) → (B, T) float32.

    The fused cross-entropy makes fewer passes over the vocabulary, back and forth, than a log-softmax and a gather.
    """
    _rank("logits", logits, 3)
    _rank("ids", ids, 2)
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
    logprobs: Tensor = -flat.view_as(ids)
    return logprobs


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


def fifo(queue: list[float], new: list[float], size: int) -> list[float]:
    """The last ``size`` rewards after pushing a step's: the oldest leave first (esrl card, F3)."""
    return [*queue, *new][-size:]


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
