"""``alignkit verify-resume``: a run that is killed and gone on with against one that nothing broke, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from alignkit.errors import UserError
from alignkit.feedback import TOTALS
from alignkit.signature import settings_of

CLOCK = ("seconds", "peak_mb", "share/", "tokens_per_second", "step_seconds")  # by the clock, or the process's memory
STARTS = (
    "resumes",
    "directory",
    "unread",
)  # of result.json: how often, where, and what a run alone says that was not resumed
LOADED = (
    "is_local",
    "local_files_only",
    "name_or_path",
    "_name_or_path",
)  # transformers' notes of where a model or tokenizer was read from
RECORDS = (
    ".hydra", ".lock", "command.txt", "config.yaml", "environment.json", "data.json", "wandb", "README.md",
    "training_args.bin", "trainer_state.json",  # TRL's: paths, clock times, and tokens that it counts from 0 after a resume
)  # fmt: skip
NOTHING_TO_RESUME = {
    "evaluate": "it measures and learns nothing, and is done again from the start",
    "evaluate_rm": "it measures and learns nothing, and is done again from the start",
    "evaluate_classes": "it measures and learns nothing, and is done again from the start",
    "pipeline": "its finished steps are skipped; verify a step by that step's own words",
}
PART = 4  # rows of a part of stage refine
WAIT = 0.001  # seconds between two looks at a run that is to be killed
TRIES = 3  # where a run is at its end before the signal reaches it


def without_clock(file: Path) -> list[dict[str, Any]]:
    """Lines of a ``metrics.jsonl`` without what depends on the clock or on the memory of the process."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in lines]


def main(words: list[str]) -> int:
    """``+algo=NAME [words …] [--steps N] [--more M]``."""
    numbers = {"--steps": 2, "--more": 2}
    rest = []
    left = iter(words)
    for word in left:
        flag, _, value = word.partition("=")
        if flag not in numbers:
            rest.append(word)
            continue
        value = value or next(left, "")
        if not value.isdecimal():
            raise UserError(f"{flag}: give a number, as in {flag} {numbers[flag]}.")
        numbers[flag] = int(value)
    return run(rest, numbers["--steps"], numbers["--more"])


def run(words: list[str], steps: int = 2, more: int = 2) -> int:
    """Train ``steps + more`` steps by ``words``, once unbroken and once killed twice; print what is the same or differs.

    SIGKILL comes when the checkpoint of step ``steps`` is there, and again when the run that goes on from it has done another
    step. What has no steps but is repeated (studies, judgements) is killed once it has begun.

    Returns:
        0 where the two are the same to the last bit, else 1; the runs are then kept.

    Raises:
        UserError: words that cannot be composed, a stage that resumes nothing, a run that fails or cannot be killed in time.
    """
    if steps < 1 or more < 2:
        raise UserError("verify-resume: --steps must be at least 1, and --more at least 2 (one to be killed in).")
    words = [*words, *_small(composed(words), words, steps, more)]
    cfg = composed(words)
    root = Path(tempfile.mkdtemp(prefix="alignkit-verify-"))
    paired = sys.platform == "linux" and (cfg.model.device == "cpu" or not Path("/dev/nvidiactl").exists())
    whole, broken = (root / side / str(cfg.run.name) for side in ("unbroken", "resumed"))
    started = []
    try:
        first = _start(words, whole, "unbroken")
        started.append(first)
        if not paired:  # a GPU's memory is for one of them
            _end(first, whole)
        told = _break(words, broken, cfg.stage, steps, more, started)
        _end(first, whole)
    finally:
        for process in started:
            process.kill()
            process.wait()
    compared, different = compare(whole, broken, cfg.stage)
    print(f"{cfg.name}: {_length(cfg, steps, more)} unbroken, and killed {told}.")
    if not different:
        print(f"OK: the same to the last bit: {compared}.")
        shutil.rmtree(root)
        return 0
    print("DIFFERENT: it does not go on as if it had not been killed.")
    print("\n".join(f"  {line}" for line in different))
    print(f"The first difference of each file, unbroken and resumed. The runs are kept: {whole} and {broken}.")
    return 1


def _length(cfg: DictConfig, steps: int, more: int) -> str:
    return (
        "once" if cfg.stage in ("study", "judge") else f"{steps + more} {'parts' if cfg.stage == 'refine' else 'steps'}"
    )


def composed(words: list[str]) -> DictConfig:
    """What ``alignkit train WORDS`` composes, checked.

    Raises:
        UserError: as ``alignkit train`` would say.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit import cli
    from alignkit.config import check, conf_dir, register

    register()
    folders = cli.use_config_dirs(words)
    plain = _without_flags(cli.hydra_words(words))
    if not any(w.startswith(("+algo=", "+preset=")) for w in plain):
        raise UserError("verify-resume: name a method with +algo=NAME.")
    if folders:
        plain.append(f"hydra.searchpath=[{','.join(f'file://{folder.resolve()}' for folder in folders)}]")
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", plain)
        check(cfg)
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(cli.uncomposed(e, words)) from None
    if cfg.stage in NOTHING_TO_RESUME:
        raise UserError(f"verify-resume: {cfg.stage} has nothing to resume: {NOTHING_TO_RESUME[cfg.stage]}.")
    return cfg


def _without_flags(words: list[str]) -> list[str]:
    from alignkit.cli import CONFIG_DIR

    for word in words:
        if word.startswith("-") and word.partition("=")[0] not in CONFIG_DIR:
            raise UserError(f"verify-resume: {word} is no flag of it; there are --steps, --more and --config-dir.")
    return [w for i, w in enumerate(words) if not w.startswith("-") and (not i or words[i - 1] not in CONFIG_DIR)]


def _small(cfg: DictConfig, words: list[str], steps: int, more: int) -> list[str]:
    """The words that make a run short: its length in any case, the rest unless ``words`` say something else."""
    total = steps + more
    takes = settings_of(cfg.algo["_target_"]) or {}
    forced: dict[str, Any] = {"run.save_every": steps, "run.wandb": "disabled", "run.overwrite": "false"}
    wanted: dict[str, Any] = {
        "evaluate.rows": 16,
        "evaluate.bootstrap": 20,
        "evaluate.every": steps,
        "evaluate.final": "last",
    }
    if cfg.stage == "refine":
        wanted["algo.rows_per_part"] = PART
        wanted["data.limit"] = total * int(
            next((w.partition("=")[2] for w in words if "algo.rows_per_part=" in w), PART)
        )
    elif "steps" in takes:
        forced["algo.steps"] = total
        wanted["algo.warmup"] = 1
    if cfg.stage == "select":
        wanted["algo.phases"] = 2
        wanted |= {"algo.episodes": 2} if "episodes" in takes else {}
    said = {w.partition("=")[0].lstrip("+") for w in words}
    return [f"{key}={value}" for key, value in {**{k: v for k, v in wanted.items() if k not in said}, **forced}.items()]


# ---- the two runs ----------------------------------------------------------------------------------------------------


def _start(words: list[str], directory: Path, log: str) -> subprocess.Popen[bytes]:
    """``alignkit train WORDS`` in ``directory``, as a process of its own that writes into ``log``."""
    place = [f"run.root={directory.parent}", f"run.dir={directory}"]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f"{log}.log", "wb") as out:
        return subprocess.Popen([sys.executable, "-m", "alignkit", "train", *words, *place], stdout=out, stderr=out)


def _end(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Wait for a run.

    Raises:
        UserError: it fails; with the end of what it said.
    """
    code = process.wait()
    if code:
        logs = sorted(directory.parent.glob("*.log"), key=lambda p: p.stat().st_mtime)
        said = logs[-1].read_text(encoding="utf-8", errors="replace").strip().split("\n")
        raise UserError(f"verify-resume: the run failed (exit {code}): {' '.join(said[-3:])} All it said: {logs[-1]}")


def _break(words: list[str], directory: Path, stage: str, steps: int, more: int, started: list[Any]) -> str:
    """Start a run, kill it, start it again, kill it, and let it finish; says where it was killed.

    Raises:
        UserError: it was at its end before a signal reached it, or began anew where it should have gone on.
    """
    metrics = directory / "metrics.jsonl"
    once = stage in ("study", "judge")
    breaks: list[Callable[[], bool]] = [lambda: saved(directory) >= steps, lambda: _last(metrics) > steps]
    end = None if stage == "select" else steps + more  # there it is the length of one training of many
    for _ in range(TRIES):
        shutil.rmtree(directory.parent, ignore_errors=True)
        kills: list[int] = []
        first = b""
        for k, ready in enumerate([lambda: True] if once else breaks):
            process = _start(words, directory, f"killed-{k + 1}")
            started.append(process)
            # a start is recorded when the lines of steps that are done again have been taken out
            while process.poll() is None and not (_starts(directory) > k and ready()):
                time.sleep(WAIT)
            process.kill()
            if process.wait() > 0:
                _end(process, directory)
            if (directory / "result.json").exists() or (k and end and saved(directory) >= end):
                break
            kills.append(_last(metrics))
            first = first or _until(metrics, steps)
        else:
            process = _start(words, directory, "resumed")
            started.append(process)
            _end(process, directory)
            if not _until(metrics, steps).startswith(first):
                raise UserError(
                    f"verify-resume: the run began anew instead of going on from step {steps}: lines of {metrics} were "
                    "written a second time."
                )
            if once:
                return "when it had begun"
            return f"in step {kills[0] + 1}, when step {steps} was saved, and again in step {kills[1] + 1}"
    raise UserError(
        f"verify-resume: the run was at its end before it could be killed, {TRIES} times: it ends by itself, or its steps are very "
        f"quick. Give it more of them with --more, or more to do in a step. It lies in {directory}."
    )


def _starts(directory: Path) -> int:
    record = directory / "command.txt"
    return record.read_bytes().count(b"\n") if record.exists() else 0


def saved(directory: Path) -> int:
    """The last step from which a run can go on, -1 where there is none."""
    steps = [
        int(p.name.rpartition("-")[2])
        for p in directory.glob("checkpoint-*[0-9]")
        if (p / "state" / "run.json").exists()
    ]
    parts = directory / "parts" / "run.json"
    if parts.exists():
        steps.append(int(json.loads(parts.read_text(encoding="utf-8"))["step"]))
    return max(steps, default=-1)


def _last(metrics: Path) -> int:
    """The last step of which a whole line is there, 0 before the first."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _until(metrics: Path, step: int) -> bytes:
    """The lines of steps up to ``step``, as they were written: with their clock times, which no second writing repeats."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return b"\n".join(line for line in lines if int(json.loads(line)["step"]) <= step)


# ---- what they wrote -------------------------------------------------------------------------------------------------


def compare(whole: Path, broken: Path, stage: str) -> tuple[str, list[str]]:
    """(what was compared, in words; the first difference of each file, the record of the steps first) of two run directories.

    Weights, optimizer and method state go bit for bit, the rest by value; what says when and where it was written, and what
    a critic's answers cost (a question on its way at a kill is asked twice), is left out.
    """
    from alignkit.run import hash_weights

    names = sorted(
        {p.relative_to(d) for d in (whole, broken) for p in _files(d)}, key=lambda n: (n.name != "metrics.jsonl", n)
    )
    left_out = CLOCK + STARTS + (TOTALS if stage in ("refine", "judge") else ())
    counts: Counter[str] = Counter()
    different = []
    for name in names:
        if not all((d / name).exists() for d in (whole, broken)):
            different.append(f"{name}: only the {'unbroken' if (whole / name).exists() else 'resumed'} run has it")
            continue
        clocked = name.name in ("metrics.jsonl", "result.json", "run.json")
        ignored = left_out if clocked else LOADED if name.name in ("config.json", "tokenizer_config.json") else ()
        found = next(_file_differences(whole / name, broken / name, ignored, counts), None)
        different += [f"{name}{found}"] if found else []
    said = [f"{counts['tensors']:,} tensors"] if counts["tensors"] else []
    said += [f"{n:,} lines of {file}" for file, n in counts.items() if file.endswith(".jsonl")]
    said += [f"{len(names)} files"]
    final = whole / "final"
    weights = f"; SHA-256 of the final weights {hash_weights(final)}" if any(final.glob("*.safetensors")) else ""
    return ", ".join(said) + weights, different


def _files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        inside = path.relative_to(directory).parts
        if path.is_file() and not set(inside) & set(RECORDS) and path.suffix not in (".svg", ".partial"):
            yield path


def _file_differences(one: Path, other: Path, left_out: tuple[str, ...], counts: Counter[str]) -> Iterator[str]:
    if one.suffix in (".safetensors", ".pt"):
        a, b = _tensors(one), _tensors(other)
        counts["tensors"] += sum(1 for _ in _leaves(a))
        if one.suffix == ".safetensors":
            b = _renamed(a, b)
        yield from differences(a, b, ": ")
    elif one.suffix == ".jsonl":
        lines = [[x for x in p.read_text(encoding="utf-8").split("\n") if x] for p in (one, other)]
        counts[one.name] += len(lines[0])
        for i, (x, y) in enumerate(zip(*lines, strict=False)):
            a, b = json.loads(x), json.loads(y)
            step = f" (step {a['step']})" if isinstance(a, dict) and "step" in a else ""
            yield from differences(a, b, f" line {i + 1}{step}: ", left_out)
        if len(lines[0]) != len(lines[1]):
            yield f": {len(lines[0])} lines, {len(lines[1])} lines"
    elif one.suffix == ".json":
        a, b = (json.loads(p.read_text(encoding="utf-8")) for p in (one, other))
        yield from differences(a, b, ": ", left_out)
    elif one.read_bytes() != other.read_bytes():
        yield ": other bytes"


def _renamed(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """``b`` with the names of ``a``, where equal tensors have other names: tied weights are saved under any of theirs."""
    left = [k for k in a if k not in b]
    found = {}
    for name, tensor in b.items():
        same = next((k for k in left if name not in a and not _apart(a[k], tensor)), name)
        left = [k for k in left if k != same]
        found[same] = tensor
    return found


def _tensors(file: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True, map_location="cpu")


def _leaves(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)


def differences(a: Any, b: Any, at: str, left_out: tuple[str, ...] = ()) -> Iterator[str]:
    """Every place where two values differ, in words; tensors by their bits.

    Args:
        at: what is said before the place.
        left_out: beginnings of keys that are not looked at.
    """
    import torch

    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if not str(key).startswith(left_out or ("\0",)):
                yield from differences(a.get(key, _Missing), b.get(key, _Missing), f"{at}{key}.", left_out)
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{at}{i}.", left_out)
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        found = _apart(a, b)
        if found:
            yield f"{at[:-1]} differs, {found}"
    elif a != b and not (a != a and b != b):
        yield f"{at[:-1]}: {_short(a)} unbroken, {_short(b)} resumed"


def _apart(a: Any, b: Any) -> str:
    """How far two tensors are apart, in words; empty where their bits are the same."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} unbroken, {b.dtype} {tuple(b.shape)} resumed"
    if torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))):
        return ""
    return f"max |difference| {float((a.double() - b.double()).abs().max()):.3g}"


class _Missing:
    """What stands for a key that one side does not have."""


def _short(value: Any) -> str:
    if value is _Missing:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "…"
