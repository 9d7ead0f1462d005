"""Heads of reward models: from hidden states to outputs, from outputs to a score and to the margin of a pair.

A head is settings and pure functions; the weights are what ``build`` gives. It knows neither its loss nor its data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Head:
    """What a reward model asks of its head."""

    @property
    def outputs(self) -> int:
        """k, the numbers that are put out for a response."""
        raise NotImplementedError

    def build(self, width: int) -> torch.nn.Module:
        """Weights that take states (..., width) to outputs (..., k): a linear map, of deviation 1 / sqrt(width + 1)."""
        linear = torch.nn.Linear(width, self.outputs, bias=False)
        torch.nn.init.normal_(linear.weight, std=(width + 1) ** -0.5)
        return linear

    def scores(self, z: Tensor) -> Tensor:
        """Outputs (..., k) → scores (...)."""
        raise NotImplementedError

    def margins(self, a: Tensor, b: Tensor) -> Tensor:
        """(N,) log-odds that the response with outputs a (N, k) is better than that with b (N, k)."""
        return self.scores(a) - self.scores(b)


@dataclass(kw_only=True)
class Scalar(Head):
    """One number a response."""

    @property
    def outputs(self) -> int:
        return 1

    def scores(self, z: Tensor) -> Tensor:
        return z.squeeze(-1)


@dataclass(kw_only=True)
class Attributes(Head):
    """One rating an attribute; the score is their weighted sum (HelpSteer2, arXiv 2406.08673)."""

    names: list[str]  # of the attributes, as in the data's ratings
    weights: list[float]  # of each in the score

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.weights) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"head.names ({', '.join(self.names)}) must be different names, one for each of the "
                f"{len(self.weights)} head.weights"
            )

    @property
    def outputs(self) -> int:
        return len(self.names)

    def scores(self, z: Tensor) -> Tensor:
        return z @ torch.tensor(list(self.weights), dtype=z.dtype, device=z.device)
