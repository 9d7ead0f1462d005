"""The best of a grid of constant mixtures: which point an episode has, and which is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distilling import mean_loss, worked

from alignkit import selector
from alignkit.algos.constant_grid import ConstantGrid
from alignkit.selector import Constant

GRID = [[1, 0, 0, 0], [0.5, 2, 3, 0.25], [0, 1, 0, 1]]


def test_each_episode_has_its_point(tmp_path: Path) -> None:
    """The first the losses of the labels; the second 0.5 * 1.701413 + 2 * 1.411847 + 3 * 0.666667 + 0.25 * 2; the third
    1.411847 + 2."""
    algo = ConstantGrid(grid=GRID, loss_scale="none")
    algo.start(None, 0)
    _, student, batch = worked(algo, tmp_path / "t")
    assert isinstance(algo, ConstantGrid) and algo.episodes_ == 3
    found = []
    for episode in range(3):
        algo.begin_episode(episode, 3)
        found.append(mean_loss(algo, student, algo.whole(student, batch, torch.Generator())))
    assert found == pytest.approx([1.701413, 6.174401, 3.411847], abs=1e-5)


def test_an_episodes_losses_are_scaled_anew(tmp_path: Path) -> None:
    """Over their mean in its own first step each loss is 1, so that the sum is that of the weights."""
    algo = ConstantGrid(grid=GRID, loss_scale="init_mean", scale_steps=1)
    algo.start(None, 0)
    _, student, batch = worked(algo, tmp_path / "t")
    algo.begin_episode(0, 3)
    algo.whole(student, batch, torch.Generator())
    with torch.no_grad():
        student.model.classifier.bias.copy_(torch.tensor([5.0, 0.5]))
    changed = mean_loss(algo, student, algo.whole(student, batch, torch.Generator()))
    assert changed == pytest.approx(4.511048 / 1.701413, abs=1e-5)  # log(1 + e^4.5) over the first step's
    algo.begin_episode(1, 3)
    assert mean_loss(algo, student, algo.whole(student, batch, torch.Generator())) == pytest.approx(5.75, abs=1e-5)


def test_what_is_kept_is_saved_and_goes_on(tmp_path: Path) -> None:
    algo = ConstantGrid(grid=GRID)
    algo.start(None, 0)
    for episode in range(3):
        algo.begin_episode(episode, 3)
        if episode == 1:
            algo.keep()
    other = ConstantGrid(grid=GRID)
    other.start(None, 0)
    other.load_state(json.loads(json.dumps(algo.state())))
    for one in (algo, other):
        assert one.weigh(None, None, torch.Generator()).tolist() == [0, 1, 0, 1]  # type: ignore[arg-type]
        one.selector().save(tmp_path)
        assert selector.load(str(tmp_path)) == Constant([0.5, 2, 3, 0.25])


def test_the_grid_has_twenty_different_points() -> None:
    """As many as there are episodes of KSM: the same number of student trainings."""
    grid = ConstantGrid().grid
    assert len(grid) == 20 == len({tuple(p) for p in grid})
    for point in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]):  # FinK, KD, PKD, all
        assert point in grid


@pytest.mark.parametrize("grid", [[], [[]], [[1.0]], [[1, 0, 0, 0], [0, 0, 0, 0]], [[1, 0, 0, -1]]])
def test_what_is_no_point(grid: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="grid: each point must be four numbers of 0 or more, not all 0"):
        ConstantGrid(grid=grid)
