"""Fine-tuning on labels: the card's vector E1; what it equals is in tests/test_stage_distill.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilling import mean_loss, worked

from alignkit.algos.finetune import Finetune


def test_vector(tmp_path: Path) -> None:
    """Cross-entropy of [2, 0.5] with the second class: log(1 + e^1.5)."""
    algo, student, batch = worked(Finetune(), tmp_path / "t")
    assert mean_loss(algo, student, batch) == pytest.approx(1.701413, abs=1e-5)
    assert algo.teacher_model is None, "none is loaded"


def test_it_needs_no_teacher() -> None:
    rows = [{"id": i, "prompt": "x", "response": "ab"[i]} for i in range(2)]
    assert Finetune().prepare(rows, ("response",)) == rows
