"""Random-Soft: how the weights are spread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import mean_loss, worked

from alignkit.algos.random_soft import RandomSoft


@pytest.fixture
def drawn(tmp_path: Path) -> torch.Tensor:
    """(4000, 4) weights of as many steps."""
    algo, student, batch = worked(RandomSoft(), tmp_path / "t")
    return torch.stack([algo.weigh(student, batch, torch.Generator().manual_seed(i)) for i in range(4000)])


def test_weights_are_uniform_and_apart(drawn: torch.Tensor) -> None:
    """Mean 1/2 and variance 1/12, of which four deviations are 0.018 and 0.005; a quarter of them below 1/4; no correlation."""
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert drawn.mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.018)
    assert drawn.var(0).tolist() == pytest.approx([1 / 12] * 4, abs=0.005)
    assert (drawn < 0.25).float().mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.028)
    assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 0.064


def test_the_loss_is_that_of_what_is_drawn(tmp_path: Path) -> None:
    algo, student, batch = worked(RandomSoft(), tmp_path / "t")
    weights = batch.extra["weights"][0]
    four = torch.tensor([1.701413, 1.411847, 0.666667, 2.0])
    assert mean_loss(algo, student, batch) == pytest.approx(float(weights @ four), abs=1e-5)
    assert torch.equal(weights, algo.weigh(student, batch, torch.Generator().manual_seed(0)))
