"""``--dry-run`` says what a run would do, refuses what a run would refuse, and leaves nothing behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import SMALL_CAUSAL, SMALL_RL, SMALL_RUN, SMALL_SEQ2SEQ, SMALL_SFT, command, composed, train

from alignkit.config import Model
from alignkit.dry_run import Held, _clock, _size, steps_of
from alignkit.loading import device_of
from alignkit.policy import load

Cli = Callable[..., tuple[int, str, str]]
FIT = [*SMALL_SFT, *SMALL_CAUSAL]


def line(out: str, name: str) -> str:
    found = [x for x in out.split("\n") if x.startswith(f"{name} ")]
    assert len(found) == 1, out
    return found[0].removeprefix(name).strip()


def clean(folder: Path) -> None:
    assert list(folder.iterdir()) == []


# ---- what it says ----------------------------------------------------------------------------------------------


def test_a_supervised_run(cli: Cli, tmp_path: Path) -> None:
    """40 rows, 6 steps of 8: 48 rows are 1.2 passes; the parameters of the model are those of the real one."""
    code, out, err = cli("train", *FIT, "--dry-run")
    assert code == 0, err
    assert "stage sft, seed 0: nothing is run and nothing is written" in out
    assert line(out, "rows").startswith("train 40, dev ")
    assert line(out, "steps") == "6 optimizer updates of 8 rows, 1.20 passes over the rows."
    clean(tmp_path)
    trained = load(Model(path=str(train(tmp_path, *FIT)[1]), device="cpu"), 0)
    assert f": {sum(p.numel() for p in trained.model.parameters()):,} parameters" in line(out, "model")


def test_an_rl_run_with_a_critic_and_a_reference(cli: Cli, tmp_path: Path) -> None:
    """4 prompts of 2 samples of up to 8 tokens: 64 a step; 6 steps of 4 epochs of 2 minibatches: 48 updates."""
    words = [
        "+algo=ppo",
        *SMALL_RL,
        "algo.minibatches=2",
        "algo.epochs=4",
        "algo.kl=0.1",
        "data=rnnlg",
        "reward=length",
    ]
    code, out, err = cli("train", *words, "--dry-run")
    assert code == 0, err
    assert line(out, "steps") == "6 of 4 prompts with up to 2 samples (algo.k); 48 optimizer updates."
    assert line(out, "sampled").startswith("at most 64 tokens a step, 384 in all")
    beside = [x for x in out.split("\n") if x.startswith("beside it")]
    assert len(beside) == 2 and "critic" in beside[0] and "start model" in beside[1] and "frozen" in beside[1]
    clean(tmp_path)


def test_what_a_model_needs_is_that_of_the_arithmetic() -> None:
    """1000 weights of 4 bytes, 500 of them trained: 4000 bytes; gradients and two moments of the trained ones: 6000."""
    held = Held("x", 1000, 500, 4)
    assert (held.weights, held.learning) == (4000, 6000)
    assert [_size(x) for x in (2.5e9, 400e9, 3e6, 1500)] == ["2.5 GB", "400 GB", "3.0 MB", "2 kB"]
    assert [_clock(x) for x in (30, 600, 7200)] == ["30 s", "10 min", "2.0 h"]


def test_the_update_needs_weights_gradients_and_moments(cli: Cli) -> None:
    """Of N parameters in float32: 4 N bytes of weights, 4 N of gradients, 8 N of moments; a checkpoint has 12 N."""
    code, out, err = cli("train", "+algo=sft", "data=rnnlg", *SMALL_RUN, "--dry-run")
    assert code == 0, err
    n = sum(p.numel() for p in load(Model(path="bundled:nlg", device="cpu"), 0).model.parameters())
    assert f"{n:,} parameters, all trained" in line(out, "model")
    update = line(out, "update needs")
    assert (
        f"weights {_size(4 * n)}" in update
        and f"moments {_size(8 * n)}" in update
        and f"gradients {_size(4 * n)}" in update
    )
    assert f"4 checkpoints of {_size(12 * n)}" in line(out, "disk")


def test_with_adapters_little_is_trained(cli: Cli) -> None:
    """Rank 2 on the attention of one layer, two matrices of 16 by 16 (the second may be smaller): 2 · (16 + 16) each."""
    words = [*FIT, "model.lora.r=2", "model.lora.target_modules=[q_proj]"]
    code, out, err = cli("train", *words, "--dry-run")
    assert code == 0, err
    assert "64 trained" in line(out, "model")


def test_the_first_row_is_shown_as_the_model_reads_it(cli: Cli, tmp_path: Path) -> None:
    rows = [{"prompt": "one two", "response": "three"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, err = cli(
        "train",
        *FIT,
        "data=custom",
        "data.train=rows.jsonl",
        "data.test=rows.jsonl",
        "data.response='{response}'",
        "--dry-run",
    )
    assert code == 0, err
    assert "row 0" in out and "one two" in out
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


# ---- time ------------------------------------------------------------------------------------------------------


def test_time_is_that_of_a_run_of_the_same_method_and_model_and_else_not_known(cli: Cli, tmp_path: Path) -> None:
    assert line(cli("train", *FIT, "--dry-run")[1], "time").startswith("not known: no finished run")
    result, folder = train(tmp_path / "runs", *FIT)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    code, out, err = cli("train", *FIT, "seed=3", "algo.steps=60", "--dry-run")
    assert code == 0, err
    each = result["seconds"]["update"] / 6
    assert f"about {_clock(60 * each)} for 60 steps" in line(out, "time")
    assert f"{each:.2g} s a step that runs/{folder.name} took" in line(out, "time")
    other = cli("train", *FIT, "model.config.hidden_size=32", "--dry-run")[1]
    assert line(other, "time").startswith("not known")
    assert "algo.batch_size" in line(cli("train", *FIT, "algo.batch_size=4", "--dry-run")[1], "time")
    assert "holds a finished run" in cli("train", *FIT, "--dry-run")[1]
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


# ---- what it refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [*FIT, "algo.lr=fast"],
        [*FIT, "algo.lrr=1"],
        [*FIT, "data.train=nowhere.jsonl"],
        [*FIT, "data.prompt='{nothing}'"],
        [*FIT, "model.path=bundled:nothing"],
        [*FIT, "model.path=./nowhere"],
        [*FIT, "model.layers=3"],
        [*FIT, "model.config.model_type=nothing"],
        [*FIT, "model.device=cuda:7"],
        ["+algo=bt", "data=rnnlg"],
        ["+algo=kd"],
        ["+algo=best_of_n", "~reward"],
        ["+algo=esrl", "algo.lr=-1"],
        ["+algo=sft", "reward=learned", "reward.model=./nowhere", "data=rnnlg"],
        ["+preset=sft_then_esrl", "more.sft=algo.nothing=1"],
    ],
    ids=lambda words: " ".join((words[0], words[-1])),
)
def test_what_a_run_refuses_is_refused_in_the_same_words(words: list[str], cli: Cli, tmp_path: Path) -> None:
    dry = cli("train", *words, "run.wandb=disabled", "--dry-run")
    clean(tmp_path)
    real = cli("train", *words, "run.wandb=disabled", f"run.root={tmp_path.parent / 'elsewhere'}")
    assert real[0] == dry[0] == 2
    assert dry[2].split("error: ")[-1] == real[2].split("error: ")[-1]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["+algo=sft", "data=rnnlg", "model.path=some-org/some-model"], "the model some-org/some-model"),
        ([*FIT, "data.train=hf:some-org/some-data"], "the data"),
        ([*FIT, "reward=learned", "reward.model=some-org/some-model"], "reward: the reward model"),
    ],
)
def test_what_lies_on_the_hub_alone_could_not_be_checked(words: list[str], what: str, tmp_path: Path) -> None:
    """Offline; the rest is said, and it is no error."""
    done = command("train", *words, "--dry-run", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert f"could not be checked:\n  - {what}" in done.stdout
    assert "Traceback" not in done.stderr
    clean(tmp_path)


# ---- sweeps, pipelines, studies --------------------------------------------------------------------------------


def test_a_sweep_is_told_a_job_at_a_time_and_leaves_nothing(tmp_path: Path) -> None:
    done = command("train", "-m", *FIT, "seed=1,2", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"stage sft, seed (\d)", done.stdout) == ["1", "2"]
    clean(tmp_path)
    refused = command("train", "-m", *FIT, "hydra/sweeper=optuna", "--dry-run", cwd=tmp_path)
    assert refused.returncode == 2 and "chooses jobs by their results" in refused.stderr


def test_a_pipeline_names_its_steps(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("train", "+preset=sft_then_esrl", "--dry-run")
    assert code == 0, err
    assert "stage sft, composed and accepted: alignkit train +preset=sft_rnnlg" in line(out, "step sft")
    assert "stage rl, composed and accepted" in line(out, "step esrl")
    clean(tmp_path)


def test_a_study_is_checked(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("train", "+algo=ndr", "--dry-run")
    assert code == 0, err
    assert line(out, "study").startswith("NDR")
    clean(tmp_path)


def test_every_other_stage(cli: Cli, tmp_path: Path) -> None:
    """Encoders, pairs, parts and evaluations: each says its work and shows a row."""
    for words, work in (
        (["+algo=bt", *SMALL_RUN, "algo.steps=4"], "steps"),
        (["+algo=dpo", *SMALL_SEQ2SEQ, *SMALL_RUN, "algo.steps=4"], "steps"),
        (["+algo=finetune", "data.limit=48"], "steps"),
        (["+algo=rejection", "data.limit=8"], "parts"),
        (["+algo=evaluate", "model.path=bundled:nlg", "data=rnnlg", "evaluate.rows=7"], "work"),
        (["+algo=on_policy_kd", "algo.teacher=bundled:translation", "data.limit=8"], "steps"),
        (["+algo=inverse_value", "algo.base=bundled:lists", "data.limit=8"], "steps"),
    ):
        code, out, err = cli("train", *words, "--dry-run")
        assert code == 0, (words, err)
        assert line(out, work) and "row 0" in out and "could not be checked" not in out
    clean(tmp_path)


def test_steps_over_rows() -> None:
    """10 rows by 4, twice: 5 steps."""
    from alignkit.algos.sft import SFT

    cfg: Any = composed(["+algo=sft"])
    assert steps_of(cfg, SFT(epochs=2, batch_size=4), 10) == 5
    assert steps_of(cfg, SFT(epochs=2, batch_size=4), 0) is None
    assert device_of("cpu") == "cpu"
