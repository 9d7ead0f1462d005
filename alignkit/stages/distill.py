"""Stage ``distill``: a student learns from labels and from a frozen teacher; a classifier, or a model that writes."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit.algos._distill import Distill
from alignkit.classifier import Classifier
from alignkit.data import Data, Row
from alignkit.run import Run
from alignkit.stages.evaluate import HeldOut
from alignkit.stages.evaluate_classes import HeldOutClasses
from alignkit.stages.fit import fit


def run(cfg: DictConfig, run: Run, data: Data, algo: Distill, reward: Any) -> dict[str, Any]:
    """Train on the training rows; measure held-out ones now and then on dev, and at the end on test."""
    rows = algo.prepare(data.rows("train"), data.sides)
    student = algo.build(OmegaConf.to_object(cfg.model), cfg.seed, data.texts(), run.checkpoint)  # type: ignore[arg-type]
    held_out: Any
    if isinstance(student, Classifier):
        tell_cut(student, rows)
        held_out = HeldOutClasses(cfg.evaluate, data, run, algo.teacher_model)
        for split, found in held_out.rows.items():  # now, not when all training is done
            student.know_labels(found, split)
    else:
        held_out = HeldOut(cfg.evaluate, data, reward, run)
    return fit(run, student, algo, rows, algo.collate(student), held_out, data.texts())


def tell_cut(student: Classifier, rows: list[Row]) -> None:
    """Say how many texts are longer than what is read."""
    n = student.too_long(rows)
    if n:
        print(
            f"warning: {n} of {len(rows)} training texts have more than {student.limit} tokens and are cut (algo.max_tokens).",
            file=sys.stderr,
        )
