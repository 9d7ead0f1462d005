"""What a method brings that finds out, over repeated trainings of a student, how much each kind of knowledge should count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from alignkit import ops
from alignkit.algos._distill import Distill
from alignkit.data import Row
from alignkit.errors import UserError, need

CHUNK = 512  # held-out rows that are read at a time


@dataclass(kw_only=True)
class Select(Distill):
    """Settings of the repeated student trainings: the student's own are those of stage ``distill``, of every episode anew."""

    loss_scale: Literal["none", "init_mean"] = "init_mean"
    phases: int = 10  # parts of an episode; held-out loss is measured at the end of each
    reward_rows: int | None = None  # at most so many dev rows give the reward; null: half of them

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "phases >= 1", "reward_rows >= 1")

    @property
    def episodes_(self) -> int:
        """Student trainings."""
        raise NotImplementedError

    def phase_ends(self, steps: int) -> list[int]:
        """Number of steps after which each phase of an episode of ``steps`` ends.

        Raises:
            UserError: more phases than steps.
        """
        if self.phases > steps:
            raise UserError(f"algo.phases={self.phases}: an episode has only {steps} steps.")
        return [(p + 1) * steps // self.phases for p in range(self.phases)]

    def start(self, student: Any, seed: int) -> None:
        """Make what is learned, before the first episode or before ``load_tensors``."""

    def begin_episode(self, episode: int, episodes: int) -> None:
        """The student is as at its beginning again."""
        self._sums, self._steps = [0.0] * 4, 0

    def end_phase(self, before: float, after: float, last: bool, generator: torch.Generator) -> dict[str, float]:
        """Learn from a phase in which the held-out loss went from ``before`` to ``after``; what is to be logged.

        Args:
            last: the episode ends with it.
        """
        return {}

    def selector(self) -> Any:
        """What would choose now: has ``save``."""
        raise NotImplementedError

    def keep(self) -> None:
        """The episode that has just ended is the best so far: remember the selector."""

    def tensors(self) -> dict[str, Any]:
        """What of the state is no JSON: tensors, in dicts and lists."""
        return {}

    def load_tensors(self, found: dict[str, Any]) -> None:
        """Take back what ``tensors`` gave."""

    @torch.no_grad()
    def held_out_loss(self, student: Any, rows: list[Row]) -> float:
        """Mean cross-entropy of the rows' responses, nats a position."""
        total, count = 0.0, 0.0
        collate = self.collate(student)
        with student._evaluating():
            for first in range(0, len(rows), CHUNK):
                for part in collate(rows[first : first + CHUNK]).split(2 * self.micro_tokens):
                    found = ops.token_logprobs(student.seen(part).logits, part.response_ids[part.mask])
                    total, count = total - float(found.double().sum()), count + float(part.mask.sum())
        return total / count
