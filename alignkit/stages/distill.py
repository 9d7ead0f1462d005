"""Stage ``distill``: a student learns from labels and from a frozen teacher; a classifier, or a model that writes."""

from __future__ import annotations

import json
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit import plots, ranks
from alignkit.algos._distill import KNOWLEDGE, Distill
from alignkit.classifier import Classifier
from alignkit.data import Data, Row
from alignkit.labels import LABELS
from alignkit.run import Run
from alignkit.stages.evaluate import HeldOut, cell
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
    run.added = {"selection": algo.spent()}
    result = fit(run, student, algo, rows, algo.collate(student), held_out, data.texts())
    if ranks.first():
        _plot(run)
    return result


def _plot(run: Run) -> None:
    """trajectories.svg: how much each kind of knowledge counted, where that changed."""
    lines = (run.dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    steps = [s for s in map(json.loads, filter(None, lines)) if f"weight/{KNOWLEDGE[0]}" in s]
    weights = [[s[f"weight/{k}"] for k in KNOWLEDGE] for s in steps]
    if weights and any(w != weights[0] for w in weights):
        plots.trajectories({run.cfg.name: weights}, KNOWLEDGE, run.dir / "trajectories.svg")


def side_by_side(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line a step of a pipeline, its test metrics and what it cost, the selection behind it counted."""
    tables = {step: (r["evaluation"]["after"] or {}).get("test", {}) for step, r in results.items()}
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    head = [*(LABELS.get(name, name) for name in names), "student trainings", "steps", "seconds"]
    lines = ["| step | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for step, r in results.items():
        cells = [cell(name, tables[step][name]) if name in tables[step] else "" for name in names]
        before, own = r["selection"], sum(v for k, v in r["seconds"].items() if k != "evaluate")
        cells += [
            f"{1 + before['student_runs']}",
            f"{r['steps'] + before['steps']:,}",
            f"{own + before['seconds']:.0f}",
        ]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *lines,
            "",
            "Steps and seconds of training, those of the selection before it counted; without the teacher's training and the final evaluation.",
        ]
    )


def tell_cut(student: Classifier, rows: list[Row]) -> None:
    """Say how many texts are longer than what is read."""
    n = student.too_long(rows)
    if n:
        print(
            f"warning: {n} of {len(rows)} training texts have more than {student.limit} tokens and are cut (algo.max_tokens).",
            file=sys.stderr,
        )
