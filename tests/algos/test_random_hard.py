"""Random-Hard: how often each kind of knowledge is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import mean_loss, worked

from alignkit.algos.random_hard import RandomHard


@pytest.fixture
def drawn(tmp_path: Path) -> torch.Tensor:
    """(4000, 4) weights of as many steps."""
    algo, student, batch = worked(RandomHard(), tmp_path / "t")
    return torch.stack([algo.weigh(student, batch, torch.Generator().manual_seed(i)) for i in range(4000)])


def test_frequencies(drawn: torch.Tensor) -> None:
    """1/2 each, the labels 1/2 + 1/16, for they stand in where none is drawn; 15 mixtures, of which [1, 0, 0, 0] comes twice as
    often as another. Four deviations are 0.032, and of a mixture 0.016."""
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean(0).tolist() == pytest.approx([0.5625, 0.5, 0.5, 0.5], abs=0.032)
    mixtures, counts = drawn.unique(dim=0, return_counts=True)
    assert len(mixtures) == 15 and (mixtures.sum(1) > 0).all()
    shares = {tuple(m.tolist()): int(n) / 4000 for m, n in zip(mixtures, counts, strict=True)}
    assert shares.pop((1.0, 0.0, 0.0, 0.0)) == pytest.approx(1 / 8, abs=0.021)
    assert list(shares.values()) == pytest.approx([1 / 16] * 14, abs=0.016)


def test_the_loss_is_that_of_what_is_drawn(tmp_path: Path) -> None:
    algo, student, batch = worked(RandomHard(), tmp_path / "t")
    weights = batch.extra["weights"][0]
    four = torch.tensor([1.701413, 1.411847, 0.666667, 2.0])
    assert mean_loss(algo, student, batch) == pytest.approx(float(weights @ four), abs=1e-5)
    assert torch.equal(weights, algo.weigh(student, batch, torch.Generator().manual_seed(0)))
