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


def test_a_map_between_widths_in_bfloat16(tmp_path: Path, teacher: str) -> None:
    words = words_of(tmp_path / "d", teacher, hidden_size=8)
    losses = {}
    for compute in ("same", "bfloat16"):
        _, run = train(tmp_path / compute, "+algo=all_equal", *words, f"model.compute={compute}", "evaluate.every=0")
        losses[compute] = [m[f"loss/{k}"] for m in lines(run / "metrics.jsonl")[:1] for k in ("feature", "relation")]
    assert losses["bfloat16"] == pytest.approx(losses["same"], rel=0.05)


@pytest.mark.parametrize("reads", [(64, 4), (4, 64)])
def test_teacher_and_student_read_the_same_tokens(
    tmp_path: Path, reads: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of texts longer than one of the two can read: in memory or asked at every step, the losses are the same."""
    folder = teacher_in(tmp_path / "t", max_position_embeddings=reads[0])
    words = ["+algo=all_equal", *words_of(tmp_path / "d", folder, max_position_embeddings=reads[1]), "evaluate.every=0"]
    found = []
    for extra in ([], ["algo.cache_gb=0.1"]):
        _, run = train(tmp_path / f"runs{len(extra)}", *words, *extra)
        assert "more than 4 tokens and are cut" in capsys.readouterr().err
        found.append([[v for k, v in m.items() if k.startswith("loss/")] for m in lines(run / "metrics.jsonl")])
    assert len(found[0]) == 5 and len(found[0][0]) == 4
    for asked, kept in zip(*found, strict=True):
        assert kept == pytest.approx(asked, rel=1e-5, abs=1e-6)
