"""All four kinds of knowledge: the card's vector E1, and a relation worked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilling import mean_loss, worked

from alignkit.algos.all_equal import AllEqual


def test_vector(tmp_path: Path) -> None:
    algo, student, batch = worked(AllEqual(), tmp_path / "t")
    assert mean_loss(algo, student, batch) == pytest.approx(1.701413 + 1.411847 + 0.666667 + 2.0, abs=1e-5)
    metrics = algo.loss(student, batch).metrics
    assert [metrics[f"loss/{k}"] for k in ("finetune", "response", "feature", "relation")] == pytest.approx(
        [1.701413, 1.411847, 0.666667, 2.0], abs=1e-5
    )


def test_scaled_by_their_own_mean_each_counts_one(tmp_path: Path) -> None:
    """The losses of the first step over their mean in it."""
    assert mean_loss(*worked(AllEqual(loss_scale="init_mean"), tmp_path / "t")) == pytest.approx(4.0, abs=1e-5)
