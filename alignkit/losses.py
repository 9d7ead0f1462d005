"""Pure loss functions. Each returns a sum and what to divide it by; none of them divides."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.batch import Loss


def nll(logprobs: Tensor, mask: Tensor, normalize: str = "tokens") -> Loss:
    """Negative log-likelihood: logprobs (B, T), mask (B, T) bool.

    ``normalize``: ``tokens`` (mean over tokens) or ``sequences`` (mean over rows of the summed token losses).
    """
    total = -(logprobs * mask).sum()
    tokens = float(mask.sum())
    count = {"tokens": tokens, "sequences": float(len(mask))}[normalize]
    return Loss(total, count, {"nll": float(total.detach()) / max(tokens, 1.0)})


def policy_gradient(logprobs: Tensor, advantages: Tensor, mask: Tensor, group: Tensor, normalize: str) -> Loss:
    """REINFORCE: ``-sum_t A_t log pi(y_t)``; logprobs, advantages, mask (B, T), group (B,) adjacent ids.

    ``normalize`` says what one unit of the mean is:
    ``groups``     each prompt counts once, its k samples 1/k each (esrl card, F2);
    ``sequences``  each response counts once, so prompts with many samples weigh more;
    ``tokens``     each token counts once.
    """
    per_row = -(advantages.detach() * logprobs * mask).sum(1)
    _, index, sizes = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    if normalize == "groups":
        total, count = (per_row / sizes[index]).sum(), float(len(sizes))
    elif normalize == "sequences":
        total, count = per_row.sum(), float(len(per_row))
    elif normalize == "tokens":
        total, count = per_row.sum(), float(mask.sum())
    else:
        raise ValueError(f"normalize must be groups, sequences or tokens, not '{normalize}'")
    return Loss(total, count)
