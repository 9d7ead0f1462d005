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


@pytest.mark.parametrize(("reads", "wanted"), [((64, 24), 24), ((24, 64), 24)])
def test_teacher_and_student_read_the_same_tokens(tmp_path: Path, reads: tuple[int, int], wanted: int) -> None:
    """Of texts longer than one of them can read: in memory or asked, the losses are the same."""
    folder = teacher_in(tmp_path / "t", max_position_embeddings=reads[0])
    algo = AllEqual(teacher=folder, cache_gb=1.0)
    rows = [{**row, "prompt": " ".join([row["prompt"]] * (5 + i))} for i, row in enumerate(rows_of(4))]
    algo.prepare(rows, ("response",))
    algo._labels = LABELS
    student = algo.build(Model(config={**BERT, "max_position_embeddings": reads[1]}, device="cpu"), 0, TEXTS, None)
    batch = algo.collate(student)(rows)
    assert batch.prompt_mask.sum(1).max() == student.limit == wanted
    with torch.no_grad():
        asked, _ = algo.knowledge(student, batch)
        algo._teacher.ask(rows, algo.collate(student), algo.micro_tokens, algo.cache_gb)  # type: ignore[union-attr]
        kept, _ = algo.knowledge(student, batch)
    torch.testing.assert_close(kept, asked, rtol=1e-5, atol=1e-6)
