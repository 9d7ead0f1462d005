"""``--dry-run`` says what a run would do, refuses what a run would refuse, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import SMALL_CAUSAL, SMALL_RL, SMALL_RUN, SMALL_SEQ2SEQ, SMALL_SFT, command, composed, train

from alignkit import gpus
from alignkit.config import SHARDED, SHARED, Model, check
from alignkit.dry_run import _clock, _size
from alignkit.errors import UserError
from alignkit.estimate import Held, Layers, Lengths, layers_in, needs, steps_of, work_of
from alignkit.loading import device_of
from alignkit.policy import load
from alignkit.stages import pipeline

ROOT = Path(__file__).parent.parent
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
    """1000 weights of 4 bytes, 500 of them trained. Of 800 in layers, 400 of them trained, four processes keep 200 and 100 each."""
    held = Held("x", 1000, 500, 4)
    assert (held.weights, held.part(4), held.trained_part(4)) == (4000, 4000, 2000)
    parted = Held("x", 1000, 500, 4, Layers(800, 400, 200))
    assert (parted.weights, parted.part(4), parted.trained_part(4)) == (4000, 4 * 400, 4 * 200)
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
    assert "this in 2" in line(cli("train", *FIT, "run.processes=2", "--dry-run")[1], "time")
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
    assert done.stdout.endswith("No mistake was found in the rest; a run ends with one where it cannot have these.\n")
    assert ("model       some-org/some-model could not be looked at: see the end." in done.stdout) == (
        "model.path" in words[-1]
    )
    assert "Traceback" not in done.stderr
    clean(tmp_path)


# ---- sweeps, pipelines, studies --------------------------------------------------------------------------------


def test_a_sweep_is_told_a_job_at_a_time_and_leaves_nothing(tmp_path: Path) -> None:
    done = command("train", "-m", *FIT, "seed=1,2", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"stage sft, seed (\d)", done.stdout) == ["1"]
    assert done.stdout.startswith("== job 0 (seed=1)\n")
    two = composed([*FIT, "seed=2"]).run.dir
    assert done.stdout.endswith(f"job 1 (seed=2): as job 0 but for its seed; {two}\n")
    assert "Launching" not in done.stdout + done.stderr
    clean(tmp_path)
    refused = command("train", "-m", *FIT, "hydra/sweeper=optuna", "--dry-run", cwd=tmp_path)
    assert refused.returncode == 2 and "chooses jobs by their results" in refused.stderr


def test_a_pipeline_is_looked_at_without_torch(tmp_path: Path) -> None:
    done = command("train", "+preset=sft_then_esrl", "--dry-run", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    imports = {line.rpartition("|")[2].strip() for line in done.stderr.split("\n") if line.startswith("import time:")}
    assert done.returncode == 0 and "step esrl" in done.stdout
    assert "alignkit.dry_run" in imports and "torch" not in imports


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


# ---- launchers -------------------------------------------------------------------------------------------------

SLURM = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=600",
         "hydra.launcher.mem_gb=64", "+hydra.launcher.additional_parameters.signal=TERM@300"]  # fmt: skip


def test_the_slurm_script_is_the_one_that_is_submitted(tmp_path: Path) -> None:
    """On a machine without sbatch; then with one, which keeps what it is given and has no queue."""
    words = ["train", *SLURM, *FIT, "seed=1,2", "algo.lr=1e-3,1e-4"]
    dry = command(*words, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    clean(tmp_path)
    script = "#!/bin/bash" + dry.stdout.split("#!/bin/bash")[1].split("\n\n\n")[0]
    flags = "array=0-3%4", "gpus-per-node=1", "time=600", "mem=64GB", "signal=TERM@300", "ntasks-per-node=1"
    for flag in (*flags, "job-name=alignkit-sft"):
        assert f"#SBATCH --{flag}\n" in script
    assert "submitit_slurm: 4 jobs. Nothing is submitted" in dry.stdout
    assert re.findall(r"(?m)^== (job \d) \(seed=(\d) ", dry.stdout) == [("job 0", "1"), ("job 1", "1")]
    assert re.findall(r"(?m)^(job \d) \(.*: as (job \d) but", dry.stdout) == [("job 2", "job 0"), ("job 3", "job 1")]
    (tmp_path / "bin").mkdir()
    for name, line in (("srun", "exit 1"), ("sbatch", f'cp "$1" {tmp_path}/given.sh; exit 1')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    real = command(*words, cwd=tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert real.returncode != 0
    assert (tmp_path / "given.sh").read_text().strip() == script.strip()


def test_processes_of_this_machine_are_counted(tmp_path: Path) -> None:
    words = ["-m", "hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=2", *FIT, "seed=1,2,3", "--dry-run"]
    done = command("train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = line(done.stdout, "launcher")
    assert told.startswith("submitit_local: 3 jobs, 2 at a time; 2 processes on this machine, started together")
    assert "after 60 minutes" in told and "none sees a GPU" in told
    assert re.findall(r"stage sft, seed (\d)", done.stdout) == ["1"]
    assert done.stdout.count(": as job 0 but for its seed") == 2
    twice = command("train", *words, "run.processes=2", cwd=tmp_path)
    assert "2 at a time; 4 processes on this machine" in line(twice.stdout, "launcher")
    assert "#SBATCH" not in twice.stdout and "GPU to itself" in line(twice.stdout, "processes")
    clean(tmp_path)


def test_a_launcher_that_is_not_installed(tmp_path: Path) -> None:
    code = "import sys; sys.modules['hydra_plugins.hydra_submitit_launcher'] = None; from alignkit.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *SLURM, *FIT, "--dry-run"], capture_output=True, text=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "pip install -e '.[slurm]'" in done.stderr and "Traceback" not in done.stderr
    clean(tmp_path)


@pytest.mark.parametrize(
    ("words", "asked", "said"),
    [
        ([], {"gpus-per-node": "4", "cpus-per-task": "4"}, ["note: run.processes=4, so a job asks for 4 GPUs", "note: a job asks for 4 cores"]),
        (["model.device=cpu"], {"cpus-per-task": "4"}, ["note: a job asks for 4 cores"]),
        (["hydra.launcher.gpus_per_node=2", "hydra.launcher.cpus_per_task=3"], {"gpus-per-node": "2", "cpus-per-task": "3"},
         ["but a job asks for 2: set hydra.launcher.gpus_per_node=4", "cpus_per_task=3 is less than one core a process"]),
        (["hydra.launcher.gres=gpu:a100:4", "hydra.launcher.cpus_per_task=8"], {"gres": "gpu:a100:4", "cpus-per-task": "8"}, []),
    ],
    ids=["nothing set", "no GPU", "too few", "enough"],
)  # fmt: skip
def test_a_job_asks_for_what_its_processes_need(
    words: list[str], asked: dict[str, str], said: list[str], tmp_path: Path
) -> None:
    """One task on one node, which starts four processes; ``run.processes`` may be a pipeline's, or one of its steps'."""
    slurm = ["train", "-m", "hydra/launcher=submitit_slurm", *words, "--dry-run"]
    for job in (
        ["+algo=ndr"],
        [*FIT, "run.processes=1,4", "run.root=r/${run.processes}"],
        ["+preset=sft_then_esrl", 'more.esrl="run.processes=4"'],
    ):
        done = command(*slurm, *job, "seed=1", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        flags = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", done.stdout))
        assert (flags["nodes"], flags["ntasks-per-node"]) == ("1", "1")
        told = [x for x in done.stdout.split("\n") if x.startswith(("note: ", "warning: "))]
        if job == ["+algo=ndr"]:  # a study is one process's
            assert told == []
            continue
        assert {k: v for k, v in flags.items() if k in ("gpus-per-node", "gres", "cpus-per-task")} == asked
        assert len(told) == len(said) and all(part in text for part, text in zip(said, told, strict=True))
    clean(tmp_path)


@pytest.mark.parametrize(("steps", "warned"), [(10, True), (11, False)])
def test_a_warm_up_that_is_the_whole_run_is_warned_of(steps: int, warned: bool, tmp_path: Path) -> None:
    done = command("train", *FIT, "algo.warmup=10", f"algo.steps={steps}", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("warning: algo.warmup=10 is not shorter than the run" in done.stdout) == warned


def test_more_tasks_than_one_are_warned_of(tmp_path: Path) -> None:
    slurm = ["train", "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "--dry-run"]
    done = command(*slurm, "+algo=ndr", "seed=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: hydra.launcher.tasks_per_node=2: each of them would run the whole job" in done.stdout


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command("train", *FIT, "run.root=file/runs", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert f"cannot be written, for {tmp_path / 'file'} cannot. Choose another run.root" in done.stderr


def test_the_disk_of_a_cluster_need_not_be_on_the_laptop(tmp_path: Path) -> None:
    """An ordinary user cannot write the folder in which ``run.root=/shared/runs`` would be made there."""
    (tmp_path / "file").touch()
    done = command(
        "train",
        "-m",
        "hydra/launcher=submitit_slurm",
        *FIT,
        "seed=1,2",
        "run.root=file/runs",
        "--dry-run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH" in done.stdout and done.stdout.count("of this machine cannot be written") == 1


def test_what_is_asked_for_is_what_is_submitted(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, line in (("srun", "exit 1"), ("sbatch", f'cp "$1" {tmp_path}/given.sh; exit 1')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    words = ["train", "-m", "hydra/launcher=submitit_slurm", *FIT, "run.processes=4", "seed=1"]
    real = command(*words, cwd=tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    script = (tmp_path / "given.sh").read_text()
    for flag in ("gpus-per-node=4", "cpus-per-task=4", "job-name=alignkit-sft"):
        assert f"#SBATCH --{flag}\n" in script
    assert "note: run.processes=4, so a job asks for 4 GPUs" in real.stderr


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_launcher_of_sweeps_wants_a_sweep(dry: list[str], cli: Cli, tmp_path: Path) -> None:
    """Hydra would run it here without a word; a preset may have chosen the launcher."""
    (tmp_path / "conf" / "preset").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - sft_rnnlg\n  - override /hydra/launcher: submitit_slurm\n"
    (tmp_path / "conf" / "preset" / "far.yaml").write_text(text)
    for words, launcher in (
        (["hydra/launcher=submitit_slurm", *FIT], "submitit_slurm"),
        (["hydra/launcher=submitit_local", *FIT], "submitit_local"),
        (["hydra/launcher=joblib", *FIT], "joblib"),
        (["--config-dir", "conf", "+preset=far"], "submitit_slurm"),
    ):
        code, out, err = cli("train", *words, *dry)
        assert (code, out) == (2, "")
        assert f"error: hydra/launcher={launcher} launches the jobs of a sweep" in err and "alignkit train -m" in err
    assert [p.name for p in tmp_path.iterdir()] == ["conf"]


def test_slurm_where_there_is_none(tmp_path: Path) -> None:
    done = command("train", *SLURM, *FIT, "seed=1,2", cwd=tmp_path, PATH=str(Path(sys.executable).parent))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "there is no sbatch on this machine" in done.stderr and done.stderr.count("error: ") == 1
    assert "--dry-run" in done.stderr and "hydra/launcher=submitit_local" in done.stderr
    assert not list(tmp_path.glob("runs/sweeps/*"))


# ---- several processes -----------------------------------------------------------------------------------------


def test_what_one_of_several_processes_holds_and_does(cli: Cli, tmp_path: Path) -> None:
    """Two prompts of four go to each of two; a layer's gradients and moments are halved by ``run.shard``, and no other's."""
    rl = [
        "+algo=reinforce",
        *SMALL_RL,
        *SMALL_CAUSAL,
        "data=arithmetic",
        "reward=chrf",
        "algo.k=2",
        "model.config.num_hidden_layers=3",
    ]
    alone, two, parted = (
        cli("train", *rl, *more, "--dry-run")[1]
        for more in ([], ["run.processes=2"], ["run.processes=2", "run.shard=true"])
    )
    assert not [x for x in alone.split("\n") if x.startswith("processes")]
    assert line(two, "processes").startswith("2 (run.processes) share out the passes of each step.")
    assert "cache of 8 responses" in line(alone, "sample needs") and "cache of 4 responses" in line(two, "sample needs")
    assert "Each holds the whole model" in two and "run.shard: each keeps its part of the layers" in parted

    def bytes_of(out: str, phase: str, what: str) -> float:
        found = re.search(rf"{what} ([\d.]+) (kB|MB)", line(out, f"{phase} needs"))
        assert found, out
        return float(found[1]) * {"kB": 1e3, "MB": 1e6}[found[2]]

    n, layers = bytes_of(two, "update", "weights"), 0.0
    assert bytes_of(two, "update", "moments") == pytest.approx(2 * n, abs=2e3)
    own = bytes_of(parted, "update", "its part of the weights")
    layers = 2 * (n - own)
    assert layers > 0
    for phase, what, wanted in (
        ("update", "moments", 2 * own), ("update", "gradients", own), ("update", "two layers together and the gradient of one", layers),
        ("sample", "weights", n), ("sample", "its part of the layers", layers / 2), ("sample", "moments", 2 * own),
    ):  # fmt: skip
        assert bytes_of(parted, phase, what) == pytest.approx(wanted, abs=3e3), (phase, what)
    there = cli("train", *rl, "run.processes=2", "run.shard=true", "run.offload=true", "--dry-run")[1]
    assert "moments" not in line(there, "update needs") and "moments" not in line(there, "sample needs")
    found = re.search(r"about ([\d.]+) kB of the processor's memory, of each process", line(there, "run.offload"))
    assert found and float(found[1]) * 1e3 == pytest.approx(4 * own, abs=4e3)
    many = cli("train", *rl, "run.processes=8", "--dry-run")[1]
    assert "warning: algo.prompts_per_step=4 is less than 8" in many
    clean(tmp_path)


def test_the_layers_are_those_that_the_processes_part(tmp_path: Path) -> None:
    """``spawned`` counts what each of three holds of a real model."""
    from group import spawned

    found = spawned(3, tmp_path)
    model: Any = composed(["+algo=sft", *SMALL_CAUSAL]).model
    reader = load(Model(config=dict(model.config), vocab_size=300, device="cpu"), 0, ["a b c d e"] * 50)
    n = sum(p.numel() for p in reader.model.parameters())
    held = Held("x", n, n, 1, layers_in(reader.model))
    assert n == found[0]["weights"]
    assert sum(held.part(3) for _ in found) == pytest.approx(sum(one["own"] for one in found))


def test_the_work_of_one_of_several_by_hand() -> None:
    """Supervised: half the tokens. RL with 5 prompts: 3 are drawn, the weights are read as often, half is learned from. A stage of
    one process: all."""
    from hydra.utils import instantiate

    fit: Any = composed([*FIT, "data.limit=40"])
    reader = load(
        Model(config=dict(fit.model.config), vocab_size=300, tokenizer="bundled:translation", device="meta"), 0
    )
    n = sum(p.numel() for p in reader.model.parameters())

    def work(words: list[str]) -> gpus.Work:
        cfg: Any = composed(words)
        found = work_of(cfg, instantiate(cfg.algo), reader, [], Lengths(3, 5, 4, 9), 40, 1)
        assert found is not None
        return found

    assert work([*FIT, "run.processes=2"]).operations == 6 * 8 * 8 * 6 * n / 2
    rl = work(["+algo=reinforce", *SMALL_RL, *SMALL_CAUSAL, "algo.k=2", "algo.prompts_per_step=5", "run.processes=2"])
    assert rl.operations == 6 * (3 * 3 * 2 * n + 5 * 2 * (3 + 8) * 6 * n / 2)
    assert rl.decoded == 6 * 3 * 2 * 8 * 2 * n
    assert rl.read == 6 * 8 * (4 * n + 3 * 2 * (3 + 4) * 2 * 16 * 4)
    refine = ["+algo=rejection", *SMALL_CAUSAL, "model.path=null", "algo.rows_per_part=5"]
    assert work([*refine, "run.processes=2"]) == work(refine)


def test_the_micro_batch_of_one_of_several() -> None:
    """``ranks.split``: no larger than its share of the step's tokens, nor smaller than the longest row."""
    from hydra.utils import instantiate

    def tokens(*words: str) -> str:
        cfg: Any = composed([*FIT, "algo.micro_tokens=1000", *words])
        reader = load(
            Model(config=dict(cfg.model.config), vocab_size=300, tokenizer="bundled:translation", device="meta"), 0
        )
        phases = needs(cfg, instantiate(cfg.algo), reader, [], Lengths(3, 5, 4, 40))
        return next(what for what, _ in phases["update"] if "activations" in what)

    assert tokens() == "activations of 320 tokens"
    assert tokens("run.processes=2") == "activations of 160 tokens"
    assert tokens("run.processes=64") == "activations of 40 tokens"
    assert tokens("algo.micro_tokens=100", "run.processes=2") == "activations of 100 tokens"


def test_the_steps_of_a_pipeline_that_are_shared_out(cli: Cli, tmp_path: Path) -> None:
    """``run.shard`` goes to those that can part their layers; the steps of others are left as they are."""
    code, out, err = cli("train", "+preset=srt_tiny", "run.processes=2", "run.shard=true", "--dry-run")
    assert code == 0, err
    said = dict(re.findall(r"(?m)^step (\w+) +stage (.*?): alignkit", out))
    parted = "composed and accepted, in 2 processes, each with a part of the layers"
    for text in said.values():
        stage, _, rest = text.partition(", ")
        shared, apart = stage in SHARED, stage in SHARDED
        wanted = parted if apart else "composed and accepted, in 2 processes" if shared else "composed and accepted"
        assert rest == wanted
    assert {text.partition(",")[0] in SHARDED for text in said.values()} == {True, False}
    clean(tmp_path)


def test_the_steps_of_a_pipeline_that_have_an_adamw() -> None:
    """``run.offload`` goes to the steps that train, before their own words."""
    cfg = composed(["+preset=srt_tiny", "run.offload=true"])
    commands = pipeline.steps(cfg)
    stages = {name: step.stage for name, step in pipeline.accept(commands, cfg.run).items()}
    assert {name: words[0] == "run.offload=true" for name, words in commands.items()} == {
        name: stage in ("sft", "pref", "rm", "rl", "distill", "select") for name, stage in stages.items()
    }
    assert set(stages.values()) >= {"sft", "refine"}


def test_a_pipeline_has_no_settings_of_a_step(cli: Cli, tmp_path: Path) -> None:
    for more in (["--dry-run"], []):
        code, _, err = cli("train", "+preset=rlhf_tiny", "evaluate.rows=10", *more)
        assert code == 2 and "evaluate.rows=10: a pipeline has no such settings" in err and "more.sft=" in err
        assert not list(tmp_path.rglob("result.json"))


def test_a_pipeline_hands_its_device_on() -> None:
    commands = pipeline.steps(composed(["+preset=srt_tiny", "model.device=cpu"]))
    assert len(commands) > 2 and all("model.device=cpu" in words for words in commands.values())


def test_both_responses_of_a_pair_are_passed_through_the_model(cli: Cli) -> None:
    """Three pairs at the longest row are six sequences; what is trained is the mean of both sides, of both."""
    _, out, _ = cli("train", "+algo=bt", "algo.batch_size=3", "algo.steps=1", "algo.micro_tokens=1000000", "--dry-run")
    longest = int(re.findall(r"longest row (\d+)", line(out, "lengths"))[0])
    assert f"activations of {6 * longest:,} tokens" in line(out, "update needs")
    both = int(re.findall(r"response (\d+)", line(out, "lengths"))[0])
    told = int(re.findall(r"about ([\d,]+) response tokens a step", line(out, "trained"))[0].replace(",", ""))
    assert told == pytest.approx(6 * both, abs=3)


@pytest.mark.parametrize("name", ["shard", "offload"])
def test_what_no_step_can_use_is_refused(name: str) -> None:
    evaluate = ["+algo=evaluate", "model.path=bundled:nlg", "data=rnnlg", "run.processes=2"]
    run = composed([*evaluate, f"run.{name}=true"]).run
    with pytest.raises(UserError, match=f"run.{name}: none of these steps can use it"):
        pipeline.accept({"measure": evaluate}, run)


def test_a_layer_that_is_computed_anew_is_cast_alone(cli: Cli) -> None:
    """Two bytes a weight of the whole model, or, with gradient checkpointing, of one layer of three and what is no layer."""
    words = [
        "+algo=sft",
        *SMALL_CAUSAL,
        *SMALL_RUN,
        "data=arithmetic",
        "model.compute=bfloat16",
        "model.config.num_hidden_layers=3",
    ]
    whole, anew = (
        cli("train", *words, f"model.gradient_checkpointing={on}", "--dry-run")[1] for on in ("false", "true")
    )
    model: Any = composed(words).model
    reader = load(Model(config=dict(model.config), vocab_size=300, device="cpu"), 0, ["a b c d e"] * 50).model
    n, layer = sum(p.numel() for p in reader.parameters()), sum(p.numel() for p in reader.model.layers[0].parameters())

    def kilobytes(out: str) -> float:
        found = re.search(r"bfloat16 copy ([\d.]+) kB", line(out, "update needs"))
        assert found
        return float(found[1])

    assert kilobytes(whole) * 1e3 - kilobytes(anew) * 1e3 == pytest.approx(2 * 2 * layer, abs=1e3)
    assert kilobytes(whole) == pytest.approx(2 * n / 1e3, abs=20)  # vocabularies differ a little


def test_started_by_torchrun_the_first_tells(tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "alignkit", "train", *FIT, "--dry-run"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dry run of sft") == 1
    assert line(done.stdout, "processes").startswith("2 (WORLD_SIZE)")
    clean(tmp_path)


# ---- GPUs ------------------------------------------------------------------------------------------------------


def test_time_and_memory_of_a_gpu_by_hand() -> None:
    """A peak of 100 a second, of which 30 are assumed; of 20 bytes a second half; of 10 bytes 9 are used."""
    gpu = gpus.GPU("x", 10, 100, 50, 20)
    assert gpu.holds(9) and not gpu.holds(9.01)
    assert gpus.Work(operations=60, bfloat16=True).seconds(gpu) == pytest.approx(2)
    assert gpus.Work(operations=60).seconds(gpu) == pytest.approx(4)
    assert gpus.Work(operations=60, decoded=30, read=50, bfloat16=True).seconds(gpu) == pytest.approx(2 + 5)
    assert gpus.Work(decoded=300, read=50, bfloat16=True).seconds(gpu) == pytest.approx(10)
    # twice 10 tokens of 3 responses, 200 operations each; 20 passes over 100 weights of 2 bytes and 3 caches of 4 + 5 tokens, on average
    work = gpus.decoding(steps=2, responses=3, prompt=4, new=10, weights=100, cache=8, width=2)
    assert (work.decoded, work.read) == (12000, 20 * (200 + 3 * 9 * 8))


def test_the_work_of_a_run_by_hand() -> None:
    """Supervised: 6 steps of 8 rows of 3 + 5 tokens, 6 operations a weight. RL: 6 steps of 4 prompts of 3 tokens, 2 responses of 8."""
    from hydra.utils import instantiate

    cfg: Any = composed([*FIT, "data.limit=40"])
    reader = load(
        Model(config=dict(cfg.model.config), vocab_size=300, tokenizer="bundled:translation", device="meta"), 0
    )
    n = sum(p.numel() for p in reader.model.parameters())
    work = work_of(cfg, instantiate(cfg.algo), reader, [], Lengths(3, 5, 4, 9), 40, 1)
    assert work is not None and (work.operations, work.decoded, work.bfloat16) == (6 * 8 * 8 * 6 * n, 0, False)
    frozen = Held("start model", 1000, 0, 4)
    half = composed([*FIT, "model.compute=bfloat16"])
    asked = work_of(half, instantiate(half.algo), reader, [frozen], Lengths(3, 5, 4, 9), 40, 2)
    assert asked is not None and asked.bfloat16
    assert asked.operations == pytest.approx(2 * work.operations + 2 * 6 * 8 * 8 * 2 * 1000)
    rl: Any = composed(["+algo=reinforce", *SMALL_RL, *SMALL_CAUSAL, "algo.k=2"])
    drawn = work_of(rl, instantiate(rl.algo), reader, [], Lengths(3, 5, 4, 9), 40, 1)
    assert drawn is not None
    assert drawn.operations == 6 * (4 * 3 * 2 * n + 8 * (3 + 8) * 6 * n)
    assert drawn.decoded == 6 * 8 * 8 * 2 * n
    assert drawn.read == 6 * 8 * (
        4 * n + 8 * (3 + 4) * 2 * 16 * 4
    )  # one layer: keys and values of 16 numbers of 4 bytes


def test_a_large_run_is_held_against_gpus_and_a_small_one_is_not(cli: Cli) -> None:
    """1.64 billion weights in 32 layers: 16 bytes of each are 26 GB, more than 24 GB and less than 40 GB."""
    assert "fits on" not in cli("train", *FIT, "--dry-run")[1]
    large = ["hidden_size=2048", "intermediate_size=5632", "num_hidden_layers=32", "num_attention_heads=16"]
    words = [*(f"model.config.{w}" for w in large), "algo.micro_tokens=64"]
    code, out, err = cli("train", *FIT, *words, "--dry-run")
    assert code == 0, err
    assert line(out, "fits on").split() == ["GPU", "evaluate", "update", "time"]
    rows = {
        r[0]: r[1:]
        for r in (re.split(r"  +", x.strip()) for x in out.split("\n"))
        if r[0] in {g.name for g in gpus.GPUS}
    }
    assert len(rows) == len(gpus.GPUS)
    assert rows["L4 24 GB"][:2] == ["fits", "no"] and rows["L4 24 GB"][2].startswith("(")
    assert rows["A100 40 GB"][:2] == ["fits", "fits"] and not rows["A100 40 GB"][2].startswith("(")
    assert "not measured" in out and "shared out evenly" not in out
    shared = cli("train", *FIT, *words, "run.processes=2", "--dry-run")[1]
    assert line(shared, "fits on").startswith("2 GPUs, each") and "Passes are taken to be shared out evenly" in shared


# ---- the page --------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "howto" / "cluster.md").read_text(encoding="utf-8")


def test_the_table_of_the_page_is_what_the_code_gives() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "cluster_table.py"))
    made["register"]()
    assert made["page"](PAGE) == PAGE
    assert PAGE.count("| `srt_tulu2_70b`, ") == 3


def test_what_the_page_says_is_assumed_is_assumed() -> None:
    for share, what in ((gpus.MFU, "of the peak"), (gpus.STREAMED, "of the bandwidth"), (gpus.KEPT, "of the memory")):
        assert f"{share:.0%} {what}" in PAGE


def test_the_commands_of_its_scripts_are_accepted() -> None:
    fences = re.findall(r"(?ms)^```sh\n(.*?)^```$", PAGE)
    scripts = [f for f in fences if "#SBATCH" in f]
    assert len(scripts) == 2  # each saves before its time is over, and asks no network of its nodes
    assert all("--signal=TERM@300" in s and "HF_HOME=" in s and "HF_HUB_OFFLINE=1" in s for s in scripts)
    told = [x for f in fences for x in f.replace("\\\n", " ").split("\n") if "alignkit train" in x]
    assert len(told) == 3
    for one in told:
        words = shlex.split(one.partition("alignkit train")[2])
        check(composed([w for w in words if not w.startswith("run.processes=")]))
