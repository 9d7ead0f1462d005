"""A weighted sum of rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alignkit.batch import Batch
from alignkit.rewards import scores_of


@dataclass(kw_only=True)
class Mix:
    """Weighted sum of named rewards."""

    rewards: dict[str, Any]  # name → reward
    weights: dict[str, float]  # name → weight

    def __post_init__(self) -> None:
        if set(self.rewards) != set(self.weights):
            raise ValueError(
                f"rewards ({', '.join(self.rewards)}) and weights ({', '.join(self.weights)}) name different parts"
            )

    def __call__(self, batch: Batch) -> Tensor:
        parts = [weight * scores_of(self.rewards[name], batch) for name, weight in self.weights.items()]
        return sum(parts[1:], parts[0])
