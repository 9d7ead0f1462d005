"""A constant mixture of the four kinds of knowledge."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilling import mean_loss, worked

from alignkit.algos.constant_mix import ConstantMix


def test_vector(tmp_path: Path) -> None:
    """0.5 * 1.701413 + 2 * 1.411847 + 3 * 0.666667 + 0.25 * 2."""
    found = mean_loss(*worked(ConstantMix(weights=[0.5, 2.0, 3.0, 0.25]), tmp_path / "t"))
    assert found == pytest.approx(6.174401, abs=1e-5)


def test_the_teacher_alone(tmp_path: Path) -> None:
    assert mean_loss(*worked(ConstantMix(weights=[0, 1, 0, 0]), tmp_path / "t")) == pytest.approx(1.411847, abs=1e-5)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0] * 5, [0.0] * 4, [1.0, -0.1, 0, 0]])
def test_what_is_no_mixture(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights: must be four numbers of 0 or more, not all 0"):
        ConstantMix(weights=weights)
