"""Distillation with a selector that was learned before: stage B of knowledge selection."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import selector
from alignkit.algos._distill import Distill
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import UserError
from alignkit.selector import Constant


@dataclass(kw_only=True)
class Selected(Distill):
    """Distil a fresh student with a frozen selector: of ``+algo=ksm`` (stage B of arXiv 2302.00444), or the best constant mixture
    of ``+algo=constant_grid``. No noise, no exploration, no held-out loss: it draws nothing."""

    selector: str  # run of stage select, or the folder of a selector
    loss_scale: Literal["none", "init_mean"] = "init_mean"

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        self._selector = selector.load(self.selector)
        if isinstance(self._selector, Constant):
            self.fixed = tuple(self._selector.of)  # type: ignore[misc,assignment]
        learned = selector.losses_of(self.selector)
        apart = [f"algo.{k}={v}" for k, v in learned.items() if self.losses().get(k) != v]
        if apart:
            raise UserError(
                f"algo.selector={self.selector}: was learned with {', '.join(apart)}; with other losses its weights would mean "
                f"something else. Give the same."
            )
        return super().prepare(rows, sides)

    def build(self, cfg: Any, seed: int, texts: list[str], checkpoint: Any) -> Any:
        student = super().build(cfg, seed, texts, checkpoint)
        if not isinstance(self._selector, Constant):
            shape, widths = self._selector.shape, (student.width, self.teacher_model.width)
            if (shape.student, shape.teacher) != widths:
                raise UserError(
                    f"algo.selector={self.selector}: was trained for a student and a teacher of width {shape.student} and "
                    f"{shape.teacher}; these have {widths[0]} and {widths[1]}."
                )
        return student

    def spent(self) -> dict[str, float]:
        folder = Path(self.selector).expanduser().resolve()
        file = (folder.parent if folder.name == "final" else folder) / "result.json"
        if not file.is_file():  # a selector that was moved away from its run
            return super().spent()
        found = json.loads(file.read_text(encoding="utf-8"))
        return {**{k: found[k] for k in ("student_runs", "steps")}, "seconds": sum(found["seconds"].values())}

    def weigh(self, student: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        if isinstance(self._selector, Constant):
            return super().weigh(student, batch, generator)
        return self._selector.weights(*self.states(student, batch))
