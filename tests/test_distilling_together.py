"""Distillation and selection where two things meet: a constant grid that goes on, precision and maps, positions and labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distilling import BERT, LABELS, TEXTS, rows_of, stop_at, teacher_in, words_of
from hydra.utils import instantiate
from running import composed, lines, train

from alignkit import classifier
from alignkit.algos.selected import Selected
from alignkit.config import Model
from alignkit.errors import Stopped, UserError
from alignkit.launch import _read
from alignkit.stages import pipeline

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


def test_a_head_keeps_its_order_of_the_same_labels(tmp_path: Path) -> None:
    def load(**model: object) -> classifier.Classifier:
        return classifier.load(Model(device="cpu", vocab_size=300, **model), 1, TEXTS, ["place", "food", "animal"])  # type: ignore[arg-type]

    load(config=BERT).save(tmp_path)
    again = classifier.load(Model(path=str(tmp_path), device="cpu"), 0, labels=LABELS)
    assert again.labels == ["place", "food", "animal"]
    assert again.demonstrations(rows_of(3)).response_ids[:, 0].tolist() == [1, 2, 0]  # food, animal, place
    torch.testing.assert_close(again.logits(rows_of(3)), load(path=str(tmp_path)).logits(rows_of(3)))


def test_a_head_of_more_labels_is_drawn_anew_and_nothing_else(tmp_path: Path) -> None:
    before = classifier.load(Model(config=BERT, vocab_size=300, device="cpu"), 1, TEXTS, LABELS)
    before.save(tmp_path)
    one, same, other = (
        classifier.load(Model(path=str(tmp_path), device="cpu"), seed, labels=[*LABELS, "plant"]) for seed in (0, 0, 1)
    )
    for name, weight in before.model.state_dict().items():
        found = [reader.model.state_dict()[name] for reader in (one, same, other)]
        if name.startswith("classifier.weight"):
            assert found[0].shape == (4, 16) and torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        elif not name.startswith("classifier."):
            assert all(torch.equal(x, weight) for x in found), name


def test_what_a_selection_cost_is_known_from_its_final_folder(tmp_path: Path, teacher: str) -> None:
    _, run = train(tmp_path, *words_of(tmp_path / "d", teacher), *GRID)
    costs = [Selected(selector=str(folder), teacher=teacher).spent() for folder in (run, run / "final")]
    assert costs[0] == costs[1] and costs[0]["student_runs"] == 3 and costs[0]["steps"] == 15


def test_a_selector_is_refused_with_other_losses_than_its_own(tmp_path: Path, teacher: str) -> None:
    words = words_of(tmp_path / "d", teacher)
    _, run = train(tmp_path, *words, *GRID, "algo.temperature=3")
    selected = [*words, "+algo=selected", f"algo.selector={run}", "evaluate.every=0"]
    with pytest.raises(UserError, match=r"was learned with algo\.temperature=3; with other losses"):
        train(tmp_path, *selected)
    assert train(tmp_path, *selected, "algo.temperature=3")[0]["selection"]["student_runs"] == 3


def test_how_much_of_a_text_is_read_is_saved(tmp_path: Path) -> None:
    before = classifier.load(Model(config=BERT, vocab_size=300, device="cpu"), 1, TEXTS, LABELS, max_tokens=5)
    before.save(tmp_path)
    again = classifier.load(Model(path=str(tmp_path), device="cpu"), 0)
    assert again.limit == 5
    assert classifier.load(Model(path=str(tmp_path), device="cpu"), 0, max_tokens=9).limit == 9
    long = [{"id": 0, "prompt": "the good harbour " * 5, "response": "place"}]
    torch.testing.assert_close(again.logits(long), before.logits(long))


def test_what_newcomers_are_told(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A test text that stands in dev, a run's rows whose responses are left out, and mistakes that had no way out."""
    words = words_of(tmp_path / "d", teacher)
    test = tmp_path / "d" / "test.jsonl"
    both = [json.loads(line) for line in (tmp_path / "d" / "dev.jsonl").read_text().split("\n")[:2]]
    test.write_text(test.read_text() + "".join(json.dumps(row) + "\n" for row in both))
    train(tmp_path, "+algo=finetune", *words, "evaluate.every=0", "algo.steps=1")
    assert "warning: 2 of 10 test prompts stand word for word in dev" in capsys.readouterr().err

    made = tmp_path / "made"
    made.mkdir()
    rows = [{**row, "response": "made", "label": row["response"]} for row in both]
    (made / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for template, said in (("'{label}'", True), ("'{response}'", False)):
        cfg = composed(["+algo=sft", "data=custom", f"data.train={made}", f"data.response={template}"])
        _read(cfg, instantiate(cfg.data))
        assert ("To learn them set 'data.response=\"{response}\"'" in capsys.readouterr().err) is said

    with pytest.raises(
        UserError, match=r"more\.kd: .* are several words; give a list: 'more\.kd=\[\"a=1\", \"b=2\"\]'"
    ):
        pipeline.steps(composed(["+preset=ksm_tiny", 'more.kd="a=1 b=2"']))
    with pytest.raises(UserError, match=r"data\.dev: must be given"):
        train(tmp_path, *[w for w in words if not w.startswith("data.dev=")], *GRID)
    other = teacher_in(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["id2label"]["0"] = "beast"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"only the teacher has 'beast'; only data\.train has 'animal'"):
        train(tmp_path, "+algo=kd", *words, f"algo.teacher={other}")
