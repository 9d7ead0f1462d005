"""Distillation and selection where two things meet: a constant grid that goes on, precision and maps, positions and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import BERT, LABELS, TEXTS, build, rows_of, stop_at, teacher_in, words_of
from running import lines, train

from alignkit import classifier
from alignkit.algos.all_equal import AllEqual
from alignkit.algos.selected import Selected
from alignkit.config import Model
from alignkit.errors import Stopped, UserError
from alignkit.selector import Constant

GRID = ["+algo=constant_grid", "algo.grid=[[1,0,0,0],[0,1,0,0],[1,1,1,1]]", "algo.phases=2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return teacher_in(tmp_path_factory.mktemp("teacher") / "t")


def test_a_grid_that_is_stopped_goes_on(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for w in words_of(tmp_path / "d", teacher) if w != "algo.warmup=0"] + [*GRID, "algo.warmup=9"]
    whole, _ = train(tmp_path / "whole", *words)
    assert capsys.readouterr().err.count("warning: algo.warmup=9") == 1, "once, not at each episode"
    for step in (5, 8):  # at the end of an episode, and within the next
        with monkeypatch.context() as m:
            stop_at(step, m)
            with pytest.raises(Stopped):
                train(tmp_path / "broken", *words)
    broken, _ = train(tmp_path / "broken", *words)
    assert broken["resumes"] == 2
    assert broken["episodes"] == whole["episodes"] and broken["best_episode"] == whole["best_episode"]
