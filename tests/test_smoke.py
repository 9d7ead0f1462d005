"""Each stage's tiny configuration through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import SMALL_CAUSAL, SMALL_RL, SMALL_RUN, SMALL_SEQ2SEQ, SMALL_SFT, command

RUNS = {
    "sft-seq2seq": [*SMALL_SFT, *SMALL_SEQ2SEQ],
    "sft-causal": [*SMALL_SFT, *SMALL_CAUSAL],
    "reinforce-causal": ["+algo=reinforce", *SMALL_CAUSAL, *SMALL_RL],
    "bt-encoder": [
        "+algo=bt",
        *SMALL_RUN,
        "model.config.hidden_size=16",
        "model.config.num_hidden_layers=1",
        "model.config.intermediate_size=32",
        "algo.steps=4",
        "algo.batch_size=8",
        "evaluate.every=2",
    ],
    "study": ["+algo=ndr", "algo.prompts=20", "algo.models=4", "algo.resamples=20", "run.wandb=disabled"],
    "esrl-bundled": ["algo=esrl", *SMALL_RL, "algo.steps=2"],
}


@pytest.mark.parametrize("name", RUNS)
def test_train(tmp_path: Path, name: str) -> None:
    done = command("train", *RUNS[name], f"run.root={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(next(tmp_path.glob("*/result.json")).read_text())
    assert result["status"] == "finished"
    assert f"files: {result['directory']}" in done.stdout


def test_evaluate_a_run_and_a_model(tmp_path: Path) -> None:
    """A run brings its own data; a model needs them named; both write the table and the outputs."""
    trained = command("train", *SMALL_SFT, *SMALL_SEQ2SEQ, "data.dev=null", f"run.root={tmp_path}/a")
    assert trained.returncode == 0, trained.stderr
    run = next(p.parent for p in tmp_path.glob("a/*/result.json"))
    small = ["evaluate.rows=8", "evaluate.max_new_tokens=8", "run.wandb=disabled"]
    for model, more in (
        (str(run), ["evaluate.decode=beam"]),
        (str(run / "final"), ["data=rnnlg", "evaluate.decode=sample"]),
    ):
        done = command("evaluate", model, *more, *small, f"run.root={tmp_path}/b")
        assert done.returncode == 0, done.stderr
        assert "BLEU" in done.stdout
    results = [json.loads(p.read_text()) for p in tmp_path.glob("b/*/result.json")]
    assert len(results) == 2
    for result in results:
        directory = Path(result["directory"])
        assert result["signatures"]["bleu"].startswith("nrefs:")
        assert len((directory / "outputs-test.jsonl").read_text().splitlines()) == 8
        assert "| BLEU |" in (directory / "table.md").read_text()


def test_a_sweep_makes_a_directory_a_run_and_repeating_it_does_nothing(tmp_path: Path) -> None:
    words = [
        "train",
        "-m",
        "+algo=esrl,reinforce",
        "seed=1,2",
        *SMALL_SEQ2SEQ,
        *SMALL_RL,
        "algo.steps=5",
        f"run.root={tmp_path}",
    ]
    first = command(*words)
    assert first.returncode == 0, first.stderr
    results = {p: p.read_text() for p in tmp_path.glob("*/result.json")}
    assert sorted(p.parent.name.rpartition("-")[0] for p in results) == [
        "esrl-s1",
        "esrl-s2",
        "reinforce-s1",
        "reinforce-s2",
    ]
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/final/*")}
    again = command(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished; nothing to do") == 4
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/final/*")} == stamps


def test_a_pipeline_runs_its_steps_and_skips_finished_ones(tmp_path: Path) -> None:
    sft = [*SMALL_SFT, *SMALL_SEQ2SEQ]
    esrl = ["+algo=esrl", "model.path={sft}", *SMALL_RL]
    words = ["train", "+preset=sft_then_esrl", "run.wandb=disabled", f"run.root={tmp_path}"]
    words += [f"steps.{name}=[{','.join(repr(w) for w in step)}]" for name, step in (("sft", sft), ("esrl", esrl))]
    first = command(*words)
    assert first.returncode == 0, first.stderr
    file = next(tmp_path.glob("sft_then_esrl-*/result.json"))
    result = json.loads(file.read_text())
    assert list(result["steps_done"]) == ["sft", "esrl"]
    assert f"path: {result['steps_done']['sft']}" in (Path(result["steps_done"]["esrl"]) / "config.yaml").read_text()
    file.unlink()  # as if the last step had been cut off: finished steps are skipped
    again = command(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished; nothing to do") == 2
    assert json.loads(file.read_text())["weights_sha256"] == result["weights_sha256"]


def test_rows_of_pairs_are_shown_on_both_sides(tmp_path: Path) -> None:
    """Before a reward model of any kind is trained, and before a preference loss."""
    for words in (["+algo=bt"], ["+algo=dpo"]):
        done = command("train", *words, "data.show=1", f"run.root={tmp_path}")
        assert done.returncode == 0, done.stderr
        assert "row 0 chosen" in done.stdout and "row 0 rejected" in done.stdout
    assert not list(tmp_path.iterdir())
