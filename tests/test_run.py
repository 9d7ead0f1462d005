"""The run directory, checkpoints, resume, and what a user's mistakes leave behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_RL, SMALL_SEQ2SEQ, SMALL_SFT, command, lines, train
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from alignkit.batch import Batch, Loss
from alignkit.errors import Stopped, UserError
from alignkit.run import Run, hash_weights
from alignkit.verify import without_clock

ESRL = ["+algo=esrl", *SMALL_SEQ2SEQ, *SMALL_RL]


def test_the_directory_holds_the_record(tmp_path: Path) -> None:
    result, run = train(tmp_path, *ESRL, "run.save_every=2", "evaluate.every=2", "run.samples_every=3")
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "command.txt", "environment.json", "metrics.jsonl", "samples.jsonl", "result.json", "data.json",
            "final", "outputs-before.jsonl", "outputs-after.jsonl"} <= names  # fmt: skip
    assert json.loads((run / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["status"] == "finished"
    assert result["stage"] == "rl"
    assert (result["seed"], result["steps"], result["resumes"]) == (0, 6, 0)
    assert result["weights_sha256"] == hash_weights(run / "final")
    assert result["evaluation"]["before"]["test"]["bleu"]["n"] == 12
    assert set(result["evaluation"]["after"]) == {"test", "difference"}
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4, 5, 6]  # dev before the first step too
    for phase in ("sample", "score", "update"):
        assert metrics[-1][f"seconds/{phase}"] > 0
        assert metrics[-1][f"peak_mb/{phase}"] > 0
    assert metrics[-1]["tokens/sampled"] == result["tokens"]["sampled"] > 0
    assert metrics[-1]["samples"] == result["samples"]
    sample = lines(run / "samples.jsonl")[0]
    assert set(sample) == {"step", "prompt", "references", "response", "score"}
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"] == torch.__version__


def test_checkpoints_are_plain_folders_and_the_last_and_best_are_kept(tmp_path: Path) -> None:
    result, run = train(tmp_path, *ESRL, "run.save_every=1", "evaluate.every=1", "run.keep=2")
    kept = {int(p.name.split("-")[1]) for p in run.glob("checkpoint-*")}
    assert kept == {5, 6} | {result["best"]["step"]}
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "checkpoint-6")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert "state" in {p.name for p in (run / "checkpoint-6").iterdir()}
    assert not any(p.suffix in (".bin", ".pkl") for p in run.rglob("*"))


def test_final_is_the_best_on_dev(tmp_path: Path) -> None:
    result, run = train(tmp_path, *ESRL, "evaluate.every=1", "evaluate.select=length_ratio")
    values = {m["step"]: m["dev/length_ratio"] for m in lines(run / "metrics.jsonl")}
    best = max(values, key=lambda step: (values[step], step > 0, -step))  # the first, but any step before the start
    assert result["best"] == {"step": best, "value": values[best]}
    assert hash_weights(run / "final") == hash_weights(run / f"checkpoint-{best}")


@pytest.mark.parametrize("words", [ESRL, ["+algo=reinforce", "algo.baseline=fifo", *SMALL_CAUSAL, *SMALL_RL], [*SMALL_SFT, *SMALL_SEQ2SEQ]],
                         ids=["esrl", "reinforce", "sft"])  # fmt: skip
def test_a_stopped_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Weights, optimizer, queue, capability, dropout: all come back, and the record has no step twice."""
    words = [*words, "run.save_every=2", "algo.epochs=2", "evaluate.final=last"]
    whole, whole_dir = train(tmp_path / "whole", *words)
    end_step = Run.end_step

    def stop_after_three(self: Run, done: int, *rest: object) -> None:
        self.stop_asked = done == 3
        end_step(self, done, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(Run, "end_step", stop_after_three)
        with pytest.raises(Stopped, match="after step 3"):
            train(tmp_path / "broken", *words)
    broken, broken_dir = train(tmp_path / "broken", *words)
    assert broken["resumes"] == 1
    assert broken["weights_sha256"] == whole["weights_sha256"]
    assert without_clock(broken_dir / "metrics.jsonl") == without_clock(whole_dir / "metrics.jsonl")
    assert broken["evaluation"] == whole["evaluation"]


def test_sigkill_at_random_moments_changes_nothing(tmp_path: Path) -> None:
    """Five kills, wherever they fall (a step, an evaluation, a save), and the same weights as an unbroken run."""
    words = [*ESRL, "algo.steps=40", "run.save_every=3", "evaluate.every=5", "data.limit=200", "evaluate.final=last"]
    whole, _ = train(tmp_path / "whole", *words)
    rng = random.Random(int.from_bytes(os.urandom(4), "big"))
    root = tmp_path / "killed"
    killed = 0
    while killed < 5:
        done = max((len(lines_so_far(p)) for p in root.glob("*/metrics.jsonl")), default=0)
        process = subprocess.Popen(
            [sys.executable, "-m", "alignkit", "train", *words, f"run.root={root}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        target = done + rng.randint(1, 7)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if max((len(lines_so_far(p)) for p in root.glob("*/metrics.jsonl")), default=0) >= target:
                time.sleep(rng.random() * 0.1)
                break
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed: give it more steps"
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    last = command("train", *words, f"run.root={root}")
    assert last.returncode == 0, last.stderr
    result = json.loads(next(root.glob("*/result.json")).read_text())
    assert result["resumes"] == 5
    assert result["weights_sha256"] == whole["weights_sha256"]


def lines_so_far(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:  # between the writing of a new file and its renaming
        return []


def test_repeating_a_finished_run_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, run = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    again, _ = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ)
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert again["weights_sha256"] == first["weights_sha256"]
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    anew, _ = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ, "run.overwrite=true")
    assert anew["resumes"] == 0
    assert (run / "result.json").stat().st_mtime_ns > before[run / "result.json"]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    one, _ = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ)
    two, _ = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ, "seed=1")
    assert one["directory"] != two["directory"]
    assert one["weights_sha256"] != two["weights_sha256"]


def stopped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    """A run that stopped after its second step; returns its directory."""
    end_step = Run.end_step
    with monkeypatch.context() as m:

        def stop(self: Run, done: int, *rest: object) -> None:
            self.stop_asked = done == 2
            end_step(self, done, *rest)  # type: ignore[arg-type]

        m.setattr(Run, "end_step", stop)
        with pytest.raises(Stopped):
            train(tmp_path, *words)
    return next(p.parent for p in tmp_path.glob("*/metrics.jsonl"))


def test_resume_with_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"da": "a()", "ref": "one"}\n{"da": "b()", "ref": "two"}\n')
    words = [*SMALL_SFT, *SMALL_SEQ2SEQ, f"data.train={file}"]
    run = stopped_run(tmp_path / "runs", monkeypatch, *words)
    file.write_text('{"da": "a()", "ref": "another"}\n{"da": "b()", "ref": "two"}\n')
    with pytest.raises(UserError, match=r"another data\.train.*rows\.jsonl.*run\.overwrite=true"):
        train(tmp_path / "runs", *words)
    assert (run / "checkpoint-2").is_dir()


def test_a_half_written_line_and_folder_are_cleared_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*SMALL_SFT, *SMALL_SEQ2SEQ]
    run = stopped_run(tmp_path, monkeypatch, *words)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    (run / "checkpoint-4.partial").mkdir()
    train(tmp_path, *words)
    assert [m["step"] for m in lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not list(run.glob("*.partial"))


def test_two_processes_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*SMALL_SFT, *SMALL_SEQ2SEQ]
    run = stopped_run(tmp_path, monkeypatch, *words)
    import fcntl

    with open(run / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            train(tmp_path, *words)


def test_a_second_process_leaves_a_run_that_has_just_begun_alone(tmp_path: Path) -> None:
    """It has written its record and no step yet, as a start does that is taken back."""
    import fcntl

    run = tmp_path / "begun"
    run.mkdir()
    (run / "config.yaml").touch()
    with open(run / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = command("train", *SMALL_SFT, *SMALL_SEQ2SEQ, f"run.dir={run}")
    assert done.returncode == 2 and "another process is working on this run" in done.stderr
    assert (run / "config.yaml").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.algos.sft import SFT

    words = [*SMALL_SFT, *SMALL_SEQ2SEQ]
    run = stopped_run(tmp_path, monkeypatch, *words)
    good = hash_weights(run / "checkpoint-2")
    loss = SFT.loss

    def broken(self: SFT, policy: object, batch: Batch) -> Loss:
        one = loss(self, policy, batch)  # type: ignore[arg-type]
        return Loss(one.total * float("nan"), one.count)

    monkeypatch.setattr(SFT, "loss", broken)
    with pytest.raises(UserError, match=r"step 2: the loss is not finite.*checkpoint-2"):
        train(tmp_path, *words)
    assert hash_weights(run / "checkpoint-2") == good


def test_a_full_disk_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    """A limit on the size of files makes the second save fail as a full disk does, in a real process."""
    words = [
        "train",
        *SMALL_SFT,
        *SMALL_SEQ2SEQ,
        "run.save_every=2",
        "evaluate.every=0",
        "evaluate.test=false",
        f"run.root={tmp_path}",
    ]
    script = (
        "import resource, sys\n"
        "from alignkit import cli, run\n"
        "save = run.Run.save\n"
        "def limited(self, step, *rest):\n"
        "    if step == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    save(self, step, *rest)\n"
        "run.Run.save = limited\n"
        "cli.main(sys.argv[1:])\n"
    )
    failed = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert failed.returncode == 2, failed.stderr
    assert "checkpoint-4 could not be written" in failed.stderr
    assert "checkpoint-2 is whole" in failed.stderr
    assert "Traceback" not in failed.stderr
    run = next(tmp_path.glob("sft-*"))
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert command(*words).returncode == 0
    assert (run / "result.json").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = [*SMALL_SFT, *SMALL_SEQ2SEQ, "algo.steps=100000", f"run.root={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "alignkit", "train", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(lines_so_far(p) for p in tmp_path.glob("*/metrics.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Repeat the command to go on" in said
    assert "Traceback" not in said
    assert list(tmp_path.glob("*/checkpoint-*/state/run.json"))


def test_the_environment_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cr3t" * 7)
    _, run = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ)
    texts = [p.read_bytes() for p in run.rglob("*") if p.is_file()]
    assert not any(b"s3cr3t" in text for text in texts)


def test_rows_are_drawn_by_position(tmp_path: Path) -> None:
    """An epoch holds every row once, whatever the step size, and the order depends on the seed alone."""
    _, directory = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ)
    shutil.rmtree(directory)
    from running import composed

    run = Run(composed([*SMALL_SFT, *SMALL_SEQ2SEQ, f"run.root={tmp_path}"]), {}, ["test"])
    rows = [{"id": i} for i in range(10)]
    threes = [row["id"] for step in range(10) for row in run.draw(rows, 3, step)]
    assert sorted(threes[:10]) == sorted(threes[10:20]) == list(range(10))
    assert threes[:10] != threes[10:20]
    assert [row["id"] for step in range(5) for row in run.draw(rows, 6, step)] == threes
    run.close()


def test_a_signal_between_saving_and_stopping_waits_for_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stop says was saved is there."""
    save = Run.save

    def late(self: Run, step: int, *args: object) -> None:
        save(self, step, *args)  # type: ignore[arg-type]
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "save", late)
    with pytest.raises(Stopped, match=r"stopped after step 3, saved in .*/checkpoint-3\.") as told:
        train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ, "run.save_every=2", "evaluate.every=0")
    assert Path(str(told.value).rpartition("saved in ")[2].rstrip(".")).is_dir()
