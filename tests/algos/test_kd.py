"""Knowledge distillation: the card's vector E1 (arXiv 1503.02531)."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilling import mean_loss, worked

from alignkit.algos.kd import KD


@pytest.mark.parametrize(("temperature", "response"), [(1.0, 1.157275), (2.0, 1.411847)])
def test_vector(tmp_path: Path, temperature: float, response: float) -> None:
    """Cross-entropy 1.701413, and T² KL."""
    found = mean_loss(*worked(KD(temperature=temperature), tmp_path / "t"))
    assert found == pytest.approx(1.701413 + response, abs=1e-5)


def test_it_looks_at_no_states(tmp_path: Path) -> None:
    algo, student, batch = worked(KD(), tmp_path / "t")
    assert set(algo.loss(student, batch).metrics) == {
        "loss/finetune", "loss/response", "weight/finetune", "weight/response", "weight/feature", "weight/relation",
    }  # fmt: skip
