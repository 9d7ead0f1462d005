"""Four kinds of knowledge in a mixture that stays."""

from __future__ import annotations

from dataclasses import dataclass, field

from alignkit.algos._distill import KNOWLEDGE, Distill


@dataclass(kw_only=True)
class ConstantMix(Distill):
    """A constant mixture of the four kinds of knowledge: any point of the grid that a learned selection must beat (ours)."""

    weights: list[float] = field(
        default_factory=lambda: [1.0, 1.0, 1.0, 1.0]
    )  # of finetune, response, feature and relation knowledge

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.weights) != 4 or min(self.weights) < 0 or not any(self.weights):
            raise ValueError(
                f"weights: must be four numbers of 0 or more, not all 0 ({', '.join(KNOWLEDGE)}), is {self.weights}"
            )
        self.fixed = tuple(float(w) for w in self.weights)  # type: ignore[misc,assignment]
