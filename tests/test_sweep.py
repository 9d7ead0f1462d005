"""Sweeps: one job's failure is its own, what was run is told and kept, and what is left can be run alone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import SMALL_RL, SMALL_SEQ2SEQ, SMALL_SFT, command, composed, lines, train

from alignkit import sweep
from alignkit.verify import without_clock


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=0,1", "run.processes=2"], None),
        (["run.processes=1,2"], "jobs 0 and 1 differ in run.processes alone"),
        (["seed=0,1", "run.processes=1,2", "run.threads=1"], "jobs 0 and 1 differ in run.processes alone"),
        (["run.processes=1,2", "run.root=r/${run.processes}"], None),
        (["run.root=r/1,r/2"], None),
    ],
)
def test_jobs_that_would_be_one_run_are_warned_of(words: list[str], said: str | None, tmp_path: Path) -> None:
    done = command("train", "-m", "+algo=ndr", *words, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("warning: jobs" in done.stdout) == (said is not None) and (said or "") in done.stdout


RL = [*SMALL_SEQ2SEQ, *SMALL_RL, "algo.k=2", "algo.warmup=0", "reward=length", "reward.target=4"]


def record(root: Path) -> dict[str, Any]:
    """The record of the one sweep under a root."""
    (file,) = root.glob("sweeps/*/sweep.json")
    return json.loads(file.read_text(encoding="utf-8"))


def states(root: Path) -> list[str]:
    return [job["status"] for job in record(root)["jobs"]]


# ---- one sweep from its failures to its end ----------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], subprocess.CompletedProcess[str]]:
    """(root, words, the process) of 2 methods × 3 seeds × 2 rates; a file is in the way of each run of one arm."""
    root = tmp_path_factory.mktemp("grid")
    for seed in (1, 2, 3):
        cfg = composed(["+algo=rloo", f"seed={seed}", "algo.lr=3e-4", *RL, f"run.root={root}"])
        Path(cfg.run.dir).write_text("in the way")
    words = ["train", "-m", "+algo=reinforce,rloo", "seed=1,2,3", "algo.lr=1e-4,3e-4", *RL, f"run.root={root}"]
    return root, words, command(*words)


def test_an_arm_that_fails_is_told_and_its_siblings_finish(grid) -> None:
    root, _, first = grid
    assert first.returncode == 1, first.stderr
    jobs = record(root)["jobs"]
    failed = [job for job in jobs if job["status"] == "failed"]
    assert [job["job"] for job in failed] == [7, 9, 11]
    assert [job["status"] for job in jobs].count("ok") == 9
    assert all("cannot be written (File exists)" in job["error"] and "\n" not in job["error"] for job in failed)
    for job in failed:
        assert f"- {job['job']} ({sweep.label(job, jobs)}): {job['error']}" in first.stdout
    assert "Traceback" not in first.stderr
    assert "| 7 | algo=rloo seed=1 algo.lr=0.0003 | failed | " in first.stdout
    assert "| algo=rloo algo.lr=0.0003 | 0 | " in first.stdout and "| 1, 2, 3 |\n" in first.stdout  # its missing seeds
    (folder,) = root.glob("sweeps/*")
    assert {p.name for p in folder.iterdir()} == {"sweep.json", "sweep.md", "multirun.yaml"}
    assert folder.name.startswith("reinforce-rloo-")
    assert not (root / "multirun.yaml").exists()
    assert (folder / "sweep.md").read_text().split("\n\n", 2)[2].strip() in first.stdout


def test_the_numbers_are_those_of_the_runs(grid) -> None:
    root, _, _ = grid
    kept = record(root)
    values: dict[str, list[float]] = {}
    for job in kept["jobs"]:
        if job["status"] != "ok":
            continue
        result = json.loads((Path(job["directory"]) / "result.json").read_text())
        test = {name: cell["value"] for name, cell in result["evaluation"]["after"]["test"].items()}
        assert job["test"] == test and "chrf" in test
        assert job["result"] == {"test bleu": test["bleu"]}
        values.setdefault(" ".join(job["overrides"][0:3:2]).lstrip("+"), []).append(test["length_ratio"])
    for found in kept["configurations"][:3]:
        drawn, cell = values[found["configuration"]], found["test"]["length_ratio"]
        half = 4.302653 * statistics.stdev(drawn) / 3**0.5  # t of 2 degrees of freedom, from a table
        assert statistics.stdev(drawn) > 0 and found["seeds"] == ["1", "2", "3"] and found["missing"] == []
        assert (cell["mean"], cell["n"]) == (pytest.approx(statistics.mean(drawn)), 3)
        assert (cell["low"], cell["high"]) == pytest.approx((cell["mean"] - half, cell["mean"] + half), rel=1e-6)
    assert kept["configurations"][3]["missing"] == ["1", "2", "3"] and kept["configurations"][3]["test"] == {}


def test_a_job_is_bit_for_bit_what_its_command_gives_alone(grid, tmp_path: Path) -> None:
    root, _, _ = grid
    job = record(root)["jobs"][10]  # ten jobs ran in the process before it
    warm = Path(job["directory"])
    told = (warm / "command.txt").read_text().strip()
    assert told == shlex.join(["alignkit", "train", *job["overrides"]])
    alone = command(*shlex.split(told.replace(str(root), str(tmp_path)))[1:])
    assert alone.returncode == 0, alone.stderr
    cold = tmp_path / warm.name
    a, b = (json.loads((run / "result.json").read_text()) for run in (warm, cold))
    assert a["weights_sha256"] == b["weights_sha256"]
    assert a["evaluation"] == b["evaluation"] and a["tokens"] == b["tokens"]
    assert without_clock(warm / "metrics.jsonl") == without_clock(cold / "metrics.jsonl")
    assert lines(warm / "outputs-after.jsonl") == lines(cold / "outputs-after.jsonl")
    assert {p.name for p in warm.iterdir()} == {p.name for p in cold.iterdir()}
    assert (warm / ".hydra" / "overrides.yaml").read_text().replace(str(root), str(tmp_path)) == (
        cold / ".hydra" / "overrides.yaml"
    ).read_text()


def test_one_command_runs_what_is_left_and_the_whole_one_skips_what_is_done(grid) -> None:
    root, words, first = grid
    before = record(root)
    assert before["rerun"] in first.stdout
    for file in root.glob("rloo-*"):
        if file.is_file():
            file.unlink()
    again = command(*shlex.split(before["rerun"])[1:])
    assert again.returncode == 0, again.stderr
    rerun = next(r for r in map(_read, root.glob("sweeps/*/sweep.json")) if r["command"] == before["rerun"])
    assert [job["overrides"][:3] for job in rerun["jobs"]] == [
        ["+algo=rloo", f"seed={seed}", "algo.lr=0.0003"] for seed in (1, 2, 3)
    ]
    assert [job["status"] for job in rerun["jobs"]] == ["ok"] * 3 and rerun["rerun"] is None
    whole = command(*words)
    assert whole.returncode == 0, whole.stderr
    after = next(r for r in map(_read, root.glob("sweeps/*/sweep.json")) if r["command"] == before["command"])
    assert [job["status"] for job in after["jobs"]] == ["skipped"] * 12
    assert [c["seeds"] for c in after["configurations"]] == [["1", "2", "3"]] * 4
    assert after["configurations"][:3] == before["configurations"][:3]
    assert "What is left" not in whole.stdout


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


# ---- failures and stops ------------------------------------------------------------------------------------

REWARD = """
import resource, sys
from dataclasses import dataclass

@dataclass
class Moody:
    how: str = "fine"

    def __call__(self, batch):
        limit = 2**16 if self.how == "disk" else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # as a full disk does, it cuts files
        if self.how == "bug":
            raise ZeroDivisionError("one\\ntwo")
        if self.how == "exit":
            sys.exit(0)
        huge = 1e38 if self.how == "huge" else 1.0
        return [huge * (-1) ** i for i in range(len(batch))]
"""


def test_no_failure_of_a_job_reaches_the_next(tmp_path: Path) -> None:
    (tmp_path / "mine" / "reward").mkdir(parents=True)
    (tmp_path / "mine" / "moody.py").write_text(REWARD)
    (tmp_path / "mine" / "reward" / "moody.yaml").write_text("_target_: moody.Moody\n")
    words = [
        "--config-dir",
        str(tmp_path / "mine"),
        "+algo=reinforce",
        *RL[:-2],
        "reward=moody",
        f"run.root={tmp_path}/r",
    ]
    done = command("train", "-m", *words, "reward.how=bug,exit,huge,disk,7,fine", "algo.baseline=none")
    assert done.returncode == 1, done.stderr
    kept = record(tmp_path / "r")
    assert [job["status"] for job in kept["jobs"]] == ["failed"] * 5 + ["ok"]
    bug, left, huge, disk, mistake, fine = kept["jobs"]
    assert bug["error"] == "ZeroDivisionError: one two"
    assert "moody.py" in bug["traceback"] and "moody.py" in done.stderr
    assert "exit code 0" in left["error"]
    assert "not finite" in huge["error"] and "traceback" not in huge
    assert "could not be written" in disk["error"] and "free some space" in disk["error"]
    assert "reward.how" in mistake["error"] and mistake["directory"] == ""
    assert (Path(fine["directory"]) / "result.json").exists()
    assert kept["rerun"].count("reward.how=bug,exit,huge,disk,7") == 1 and "--config-dir" in kept["rerun"]
    told = (Path(fine["directory"]) / "command.txt").read_text()
    assert told.startswith(f"alignkit train --config-dir {tmp_path}/mine +algo=reinforce ")


def test_killed_and_stopped_sweeps_leave_a_record(tmp_path: Path) -> None:
    words = ["train", "-m", "+algo=reinforce", "seed=1,2", *RL, "algo.steps=100000", f"run.root={tmp_path}"]
    steps = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-m", "alignkit", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "100000" in line:  # training begins, or goes on
                break
        (run,) = tmp_path.glob("reinforce-s1-*")
        metrics = run / "metrics.jsonl"
        begun = len(metrics.read_text()) if metrics.exists() else 0
        while not metrics.exists() or len(metrics.read_text()) <= begun + 200:
            assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert (process.returncode, states(tmp_path)) == (-9, ["running", "not run"])
            continue
        assert process.returncode == 130, err
        assert states(tmp_path) == ["stopped", "not run"]
        assert "1 stopped, 1 not run." in out and record(tmp_path)["status"] == "stopped"
        assert "seed=1,2" in record(tmp_path)["rerun"]
        steps.append(max(int(p.name.split("-")[1]) for p in run.glob("checkpoint-*")))
        assert f"checkpoint-{steps[-1]}" in out
    assert 0 < steps[0] < steps[1]  # the second went on from the first


def test_a_sweep_that_cannot_be_composed_runs_nothing(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = cli("train", "-m", "+algo=reinforce", "seed=1,x", *RL)
    assert code == 2 and "seed" in err and "Traceback" not in err
    assert not list(tmp_path.glob("runs/sweeps/*"))
    (tmp_path / "file").touch()
    code, _, err = cli("train", "-m", "+algo=reinforce", "seed=1,2", *RL, "run.root=file/runs")
    assert code == 2 and "run.root" in err


# ---- other launchers, other jobs ---------------------------------------------------------------------------


def test_every_launcher_tells_the_same(tmp_path: Path) -> None:
    """Four jobs in this process, in joblib's two and in submitit's four: the table but for its clock, and the weights."""
    tables, weights = [], []
    for launcher in ("basic", "joblib", "submitit_local"):
        root = tmp_path / launcher
        more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
        words = ["+algo=reinforce", "seed=1,2", *RL, "algo.lr=1e-4,-1", f"run.root={root}"]
        done = command("train", "-m", f"hydra/launcher={launcher}", *more, *words)
        assert done.returncode == 1, done.stderr
        assert states(root) == ["ok", "failed", "ok", "failed"]
        for job, seed in ((1, 1), (3, 2)):
            assert f"- {job} (seed={seed} algo.lr=-1): algo: lr must be at least 0" in done.stdout
        assert f"hydra/launcher={launcher}" in record(root)["rerun"]
        tables.append([{**job, "seconds": 0, "overrides": job["overrides"][:-1]} for job in record(root)["jobs"]])
        runs = [Path(tables[-1][i].pop("directory")) for i in (0, 2)]
        for seed, run in enumerate(runs, 1):
            assert (run / "command.txt").read_text().startswith(f"alignkit train +algo=reinforce seed={seed} ")
        weights.append(tuple(json.loads((run / "result.json").read_text())["weights_sha256"] for run in runs))
        assert not list(root.glob("**/*.pkl"))
    assert tables[0] == tables[1] == tables[2]
    assert len(set(weights)) == 1 and len(set(weights[0])) == 2  # one of each seed


def test_a_failed_job_is_no_objective_and_no_exception(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """What a sweeper is given: batches go on after a failure, and a study counts a failed trial."""
    words = ["+algo=reinforce", *RL, "algo.lr=-1,1e-4", "hydra.sweeper.max_batch_size=1", "evaluate.test=false"]
    code, out, _ = cli("train", "-m", *words)
    assert code == 1
    assert states(tmp_path / "runs") == ["failed", "ok"]
    ok = record(tmp_path / "runs")["jobs"][1]
    dev = [m["dev/bleu"] for m in lines(Path(ok["directory"]) / "metrics.jsonl") if "dev/bleu" in m]
    assert ok["result"] == {"dev bleu": max(dev)} and ok["test"] == {}
    assert f"dev bleu {max(dev):.4g}" in out


def test_a_pipeline_is_a_job_like_any_other(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    sft = [*SMALL_SFT, *SMALL_SEQ2SEQ, "algo.steps=2"]
    esrl = ["+algo=esrl", "model.path={sft}", *SMALL_RL, "algo.steps=2"]
    words = ["train", "-m", "+preset=sft_then_esrl", "seed=1", "run.wandb=disabled"]
    words += [f"steps.{name}=[{','.join(repr(w) for w in step)}]" for name, step in (("sft", sft), ("esrl", esrl))]
    for state in ("ok", "skipped"):
        assert cli(*words)[0] == 0
        (job,) = record(tmp_path / "runs")["jobs"]
        assert job["status"] == state
        result = json.loads((Path(job["directory"]) / "esrl" / "result.json").read_text())
        assert job["test"]["chrf"] == result["evaluation"]["after"]["test"]["chrf"]["value"]
    (folder,) = tmp_path.glob("runs/sweeps/*")
    assert folder.name.startswith("sft_then_esrl-")


def test_threads_of_a_job_are_its_own(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ, "algo.steps=1", "run.threads=2")
    assert torch.get_num_threads() == before == 1


def test_composing_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, alignkit.sweep; sys.exit('torch' in sys.modules)"],
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0


# ---- arithmetic --------------------------------------------------------------------------------------------


def test_mean_and_interval_by_hand() -> None:
    found = sweep.mean([1.0, 2.0, 3.0])  # s = 1, t = 4.3027, 4.3027 / √3 = 2.4842
    assert (found["mean"], found["n"]) == (2.0, 3)
    assert (found["low"], found["high"]) == (pytest.approx(-0.4842, abs=1e-4), pytest.approx(4.4842, abs=1e-4))
    assert sweep.mean([5.0]) == {"mean": 5.0, "n": 1}


def test_seeds_of_a_configuration_are_put_together_and_missing_ones_named() -> None:
    def job(number: int, seed: int, lr: str, state: str, **test: float) -> dict[str, Any]:
        words = ["+algo=x", f"seed={seed}", f"algo.lr={lr}"]
        return {"job": number, "overrides": words, "status": state, "test": test}

    jobs = [
        job(0, 1, "1", "ok", bleu=10.0), job(1, 2, "1", "skipped", bleu=20.0, chrf=5.0), job(2, 1, "2", "failed"),
        job(3, 2, "2", "ok", bleu=7.0),
    ]  # fmt: skip
    one, two = sweep.configurations(jobs)
    assert (one["configuration"], one["seeds"], one["missing"]) == ("algo.lr=1", ["1", "2"], [])
    assert (one["test"]["bleu"]["mean"], one["test"]["bleu"]["n"]) == (15.0, 2)
    assert one["test"]["bleu"]["high"] == pytest.approx(15 + 12.7062 * 50**0.5 / 2**0.5, abs=1e-3)
    assert (two["configuration"], two["seeds"], two["missing"]) == ("algo.lr=2", ["2"], ["1"])
    assert two["test"] == {"bleu": {"mean": 7.0, "n": 1}}
    table = sweep.seeds_table([one, two]).split("\n")
    assert table[2] == "| algo.lr=1 | 2 | 15 [-48.53, 78.53] | 5 (n = 1) |  |"
    assert table[3] == "| algo.lr=2 | 1 | 7 |  | 1 |"
