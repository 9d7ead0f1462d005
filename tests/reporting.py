"""Tiny real runs for the tests of reports: two methods with two seeds each, and what they wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from running import SMALL_RL, lines, train

# the bundled model, at a rate at which seeds and methods come to differ within a few steps
WORDS = [
    *SMALL_RL, "algo.lr=2e-3", "algo.warmup=0", "algo.steps=6", "algo.max_new_tokens=12", "evaluate.max_new_tokens=12",
    "evaluate.rows=20", "evaluate.every=2", "evaluate.final=last", "run.samples_every=2",
]  # fmt: skip
METHODS = ("reinforce", "grpo")
SEEDS = (0, 1)
Runs = dict[tuple[str, int], Path]  # (method, seed) → directory


def make_runs(root: Path) -> Runs:
    return {(m, s): train(root, f"+algo={m}", *WORDS, f"seed={s}")[1] for m in METHODS for s in SEEDS}


def result_of(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return result


def score_of(run: Path, metric: str, when: str = "after") -> float:
    """A test metric as the run wrote it."""
    return float(result_of(run)["evaluation"][when]["test"][metric]["value"])


def logged(run: Path, key: str) -> dict[int, float]:
    """Step → a measure, of the lines of metrics.jsonl that have it."""
    return {line["step"]: line[key] for line in lines(run / "metrics.jsonl") if key in line}
