"""The fair opponent of a learned selection: as many student trainings, each with another constant mixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignkit.algos._distill import KNOWLEDGE
from alignkit.algos._select import Select
from alignkit.batch import Batch
from alignkit.selector import Constant


def _grid() -> list[list[float]]:
    """20 mixtures, the first 12 a coarse grid: the labels or the teacher alone, pairs, threes, all."""
    return [
        [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1],
        [1, 1, 1, 0], [0, 1, 1, 1], [0.3, 1, 0, 0], [0.3, 1, 1, 0], [0, 1, 1, 0], [1, 1, 0.3, 0.3],
        [1, 0.3, 0, 0], [1, 1, 0.3, 0], [1, 1, 0, 0.3], [1, 1, 0, 1], [0, 1, 0, 1], [0.3, 1, 0.3, 0.3],
        [0.3, 1, 1, 1], [1, 0, 1, 1],
    ]  # fmt: skip


@dataclass(kw_only=True)
class ConstantGrid(Select):
    """The best of a grid of constant mixtures, by the loss on held-out rows: what a learned selection such as KSM must beat at
    the same number of student trainings (ours).

    ``+algo=selected algo.selector=RUN`` then distils with the best mixture.
    """

    grid: list[list[float]] = field(default_factory=_grid)  # weights of finetune, response, feature, relation knowledge

    def __post_init__(self) -> None:
        super().__post_init__()
        for point in self.grid or [[]]:
            if len(point) != 4 or min(point) < 0 or not any(point):
                raise ValueError(
                    f"grid: each point must be four numbers of 0 or more, not all 0 ({', '.join(KNOWLEDGE)}), is {point}"
                )

    @property
    def episodes_(self) -> int:
        return len(self.grid)

    def start(self, student: Any, seed: int) -> None:
        self._now = self._best = 0

    def begin_episode(self, episode: int, episodes: int) -> None:
        super().begin_episode(episode, episodes)
        self._use(episode)

    def _use(self, point: int) -> None:
        self._now = point
        self.fixed = tuple(float(w) for w in self.grid[point])  # type: ignore[misc,assignment]  # the rest is not computed

    def weigh(self, student: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        return torch.tensor([float(w) for w in self.grid[self._now]])

    def selector(self) -> Constant:
        return Constant([float(w) for w in self.grid[self._best]])

    def keep(self) -> None:
        self._best = self._now

    def state(self) -> dict[str, object]:
        return {**super().state(), "now": self._now, "best": self._best}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._use(int(state["now"]))
        self._best = int(state["best"])
