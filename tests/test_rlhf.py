"""RLHF from end to end: SFT, reward model and PPO as one pipeline, killed in the middle of every step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from running import SMALL_CAUSAL, command

from alignkit.config import conf_dir

SHARED = [
    "data=polite",
    "data.limit=24",
    "evaluate.rows=6",
    "evaluate.bootstrap=20",
    "run.threads=1",
    "run.save_every=1",
]
SFT = ["+algo=sft", *SMALL_CAUSAL, *SHARED, "algo.batch_size=8", "algo.steps=6", "algo.warmup=0", "evaluate.every=0",
       "evaluate.max_new_tokens=8", "evaluate.final=last"]  # fmt: skip
BT = ["+algo=bt", *SHARED, "model.config.hidden_size=16", "model.config.intermediate_size=32", "model.config.num_hidden_layers=1",
      "algo.batch_size=8", "algo.steps=6", "algo.warmup=0", "evaluate.every=2"]  # fmt: skip
PPO = ["+algo=ppo", "model.path={sft}", *SHARED, "reward=learned", "reward.model={rm}", "algo.steps=6", "algo.warmup=0",
       "algo.prompts_per_step=4", "algo.max_new_tokens=8", "evaluate.every=2", "evaluate.max_new_tokens=8",
       "evaluate.select=reward"]  # fmt: skip


@pytest.fixture
def preset(tmp_path: Path) -> list[str]:
    """``rlhf_tiny`` in small, as a preset of its own."""
    whole = yaml.safe_load((conf_dir() / "preset" / "rlhf_tiny.yaml").read_text())
    assert [words[0] for words in whole["steps"].values()] == [SFT[0], BT[0], PPO[0]]
    small = {**whole, "name": "rlhf_small", "steps": dict(zip(whole["steps"], (SFT, BT, PPO), strict=True))}
    (tmp_path / "mine" / "preset").mkdir(parents=True)
    (tmp_path / "mine" / "preset" / "rlhf_small.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump(small, sort_keys=False)
    )
    return ["--config-dir", str(tmp_path / "mine"), "+preset=rlhf_small", "run.wandb=disabled"]


def killed_in(step: str, words: list[str], root: Path) -> None:
    """Start the pipeline and kill it, with the step that runs, once that step has written a checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "alignkit", "train", *words, f"run.root={root}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    for _ in range(12000):
        if any(root.glob(f"*/{step}/checkpoint-[1-9]")):
            break
        assert process.poll() is None, f"the pipeline ended before {step} had begun"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not any(root.glob(f"*/{step}/result.json")), f"{step} was at its end: give it more steps"


def test_killed_in_every_step_it_ends_as_if_it_had_not_been(tmp_path: Path, preset: list[str]) -> None:
    once = command("train", *preset, f"run.root={tmp_path}/whole")
    assert once.returncode == 0, once.stderr
    for step in ("sft", "rm", "ppo"):
        killed_in(step, preset, tmp_path / "broken")
    last = command("train", *preset, f"run.root={tmp_path}/broken")
    assert last.returncode == 0, last.stderr
    for step in ("sft", "rm", "ppo"):
        whole, broken = (
            json.loads(next((tmp_path / root).glob(f"*/{step}/result.json")).read_text())
            for root in ("whole", "broken")
        )
        assert broken["resumes"] == 1
        assert broken["weights_sha256"] == whole["weights_sha256"]
    report = next((tmp_path / "broken").glob("*/report.md")).read_text()
    assert report in last.stdout
    assert "| rm | pairs ranked right % |  | " in report
    assert "| ppo | KL to the start, nats a response* | 0 | " in report
    reward = next(line for line in report.split("\n") if line.startswith("| ppo | reward |"))
    assert all(cell.strip() for cell in reward.split("|")[3:5])
    again = command("train", *preset, f"run.root={tmp_path}/broken")
    assert again.returncode == 0 and "is finished; nothing to do" in again.stdout
