"""A weighted sum of rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alignkit.batch import Batch
from alignkit.ops import last_token
from alignkit.rewards import judged


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
        """(B,); (B, T) where a part is a token's, with the others at the last token."""
        found = {name: judged(reward, batch) for name, reward in self.rewards.items()}
        tokens = any("token_scores" in part.extra for part in found.values())
        parts = [self.weights[name] * _given(part, tokens) for name, part in found.items()]
        return sum(parts[1:], parts[0])


def _given(part: Batch, tokens: bool) -> Tensor:
    assert part.scores is not None
    found = part.extra.get("token_scores", last_token(part.mask) * part.scores[:, None])
    return found if tokens else part.scores
