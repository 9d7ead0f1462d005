"""Several processes that share one run: the same run as in one, whatever they have to do, and however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from group import failing, spawned, together
from running import SMALL_CAUSAL, SMALL_RL, SMALL_RUN, SMALL_SEQ2SEQ, command, composed, lines, train
from safetensors.torch import load_file

FIVE = ["algo.steps=5", "algo.warmup=0", "algo.micro_tokens=64", "evaluate.every=5", "evaluate.final=last"]
RL = [*SMALL_RL, *FIVE, "algo.lr=1e-3"]
TRANSLATE = ["data=rnnlg", "reward=chrf", *SMALL_SEQ2SEQ]
METHODS = {  # as many micro-batches as can be, so that every rank has some; without dropout, which each rank draws for itself
    "esrl": ["+algo=esrl", *TRANSLATE, *RL, "algo.prompts_per_step=5", "algo.capability=metric"],
    "ppo": ["+algo=ppo", *TRANSLATE, *RL, "algo.prompts_per_step=6", "algo.kl=0.1", "algo.minibatches=2"],
    "grpo": ["+algo=grpo", "data=arithmetic", "reward=chrf", *SMALL_CAUSAL, *RL],
    "reinforce": ["+algo=reinforce", *TRANSLATE, *RL, "algo.prompts_per_step=1", "algo.k=2"],  # one group: the other ranks have none
    "lora": ["+algo=grpo", "data=arithmetic", "reward=chrf", *SMALL_CAUSAL, *RL, "model.lora.r=4", "algo.kl=0.05"],
    "bfloat16": ["+algo=grpo", "data=arithmetic", "reward=chrf", *SMALL_CAUSAL, *RL, "model.compute=bfloat16"],
    "dpo": ["+algo=dpo", "data=polite", *SMALL_CAUSAL, *SMALL_RUN, *FIVE, "algo.batch_size=6", "algo.lr=1e-2",
            "algo.max_response_tokens=24"],
    "pcrm": ["+algo=pcrm", *SMALL_RUN, *FIVE, "algo.batch_size=6", "algo.lr=1e-2", "model.config.hidden_dropout_prob=0",
             "model.config.hidden_size=16", "model.config.num_hidden_layers=1", "model.config.intermediate_size=32",
             "model.config.num_attention_heads=2"],
    "sft": ["+algo=sft", "data=rnnlg", *SMALL_SEQ2SEQ, *SMALL_RUN, *FIVE, "model.config.dropout=0", "algo.batch_size=7", "algo.lr=1e-2",
            "evaluate.decode=beam", "evaluate.beams=2"],
}  # fmt: skip


def found_in(root: Path, words: list[str]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    folder = Path(composed([*words, f"run.root={root}"]).run.dir)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return load_file(folder / "final" / "model.safetensors"), lines(folder / "metrics.jsonl"), result


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, over all weights together."""
    assert one.keys() == other.keys()
    flat = [torch.cat([x[k].flatten().double() for k in sorted(x)]) for x in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method in one process, in two and in four."""
    root = tmp_path_factory.mktemp("ranks")
    for words in METHODS.values():
        train(root / "1", *words)
    for count in (2, 4):
        each = [[*words, f"run.root={root}/{count}"] for words in METHODS.values()]
        how = ["run.shard=true", f"run.offload={str(count == 4).lower()}"]
        each += [[*words, f"run.root={root}/{count}-sharded", *how] for words in METHODS.values()]
        together(count, each, root)
    return root


@pytest.mark.parametrize("how", ["2", "4", "2-sharded", "4-sharded"])
@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_processes_changes_nothing(runs: Path, name: str, how: str) -> None:
    """Nor does it that each has only a part of the layers (FSDP2), and that AdamW has them in the processor's memory (four of them)."""
    weights, log, result = found_in(runs / "1", METHODS[name])
    more, their_log, their_result = found_in(runs / how, METHODS[name])
    rough = name == "bfloat16"  # where layers are apart, passes have other shapes, and round otherwise
    assert apart(weights, more) < (1e-2 if rough else 1e-5)
    # sums in another order, unless one rank has it all, or they are rounded away
    assert apart(weights, more) > 0 or name in ("reinforce", "bfloat16")
    assert [x["step"] for x in log] == [x["step"] for x in their_log]
    for one, other in zip(log, their_log, strict=True):
        for key in ("loss", "reward", "grad_norm", "kl", "dev/reward", "preference_accuracy"):
            assert (key in one) == (key in other), key
            assert other.get(key, 0.0) == pytest.approx(
                one.get(key, 0.0), rel=1e-2 if rough else 1e-3, abs=2e-3 if rough else 1e-5
            ), key
    assert their_result["samples"] == result["samples"] and their_result["tokens"] == result["tokens"]


def children(parent: int) -> list[int]:
    """The processes of a run, in order of their start."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "status").read_text()
                asked = (folder / "cmdline").read_text()
            except OSError:
                continue
            if f"PPid:\t{parent}\n" in status and "alignkit.processes" in asked:
                found.append(int(folder.name))
    return sorted(found)


def started(root: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "alignkit", "train", *words, f"run.root={root}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip


def until(holds: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not holds():
        assert process.poll() is None and time.monotonic() < end, process.stderr and process.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize("shard", ["run.shard=false", "run.shard=true"])
def test_a_killed_process_ends_all_and_the_command_goes_on_with_any_number(tmp_path: Path, shard: str) -> None:
    """SIGKILL to one of two in the middle; the same command in one process, stopped again, and at last in four."""
    words = [*METHODS["esrl"], "run.save_every=1", "algo.steps=30", "evaluate.every=0"]
    folder = Path(composed([*words, f"run.root={tmp_path}"]).run.dir)
    process = started(tmp_path, *words, "run.processes=2", shard)
    until(lambda: (folder / "checkpoint-4" / "state" / "run.json").exists(), process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 40
    assert process.returncode == 2
    assert "process 2 of 2 was killed (SIGKILL); the others were stopped. Repeat the command" in said
    assert "Traceback" not in said
    reached = max(int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*[0-9]"))
    assert len(list(folder.glob(f"checkpoint-{reached}/state/moments-*"))) == (2 if shard == "run.shard=true" else 0)
    process = started(tmp_path, *words)
    until(lambda: (folder / f"checkpoint-{reached + 4}" / "state" / "run.json").exists(), process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    done = command("train", *words, f"run.root={tmp_path}", "run.processes=4", shard, "run.offload=true")
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("*.partial"))
    weights, log, result = found_in(tmp_path, words)
    train(tmp_path / "whole", *words)
    whole, their_log, _ = found_in(tmp_path / "whole", words)
    assert apart(whole, weights) < 1e-5
    assert [x["step"] for x in log] == [x["step"] for x in their_log]
    assert result["resumes"] == 2
    record = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert (record["processes"], record["shard"]) == (4, shard == "run.shard=true")
    assert record["earlier_processes"] == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_after_the_step(tmp_path: Path, number: signal.Signals) -> None:
    """What the one that started them is sent is handed on; all stop after the same step, and the message says how to go on."""
    process = started(tmp_path, *METHODS["esrl"], "run.processes=2", "algo.steps=500")
    folder = Path(composed([*METHODS["esrl"], "algo.steps=500", f"run.root={tmp_path}"]).run.dir)
    until(lambda: (folder / "metrics.jsonl").exists() and len(lines(folder / "metrics.jsonl")) > 1, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped after step" in said and "Repeat the command to go on" in said
    step = int(said.partition("stopped after step ")[2].split(",")[0])
    assert (folder / f"checkpoint-{step}" / "state" / "run.json").exists()


def test_started_by_torchrun(runs: Path, tmp_path: Path) -> None:
    words = METHODS["dpo"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "alignkit", "train", *words, f"run.root={tmp_path}"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert apart(found_in(runs / "1", words)[0], found_in(tmp_path, words)[0]) < 1e-5
    assert done.stdout.count("files: ") == 1  # the first one alone speaks
    folder = Path(found_in(tmp_path, words)[2]["directory"])
    record = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert (record["processes"], record["shard"]) == (2, False)  # of which config.yaml knows nothing


def by_torchrun(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "alignkit", "train", *words],
        capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **env}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+preset=sft_then_esrl"], "run.processes=N starts N processes of this machine for each step that they can share (sft,"),
        (["+algo=ndr"], "stage study runs in one process. Start it without torchrun or accelerate."),
        (["-m", "+algo=sft", "seed=1,2"], "a sweep runs in one process, which starts the jobs. Start it without torchrun"),
        (["+algo=sft", "seed=abc"], "seed: must be an integer, is 'abc'."),
        (["+algo=sft", "run.processes=0"], "run.processes: must be at least 1."),
    ],
    ids=["pipeline", "study", "sweep", "type", "check"],
)  # fmt: skip
def test_what_each_would_refuse_the_first_refuses(words: list[str], said: str, tmp_path: Path) -> None:
    done = by_torchrun(*words, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and said in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_all_find_in_the_rows_the_first_tells(tmp_path: Path) -> None:
    """They have met by then, so one could be alone in what it has found."""
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a", "response": "b"}\n' * 3 + '{"prompt": "a"}\n', encoding="utf-8"
    )
    done = by_torchrun("+algo=sft", "data=custom", "data.train=rows.jsonl", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "error: rows.jsonl, line 4: no column 'response'" in done.stderr


def test_what_the_first_alone_finds_the_others_do_not_die_of(tmp_path: Path) -> None:
    """The folder; they wait for it in their first message."""
    (tmp_path / "file").touch()
    done = by_torchrun("+algo=sft", "run.root=file/runs", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "file/runs" in done.stderr and "[rank1]" not in done.stderr


def test_a_stop_is_said_once_under_torchrun(tmp_path: Path) -> None:
    words = [*METHODS["reinforce"], "algo.steps=100000", "evaluate.every=0", "run.root=runs"]
    folder = tmp_path / "runs" / Path(composed(words).run.dir).name
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "alignkit", "train", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    until(lambda: (folder / "metrics.jsonl").exists() and len(lines(folder / "metrics.jsonl")) > 3, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[1]
    assert said.count("stopped after step") == 1 and "Repeat the command to go on" in said


def test_a_damaged_checkpoint_leaves_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    """torchrun ends the others while they wait for the first one to tell."""
    words = [*METHODS["reinforce"], "evaluate.every=0", "evaluate.test=false", "run.root=runs"]
    folder = tmp_path / "runs" / Path(composed(words).run.dir).name
    train(tmp_path / "runs", *words[:-1])
    (folder / "result.json").unlink()
    (folder / "checkpoint-5" / "state" / "run.json").write_text("{")
    (tmp_path / "scratch").mkdir()
    done = by_torchrun(*words, cwd=tmp_path, TMPDIR=str(tmp_path / "scratch"))
    assert done.returncode != 0 and done.stderr.count("checkpoint-5 is damaged") == 1
    assert not list((tmp_path / "scratch").glob("alignkit-*"))


def test_rows_are_shown_once_and_a_run_begins_anew_under_torchrun(tmp_path: Path) -> None:
    """What ``launch`` does of ``data.show`` and ``run.overwrite``: rows and nothing else; a run's requests are forgotten with it."""
    from alignkit.feedback import FILE, Account

    words = [*METHODS["reinforce"], "evaluate.every=0", "evaluate.test=false", "algo.steps=1"]
    shown = by_torchrun(*words, "data.show=2", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("row 0 ") == shown.stdout.count("row 1 ") == 1 and "files: " not in shown.stdout
    assert not list(tmp_path.glob("runs/*"))
    folder = tmp_path / "runs" / Path(composed(words).run.dir).name
    assert by_torchrun(*words, cwd=tmp_path).returncode == 0
    (folder / "left").touch()
    with Account(tmp_path / "runs" / FILE, str(folder.resolve())) as account, account._transaction() as db:
        db.execute("INSERT INTO failures (run, key) VALUES (?, 'x')", (str(folder.resolve()),))
    anew = by_torchrun(*words, "run.overwrite=true", cwd=tmp_path)
    assert anew.returncode == 0, anew.stderr
    assert not (folder / "left").exists()
    with Account(tmp_path / "runs" / FILE, str(folder.resolve())) as account, account._transaction() as db:
        assert db.execute("SELECT count(*) FROM failures").fetchone()[0] == 0


LATE = [  # saves nothing for long
    *METHODS["esrl"], "run.processes=2", "algo.steps=500", "evaluate.every=0", "evaluate.test=false", "run.save_every=500",
]  # fmt: skip


def test_stopped_before_anything_is_saved(tmp_path: Path) -> None:
    """Ctrl-C in the first steps of a run that saves at its end alone, and while the processes only start; scratch folders too go."""
    (tmp_path / "scratch").mkdir()
    process = started(tmp_path / "runs", *LATE, TMPDIR=str(tmp_path / "scratch"))
    until(lambda: len(children(process.pid)) == 2, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Repeat the command: nothing is saved yet, so it starts from the beginning." in said
    assert "last checkpoint" not in said
    assert not list((tmp_path / "runs").glob("*")) and not list((tmp_path / "scratch").glob("*"))


def test_a_killed_process_leaves_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    """SIGKILL to one before the first checkpoint; then to the one that has started them, whose folder the others take along."""
    folder = tmp_path / "runs" / Path(composed(LATE).run.dir).name
    for whom in ("one of them", "the starter"):
        scratch = tmp_path / whom
        scratch.mkdir()
        process = started(tmp_path / "runs", *LATE, "run.overwrite=true", TMPDIR=str(scratch))
        until(lambda: (folder / "metrics.jsonl").exists() and len(lines(folder / "metrics.jsonl")) > 1, process)
        assert list(scratch.rglob("metrics.jsonl"))  # the second process's
        both = children(process.pid)
        os.kill(both[1] if whom == "one of them" else process.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        if whom == "one of them":
            assert process.returncode == 2
            assert "was killed (SIGKILL)" in said and "without run.overwrite=true: nothing is saved yet" in said
        end = time.monotonic() + 30
        while list(scratch.glob("*")) and time.monotonic() < end:
            time.sleep(0.1)
        assert not list(scratch.glob("*"))
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def test_they_end_where_the_starter_is_gone_before_they_have_begun(tmp_path: Path) -> None:
    process = started(tmp_path, *LATE)
    until(lambda: len(children(process.pid)) == 2, process)
    both = children(process.pid)
    process.kill()
    try:
        process.communicate(timeout=60)  # they hold its streams, until they are gone
    except subprocess.TimeoutExpired:
        for one in both:
            os.kill(one, signal.SIGKILL)
        raise


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    done = command("train", *METHODS["esrl"], f"run.root={tmp_path}", "run.processes=2", "algo.max_new_tokens=100000")
    assert done.returncode == 2
    assert done.stderr.count("max_new_tokens") >= 1 and done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


def test_one_that_leaves_with_no_error_is_no_success(tmp_path: Path) -> None:
    """A reward that calls ``sys.exit``, as a library may, on all of them."""
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "leaves.yaml").write_text("_target_: leaves.Leaves\n", encoding="utf-8")
    (tmp_path / "leaves.py").write_text(
        "import sys\n\n\nclass Leaves:\n    def __call__(self, batch):\n        sys.exit(0)\n", encoding="utf-8"
    )
    words = [w for w in METHODS["reinforce"] if w != "reward=chrf"]
    done = command(
        "train", "--config-dir", str(tmp_path), *words, "reward=leaves", f"run.root={tmp_path}", "run.processes=2"
    )
    assert done.returncode == 2
    assert "the run left the process with exit code 0" in done.stderr and "result.json" not in done.stderr


def test_one_that_hangs_ends_all_with_its_stack(tmp_path: Path) -> None:
    """A reward that never comes back on one rank: the watchdog writes where it stands."""
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "stuck.yaml").write_text("_target_: stuck.Stuck\n", encoding="utf-8")
    (tmp_path / "stuck.py").write_text(
        "import os, time\n\n\nclass Stuck:\n    def __call__(self, batch):\n"
        "        time.sleep(1000 if os.environ.get('RANK') == '1' and batch.logprobs is not None else 0)\n"
        "        return [float(len(r)) for r in batch.responses]\n",
        encoding="utf-8",
    )
    words = [w for w in METHODS["reinforce"] if w not in ("algo.prompts_per_step=1", "reward=chrf")]
    begun = time.monotonic()
    done = command(
        "train", "--config-dir", str(tmp_path), *words, "algo.prompts_per_step=4", "reward=stuck", "run.patience=15",
        f"run.root={tmp_path}", "run.processes=2", "evaluate.every=0", "evaluate.test=false",
    )  # fmt: skip
    assert time.monotonic() - begun < 120
    assert done.returncode == 2
    assert "Timeout" in done.stderr and "stuck.py" in done.stderr and "ended with exit code 1" in done.stderr


def test_a_stage_whose_work_is_not_shared_runs_in_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(
        tmp_path,
        "+algo=ndr",
        "algo.prompts=20",
        "algo.models=4",
        "algo.resamples=20",
        "run.wandb=disabled",
        "run.processes=2",
    )
    assert "run.processes=2: stage study runs in one process" in capsys.readouterr().err


def test_each_process_holds_a_part_of_the_layers_and_saves_all(tmp_path: Path) -> None:
    """Parts of all ranks make up the layers; whole again, the model gives the logits and the state that it had."""
    found = spawned(3, tmp_path)
    whole, shared = found[0]["weights"], found[0]["shared"]
    assert sum(one["own"] - shared for one in found) == whole - shared
    assert all(one["own"] - shared <= 0.4 * (whole - shared) for one in found)
    for one in found:
        assert one["of"] == whole  # what a checkpoint has room for
        assert one["same"] and one["whole_again"] and one["apart_again"] == one["own"]


def test_one_that_fails_in_a_pass_of_all_leaves_and_tells_why(tmp_path: Path) -> None:
    """Where layers are apart the others are in the middle of one, and no message may come in between."""
    begun = time.monotonic()
    codes, said = failing(tmp_path)
    assert time.monotonic() - begun < 60  # its patience is 100
    assert all(codes) and "UserError: this row is wrong" in said[1]


def test_apart_the_best_weights_are_found_again(tmp_path: Path) -> None:
    """``evaluate.final=best`` where the best step is not the last: it is read into layers that several processes share."""
    words = [*METHODS["grpo"], "algo.lr=0.5", "evaluate.every=1", "evaluate.final=best", "evaluate.select=chrf"]
    done = command("train", *words, f"run.root={tmp_path}", "run.processes=2", "run.shard=true")
    assert done.returncode == 0, done.stderr
    weights, _, result = found_in(tmp_path, words)
    assert result["best"]["step"] < 5
    best = Path(result["directory"]) / f"checkpoint-{result['best']['step']}"
    assert apart(load_file(best / "model.safetensors"), weights) == 0


ENDLESS = """
import atexit, os, threading, time
def endless():
    import torch
    x = torch.ones(100)
    while True:
        x + x
def start():
    threading.Thread(target=endless, daemon=True).start()
    time.sleep(0.2)
if "RANK" in os.environ:
    atexit.register(start)
"""  # a thread that comes back to Python while Python ends aborts the process, whatever it had come to


@pytest.mark.parametrize("by", ["run", "torchrun"])
def test_no_thread_is_in_the_way_of_the_end(tmp_path: Path, by: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(ENDLESS, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [*METHODS["reinforce"], "evaluate.every=0", "evaluate.test=false", "algo.steps=1"]
    if by == "run":
        done = command("train", *words, "run.processes=2", cwd=tmp_path, PYTHONPATH=path)
    else:
        done = by_torchrun(*words, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("what", "code"), [("pass", 0), ("sys.exit(3)", 3), ("raise Stopped('no')", 1), ("sys.exit('no')", 1)]
)
def test_one_that_has_met_others_ends_as_it_would_have(tmp_path: Path, what: str, code: int) -> None:
    script = f"""
import atexit, sys, threading, time
from alignkit import processes
from alignkit.errors import Stopped
processes.met = True
def write():
    time.sleep(1)
    kept.write("written late")
with processes.ending():
    atexit.register(print, "tidied")
    print("said")
    kept = open("kept.txt", "w")
    threading.Thread(target=write).start()
    {what}
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False
    )
    assert (tmp_path / "kept.txt").read_text() == "written late"
    assert done.returncode == code and done.stdout == "said\ntidied\n"
    assert ("Stopped: no" in done.stderr) == ("raise" in what) and ("no" in done.stderr) == ("no" in what)


def test_what_nothing_reads_is_told(tmp_path: Path) -> None:
    words = [*METHODS["reinforce"], "algo.queue=77"]
    done = command("train", *words, f"run.root={tmp_path}", "run.processes=2")
    assert done.returncode == 0, done.stderr
    assert found_in(tmp_path, words)[2]["unread"] == ["algo.queue=77"]
    assert done.stderr.count("algo.queue") == 1


def test_layers_that_each_would_drop_for_itself_are_refused(tmp_path: Path) -> None:
    words = [*METHODS["sft"], "model.config.encoder_layerdrop=0.4", f"run.root={tmp_path}", "run.processes=2"]
    done = command("train", *words, "run.shard=true")
    assert done.returncode == 2
    assert "model.config.encoder_layerdrop=0" in done.stderr and "Traceback" not in done.stderr
