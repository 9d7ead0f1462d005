"""Read run directories, finished, unfinished and damaged ones; put those that differ in their seed alone together."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from alignkit.errors import UserError, suggest

DEPTH = 4  # folders below a named one in which runs are looked for
MARKS = ("config.yaml", "result.json", "metrics.jsonl")  # a folder with one of them is a run
NOT_RUNS = ("final", "parts", "reference", "wandb")
OUTPUTS = ("outputs-after.jsonl", "outputs-test.jsonl", "outputs-dev.jsonl")  # the final ones, the first that is there
EVALUATES = ("evaluate", "evaluate_rm", "evaluate_classes", "judge")
LEDGER = ("seconds/", "peak_mb/", "tokens/", "share/", "rows/", "evaluations/")  # of a line of metrics.jsonl
Json = dict[str, Any]
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Record:
    """What a run's directory says. What cannot be read is empty, and said in ``problems``."""

    folder: Path
    pipeline: Record | None = None  # of which it is a step
    step: str = ""
    problems: list[str] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    result: Json = field(default_factory=dict)  # empty: the run is not finished
    environment: Json = field(default_factory=dict)
    data: Json = field(default_factory=dict)
    logged: list[Json] = field(default_factory=list)  # the lines of metrics.jsonl
    starts: list[str] = field(default_factory=list)  # the lines of command.txt

    @property
    def name(self) -> str:
        return str(self._said("name") or self.folder.name)

    @property
    def stage(self) -> str:
        return str(self._said("stage") or "unknown")

    @cached_property
    def seed(self) -> int | None:
        """The seed; of an evaluation that of the runs whose models or outputs it measures, where their folders' names agree on it."""
        if self.stage in EVALUATES:
            named = json.dumps([_at(self.config, "model.path"), _at(self.config, "algo.outputs")], default=str)
            seeds = set(re.findall(r"-s(\d+)(?:-[0-9a-f]{8})?(?=[/\"#])", named))
            if len(seeds) == 1:
                return int(seeds.pop())
        seed, found = self._said("seed"), re.search(r"-s(\d+)(?:-|$)", self.folder.name)
        return seed if isinstance(seed, int) else int(found[1]) if found else None

    @property
    def finished(self) -> bool:
        return bool(self.result)

    @property
    def saved(self) -> bool:
        """Whether there is something from which its command goes on."""
        return (
            any(self.folder.glob("checkpoint-*[0-9]/state/run.json")) or (self.folder / "parts" / "run.json").is_file()
        )

    @property
    def steps(self) -> int:
        """Finished steps, as far as the log goes."""
        steps = self.result.get("steps")
        return steps if isinstance(steps, int) else max((line["step"] for line in self.logged), default=0)

    @cached_property
    def settings(self) -> Json:
        """Dotted key → value of the configuration, without seed, ``run.*`` and the seed in names of runs."""
        flat = _flat({k: v for k, v in self.config.items() if k not in ("seed", "run", "hydra")})
        return {key: _seedless(value, self.seed) for key, value in flat.items()}

    def _said(self, key: str) -> Any:
        # a pipeline's result is that of its last step but for these
        return self.result.get(key, self.config.get(key))

    def tested(self, when: str = "after") -> tuple[str, dict[str, Json]]:
        """(split, metric → ``{"value": …}``) of the held-out rows, after training or before."""
        found: Any = self.result.get("evaluation")
        if isinstance(found, dict) and ("after" in found or "before" in found):
            found = found.get(when)
        elif when == "before":
            found = {}
        for split in ("test", "dev") if isinstance(found, dict) else ():
            if isinstance(found.get(split), dict):
                cells = {name: _numbers_of(cell) for name, cell in found[split].items()}
                return split, {name: cell for name, cell in cells.items() if "value" in cell}
        return "", {}

    @property
    def held_out(self) -> tuple[str, ...] | None:
        """What says which rows were measured; None where it is not known."""
        split = self.tested()[0]
        digest = _at(self.data, "sha256", f"data.{split}")
        return (split, str(digest), str(_at(self.config, "evaluate", "rows"))) if digest else None

    @property
    def processes(self) -> tuple[int, ...]:
        """Numbers of processes that have shared its steps, the last start's first; empty where it does not say."""
        now, earlier = self.environment.get("processes"), self.environment.get("earlier_processes")
        counts = [now, *(earlier if isinstance(earlier, list) else [])]
        return tuple(n for n in counts if isinstance(n, int) and not isinstance(n, bool))

    def total(self, line: Json, kind: str) -> float | None:
        """A running sum at a line of the log: ``seconds`` of all phases but ``evaluate``, ``samples``, or ``tokens/…``."""
        if line["step"] == 0:
            return 0.0
        if kind == "seconds":
            spent = [
                v for k, v in line.items() if k.startswith("seconds/") and k != "seconds/evaluate" and _is_number(v)
            ]
            return sum(spent) if spent else None
        value = line.get(kind)
        return float(value) if _is_number(value) else None

    def outputs(self, when: str = "after") -> list[Json]:
        """The rows of the held-out outputs, from before or after."""
        names = OUTPUTS if when == "after" else ("outputs-before.jsonl",)
        file = next((self.folder / name for name in names if (self.folder / name).is_file()), None)
        return _lines(file, self) if file else []

    def samples(self) -> list[Json]:
        """What was drawn in training."""
        return [x for x in _lines(self.folder / "samples.jsonl", self) if isinstance(x.get("step"), int)]


@dataclass
class Configuration:
    """Runs that differ in their seed alone."""

    label: str
    runs: list[Record]

    @property
    def first(self) -> Record:
        return self.runs[0]

    @property
    def stage(self) -> str:
        return self.first.stage

    @property
    def finished(self) -> list[Record]:
        return [run for run in self.runs if run.finished]

    def values(self, metric: str, when: str = "after") -> dict[Any, float]:
        """Seed → a test metric, of finished runs."""
        found = {}
        for run in self.finished:
            cells = run.tested(when)[1]
            if metric in cells:
                found[run.seed] = float(cells[metric]["value"])
        return found


def collect(named: list[str]) -> tuple[list[Record], list[str]]:
    """(the runs in folders, sweeps and globs, pipelines followed by their steps; warnings about what held none).

    Raises:
        UserError: a path that is not there, a glob that matches nothing, no run in all of them.
    """
    runs: dict[Path, Record] = {}
    warnings: list[str] = []
    for word in named:
        before = len(runs)
        seen = False
        for folder in _folders(word):
            for run in _runs_in(folder, DEPTH, warnings):
                seen = True
                runs.setdefault(run.folder.resolve(), run)
        if len(runs) == before and not seen and Path(word).is_dir():
            warnings.append(f"{word} holds no run (no config.yaml, result.json or metrics.jsonl).")
    if not runs:
        raise UserError(
            f"{' '.join(named)}: there is no run in it. A run's folder holds config.yaml and, when it is finished, result.json."
        )
    return list(runs.values()), warnings


def _folders(word: str) -> list[Path]:
    path = Path(word).expanduser()
    if path.is_dir():
        return [path]
    if path.exists():
        return []  # a file that a shell's glob has caught
    if glob.has_magic(word):
        found = [Path(x) for x in sorted(glob.glob(str(path)))]
        if not found:
            raise UserError(f"{word}: nothing matches.")
        return [x for x in found if x.is_dir()]
    beside = [str(path.parent / x.name) for x in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{word}: no such run or folder.{suggest(str(path), beside) if len(beside) <= 40 else ''}")


def _runs_in(folder: Path, depth: int, warnings: list[str]) -> Iterator[Record]:
    if any((folder / mark).is_file() for mark in MARKS):
        run = read(folder)
        yield run
        steps = run.config.get("steps") if run.stage == "pipeline" else None
        for step in steps if isinstance(steps, dict) else ():
            if any((folder / step / mark).is_file() for mark in MARKS):
                yield read(folder / step, run, step)
        return
    if (folder / ".hydra").is_dir():
        warnings.append(f"{folder} was begun, but has no record: it failed, or was ended, before its first step.")
        return
    try:
        inside = sorted(folder.iterdir(), key=_by_number) if depth else []
    except OSError as e:
        warnings.append(f"{folder} cannot be read ({e.strerror}).")
        return
    for child in inside:
        if child.is_dir() and not child.name.startswith(".") and child.name not in NOT_RUNS:
            yield from _runs_in(child, depth - 1, warnings)


def _by_number(path: Path) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]


def read(folder: Path, pipeline: Record | None = None, step: str = "") -> Record:
    """A run's directory; nothing in it makes this fail."""
    run = Record(folder, pipeline, step)
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        config = yaml.load(text, YAML_LOADER)
        if isinstance(config, dict):
            run.config = config
        else:
            run.problems.append("config.yaml holds no settings")
    except (OSError, yaml.YAMLError) as e:
        run.problems.append(f"config.yaml cannot be read ({_why(e)})")
    run.result = _object(folder / "result.json", run)
    run.environment = _object(folder / "environment.json", run)
    run.data = _object(folder / "data.json", run)
    run.logged = [line for line in _lines(folder / "metrics.jsonl", run) if isinstance(line.get("step"), int)]
    try:
        starts = (folder / "command.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        run.starts = [x for x in starts if x]
    except FileNotFoundError:
        pass
    except OSError as e:
        run.problems.append(f"command.txt cannot be read ({_why(e)})")
    return run


def _object(path: Path, run: Record) -> Json:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        run.problems.append(f"{path.name} is no JSON object")
    except (OSError, ValueError) as e:
        run.problems.append(f"{path.name} cannot be read ({_why(e)})")
    return {}


def _lines(path: Path, run: Record) -> list[Json]:
    """The JSON objects of a file of lines; lines that are none are counted in the run's problems."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as e:
        run.problems.append(f"{path.name} cannot be read ({_why(e)})")
        return []
    found, broken = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                found.append(entry)
            else:
                broken.append(number)
    if broken:
        problem = f"{path.name}: {len(broken)} line{'s' if len(broken) > 1 else ''} cannot be read (the first is line {broken[0]})"
        if problem not in run.problems:
            run.problems.append(problem)
    return found


def _why(e: Exception) -> str:
    return str(getattr(e, "strerror", None) or str(e).split("\n")[0] or type(e).__name__)


def configurations(runs: Iterable[Record]) -> tuple[list[Configuration], list[str]]:
    """(runs grouped by all that is set but the seed, in the order of their first runs, seeds ascending; warnings).

    A seed that is there twice counts once: the finished run, or the one named first.
    """
    groups: dict[str, list[Record]] = {}
    for run in runs:
        parent = run.pipeline.settings if run.pipeline else None
        known = run.settings or str(run.folder)  # without a configuration nothing says what it belongs to
        key = json.dumps([run.stage, run.step, parent, known], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    warnings, kept = [], []
    for group in groups.values():
        by_seed: dict[Any, Record] = {}
        for run in group:
            other = by_seed.setdefault(run.seed, run)
            if other is not run:
                keep, drop = (run, other) if run.finished and not other.finished else (other, run)
                by_seed[run.seed] = keep
                warnings.append(f"{drop.folder} has the settings and the seed of {keep.folder}: it is left out.")
        kept.append(sorted(by_seed.values(), key=lambda run: -1 if run.seed is None else run.seed))
    return [Configuration(label, group) for label, group in zip(_labels(kept), kept, strict=True)], warnings


def _labels(groups: list[list[Record]]) -> list[str]:
    """The name of each group, with the settings that set it apart from groups of the same name."""
    bases = [f"{g[0].pipeline.name}/{g[0].step}" if g[0].pipeline else g[0].name for g in groups]
    labels = []
    for base, group in zip(bases, groups, strict=True):
        same = [g[0] for b, g in zip(bases, groups, strict=True) if b == base and g[0].stage == group[0].stage]
        everyone = [run.settings for run in same]
        own = group[0].settings
        if not differing(everyone) and all(run.pipeline for run in same):
            everyone = [run.pipeline.settings for run in same if run.pipeline]
            own = group[0].pipeline.settings if group[0].pipeline else {}
        keys = _telling(everyone)
        labels.append(" ".join([base, *(f"{_last(key, keys)}={_short(own.get(key))}" for key in keys)]))
    seen: dict[str, int] = {}
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        labels[i] = label if seen[label] == 1 else f"{label} ({seen[label]})"
    return labels


def _telling(settings: list[Json], most: int = 3) -> list[str]:
    """As few keys as tell the settings apart, one after the other the one that parts them best."""
    keys, chosen = differing(settings), list[str]()

    def parts(key: str) -> int:
        return len({json.dumps([one.get(k) for k in (*chosen, key)], default=str) for one in settings})

    while keys and len(chosen) < most and (not chosen or parts(chosen[-1]) < len(settings)):
        chosen.append(max(keys, key=parts))
    return chosen


def differing(settings: list[Json]) -> list[str]:
    """The keys whose values are not the same in all, or that some do not have, in order."""
    keys = list(dict.fromkeys(key for one in settings for key in one))
    return [key for key in keys if len({json.dumps(one.get(key), default=str) for one in settings}) > 1]


def _last(key: str, keys: list[str]) -> str:
    """The end of a dotted key, as far as it is needed to tell it from the others."""
    parts = key.split(".")
    for n in range(1, len(parts)):
        end = ".".join(parts[-n:])
        if sum(k == end or k.endswith("." + end) for k in keys) == 1:
            return end
    return key


def _short(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        value = value.rstrip("/").rpartition("/")[2]
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 30 else text[:29] + "…"


def _flat(value: Any, path: str = "") -> Json:
    if not isinstance(value, dict):
        return {path: value}
    found: Json = {}
    for key, item in value.items():
        found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found


def _seedless(value: Any, seed: int | None) -> Any:
    """Names of run directories with ``-s*`` for the seed and signature: the runs of a seed that build on each other differ in them."""
    if isinstance(value, str) and seed is not None:
        return re.sub(rf"-s{seed}(?:-[0-9a-f]{{8}})?(?=/|$)", "-s*", value)
    return [_seedless(item, seed) for item in value] if isinstance(value, list) else value


def _at(value: Any, *path: str) -> Any:
    """A value by keys; of one key, dots part it."""
    for key in path if len(path) > 1 else path[0].split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _numbers_of(cell: Any) -> Json:
    return {k: v for k, v in cell.items() if _is_number(v)} if isinstance(cell, dict) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
