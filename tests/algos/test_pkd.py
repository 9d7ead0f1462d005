"""Patient KD: the card's vector E1 (arXiv 1908.09355, released code)."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilling import mean_loss, worked

from alignkit.algos.pkd import PKD


def test_vector(tmp_path: Path) -> None:
    """Cross-entropy and T² KL, and the squared distance of [CLS] states of length 1: 0.133333 in each layer."""
    found = mean_loss(*worked(PKD(), tmp_path / "t"))
    assert found == pytest.approx(1.701413 + 1.411847 + 0.133333, abs=1e-5)


def test_states_as_they_are(tmp_path: Path) -> None:
    found = mean_loss(*worked(PKD(features="tokens"), tmp_path / "t"))
    assert found == pytest.approx(1.701413 + 1.411847 + 0.666667, abs=1e-5)
