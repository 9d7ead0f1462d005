"""``alignkit verify-resume``: real processes, killed; and a method that forgets is found out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import SMALL_RL, SMALL_SEQ2SEQ
from safetensors.torch import save_file
from verifying import MEASURES, verified, words_of

from alignkit.verify import compare, differences, without_clock

FORGETFUL = '''
from dataclasses import dataclass

from alignkit.algos._rl import RL


@dataclass(kw_only=True)
class Forgetful(RL):
    """REINFORCE whose step grows with the number of steps that it has counted, and forgets with the process."""

    temperature: float = 1.0
    k: int = 2

    def credit(self, batch):
        self.counted = getattr(self, "counted", 0) + 1
        return batch.with_(advantages=self.counted * batch.scores[:, None] * batch.mask)

    def metrics(self, batch):
        return {"counted": float(self.counted)}
'''


@pytest.mark.parametrize("name", ["ppo", "dpo", "ksm", "srt_collect"])
def test_a_method_of_each_loop_is_killed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Stage rl with a critic, the supervised loop, repeated trainings of a student, and a data set made in parts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    done = verified(*words_of(name, tmp_path / "made"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed in step" in done.stdout
    assert "OK: the same to the last bit" in done.stdout
    what = {"srt_collect": "lines of data.jsonl", "ksm": "tensors"}.get(name, "SHA-256 of the final weights")
    assert what in done.stdout
    assert not list((tmp_path / "runs").glob("alignkit-verify-*")), "the runs are left behind"


def test_a_method_that_forgets_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first step after the kill counts from one again: 3 unbroken, 1 resumed; the weights differ from there on."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    mine = tmp_path / "mine"
    (mine / "algo").mkdir(parents=True)
    (mine / "forgetful.py").write_text(FORGETFUL)
    (mine / "algo" / "forgetful.yaml").write_text(
        "# @package _global_\ndefaults:\n  - _rl\n  - _self_\nname: forgetful\nalgo:\n  _target_: forgetful.Forgetful\n  lr: 1.0e-2\n"
    )
    small = [w for w in (*SMALL_SEQ2SEQ, *SMALL_RL) if not w.startswith("algo.steps")]
    words = [f"--config-dir={mine}", "+algo=forgetful", "data=rnnlg_acts", "reward=length", "reward.target=4", *small]
    done = verified(*words, "--steps=2", "--more", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "metrics.jsonl line 4 (step 3): " in done.stdout and "counted: 3.0 unbroken, 1.0 resumed" in done.stdout
    assert "final/model.safetensors: " in done.stdout and "differs, max |difference| " in done.stdout
    (kept,) = tmp_path.glob("alignkit-verify-*")
    assert str(kept / "unbroken") in done.stdout


@pytest.mark.parametrize("stage", MEASURES)
def test_what_resumes_nothing_is_refused_in_one_message(cli: Callable[..., tuple[int, str, str]], stage: str) -> None:
    code, _, err = cli("verify-resume", f"+algo={stage}", "data=rnnlg", "model.path=bundled:nlg")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{stage} has nothing to resume" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a method with"),
        (["+algo=esrl", "--steps"], "--steps: give a number"),
        (["+algo=esrl", "--more", "1"], "--more at least 2"),
        (["+algo=esrl", "--quick"], "--quick is no flag"),
        (["+algo=esrl", "algo.kmax=3"], "kmax"),
    ],
)
def test_mistakes(cli: Callable[..., tuple[int, str, str]], words: list[str], message: str) -> None:
    code, _, err = cli("verify-resume", *words)
    assert code == 2 and message in err


def test_a_run_that_fails_is_an_error_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = verified("+algo=esrl", "data.train=/nowhere.jsonl", "run.threads=1")
    assert done.returncode == 2
    assert "the run failed (exit 2)" in done.stderr and "nowhere.jsonl" in done.stderr


# ---- the comparison, by hand -----------------------------------------------------------------------------------------


def test_without_clock(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    line = {
        "step": 1,
        "loss": 2.0,
        "seconds/update": 3.0,
        "peak_mb/update": 4.0,
        "share/update": 1.0,
        "step_seconds": 3.0,
    }
    file.write_text(json.dumps(line | {"tokens_per_second": 9.0, "tokens/trained": 5.0}) + "\n")
    assert without_clock(file) == [{"step": 1, "loss": 2.0, "tokens/trained": 5.0}]


def written(folder: Path, tensor: torch.Tensor, name: str = "w", loss: float = 0.5, seconds: float = 1.0) -> Path:
    (folder / "final").mkdir(parents=True)
    save_file({name: tensor}, folder / "final" / "model.safetensors")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "seconds/update": seconds}) + "\n")
    torch.save({"state": {0: {"exp_avg": tensor}}, "lr": loss}, folder / "optimizer.pt")
    return folder


def test_one_bit_is_a_difference_and_a_clock_is_none(tmp_path: Path) -> None:
    one = torch.tensor([1.0, 2.0])
    bit = torch.nextafter(one, torch.tensor([1.0, 9.0]))  # 2 + 2^-22
    whole = written(tmp_path / "a", one)
    same = compare(whole, written(tmp_path / "b", one, seconds=9.0), "rl")
    assert same[1] == [] and "2 tensors, 1 lines of metrics.jsonl, 3 files" in same[0]
    _, found = compare(whole, written(tmp_path / "c", bit, loss=0.25), "rl")
    assert found == [
        "metrics.jsonl line 1 (step 1): loss: 0.5 unbroken, 0.25 resumed",
        "final/model.safetensors: w differs, max |difference| 2.38e-07",
        "optimizer.pt: state.0.exp_avg differs, max |difference| 2.38e-07",
    ]
    _, found = compare(whole, written(tmp_path / "d", one, name="tied"), "rl")  # the same weights under another name
    assert found == []
    (tmp_path / "b" / "metrics.jsonl").unlink()
    assert compare(whole, tmp_path / "b", "rl")[1] == ["metrics.jsonl: only the unbroken run has it"]


def test_values_that_differ() -> None:
    nan = float("nan")
    assert list(differences({"a": [1, nan], "b": "x"}, {"b": "x", "a": [1, nan]}, "")) == []
    assert list(differences({"a": [1, 2]}, {"a": [1, 3], "c": None}, "")) == [
        "a.1: 2 unbroken, 3 resumed",
        "c: nothing unbroken, null resumed",
    ]
    assert list(differences({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "")) == [
        "a differs, torch.float32 (2,) unbroken, torch.float32 (3,) resumed"
    ]
    assert list(differences(torch.tensor([0.0]), torch.tensor([-0.0]), "x.")) == ["x differs, max |difference| 0"]
