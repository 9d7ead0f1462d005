"""A sweep: what became of each of its jobs, what the seeds say together, and the command for what is left.

Hydra composes and launches the jobs (`alignkit train -m …`) and calls ``Sweep`` before and after each, in the process that
runs it, whatever the launcher. The outcome lies in a file a job until the sweep has ended, so processes and machines need
nothing but the disk in common.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from alignkit import __version__
from alignkit.config import NEEDS, SHARED
from alignkit.errors import Stopped, UserError
from alignkit.files import write_atomically

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
SLURM = "submitit_launcher.SlurmLauncher"
DONE = ("ok", "skipped")  # the other states: failed, stopped, running, not run

_current: Sweep | None = None  # the sweep of this process: Hydra makes the callback and keeps it to itself


@contextmanager
def reported() -> Iterator[None]:
    """Around Hydra: however a sweep ends, its tables are printed and written, and the process leaves with 0 (all ok or
    finished before), 1 (some failed) or 130 (stopped). A single run passes through."""
    global _current
    _current = None
    try:
        yield
    except KeyboardInterrupt:
        if _current is None:
            raise
        sys.exit(_current.end(stopped=True))
    except Exception as e:
        if _current is None:
            raise
        if not _current.begun():
            gone = [tool for tool in ("sbatch", "srun") if shutil.which(tool) is None]
            if _current.slurm and gone:
                raise UserError(
                    f"hydra/launcher=submitit_slurm: there is no {gone[0]} on this machine. Start it where jobs are submitted; "
                    "--dry-run prints the script here, and hydra/launcher=submitit_local runs the jobs here, by the same code."
                ) from None
            if isinstance(e, OSError):
                raise UserError(
                    f"{_current.folder} cannot be written ({e.strerror}). Choose another run.root."
                ) from None
            raise
        sys.exit(_current.end(error=e))
    else:
        code = 0 if _current is None else _current.end()
        if code:
            sys.exit(code)
    finally:
        if _current is not None:
            _current.let_go()
        _current = None


class Sweep(Callback):
    """Hydra's callback: one job's failure is recorded and ends there; a stop ends the sweep."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # None: a single run
        self.jobs: dict[int, dict[str, Any]] = {}  # number → outcome
        self.own: dict[int, dict[str, Any]] = {}  # of the jobs of this process, whatever the disk could hold
        self.process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handler": None, "path": list(sys.path)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process of the launcher: what the command line has set up is set up here too."""
        from alignkit.config import register

        sys.path += [p for p in state.pop("path") if p not in sys.path]
        self.__dict__.update(state)
        register()

    # ---- Hydra's calls -------------------------------------------------------------------------------------

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        for text in self.begin(config):
            print(text, file=sys.stderr)

    def begin(self, config: DictConfig) -> list[str]:
        """Find out the jobs, and where they are recorded; what the launcher is made to ask for besides what is set, in words."""
        global _current
        self.words = sys.argv[1:]
        task: Any = OmegaConf.to_container(
            config.hydra.overrides.task, resolve=False
        )  # an interpolation is each job's own
        self.task = [str(word) for word in task]
        given = [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*given, *self.task])
        self.outlives = "submitit" in config.hydra.launcher._target_  # its jobs go on when this process ends
        self.grid = config.hydra.sweeper._target_ == BASIC  # other sweepers find out their jobs as they go
        if self.grid:
            from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

            self.jobs = {i: _job(i, words) for i, words in enumerate(BasicSweeper.split_arguments(parsed, None)[0])}
        settings = sorted(w for w in [*given, *self.task] if not w.lstrip("+").startswith("run."))
        digest = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:8]
        self.name = _name(parsed)
        self.folder = Path(config.run.root) / "sweeps" / f"{self.name}-{digest}"
        shutil.rmtree(self.folder / "jobs", ignore_errors=True)  # of a sweep that was killed
        with open_dict(config):  # what Hydra and its plugins leave goes here; jobs, composed anew, keep their run.root
            config.hydra.sweep.dir = str(self.folder)
        # before, between and after trainings SIGTERM is Ctrl-C: the sweep says what is left
        self.handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        _current = self
        self.slurm = config.hydra.launcher._target_.endswith(SLURM)
        self.processes = processes_of(config, self.jobs)
        launcher, told = config.hydra.launcher, same_run(self.jobs)
        if "submitit" not in launcher._target_:
            return told
        with open_dict(config):
            if launcher.name == config.hydra.job.name and not any(w.startswith("hydra.job.name=") for w in self.words):
                launcher.name = f"alignkit-{self.name}"
            return [*told, *equip(launcher, self.processes, config.model.device != "cpu")]

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.folder is None:
            return
        number, words = int(config.hydra.job.num), list(config.hydra.overrides.task)
        sys.argv = ["alignkit train", *self._flags(), *words]  # into the run's record: what repeats it alone
        self.result = Path(config.run.dir) / "result.json"
        self.stamp = _stamp(self.result)
        self.began = time.monotonic()
        self._note(number, {**_job(number, words), "status": "running", "directory": str(config.run.dir)})

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self.folder is None:
            return
        number = int(config.hydra.job.num)
        found: dict[str, Any] = {"status": "ok", "seconds": round(time.monotonic() - self.began, 3)}
        if job_return.status == JobStatus.FAILED:
            error = job_return._return_value  # the property would raise it
            found |= {"status": "stopped" if isinstance(error, Stopped) else "failed", "error": one_line(error)}
            if not isinstance(error, (UserError, Stopped)):
                found["traceback"] = "".join(traceback.format_exception(error))
                print(found["traceback"], file=sys.stderr)
            print(f"error: {found['error']}", file=sys.stderr, flush=True)
            del error
            # the sweeper goes on: None is no objective, so a study counts a failed trial
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        elif self.result.exists():
            found |= measured(self.result, config.evaluate.select)
            found["status"] = "skipped" if _stamp(self.result) == self.stamp else "ok"
        if not self.result.parent.is_dir():
            found["directory"] = ""
        self._note(number, self.own[number] | found)
        _free_memory()
        if found["status"] == "stopped" and os.getpid() == self.process:
            raise KeyboardInterrupt  # out of Hydra's loop

    # ---- the record ----------------------------------------------------------------------------------------

    def _note(self, number: int, outcome: dict[str, Any]) -> None:
        """Keep a job's outcome, and write it and the record; a disk that is full costs the record, not the sweep."""
        assert self.folder is not None
        self.own[number] = outcome
        try:
            (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "jobs" / f"{number}.json", json.dumps(outcome))
            self._write("running")
        except OSError as e:
            print(f"warning: the record of the sweep could not be written ({e.strerror}).", file=sys.stderr)

    def _collect(self) -> None:
        """Read what the processes have said of their jobs."""
        assert self.folder is not None
        for file in (self.folder / "jobs").glob("*.json"):
            self.jobs[int(file.stem)] = json.loads(file.read_text(encoding="utf-8"))
        self.jobs |= self.own

    def _write(self, status: str) -> None:
        assert self.folder is not None
        self._collect()
        jobs = [self.jobs[n] for n in sorted(self.jobs)]
        record = {
            "name": self.name, "status": status, "command": shlex.join(["alignkit", "train", *self.words]), "rerun": self.rerun(),
            "versions": _versions(), "jobs": jobs, "configurations": configurations(jobs),
        }  # fmt: skip
        text = f"# {self.name}\n\n`{record['command']}`\n\n{self.report()}\n"
        for name, content in (
            ("sweep.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n"),
            ("sweep.md", text),
        ):
            partial = (
                self.folder / "jobs" / f"{name}.{platform.node()}-{os.getpid()}"
            )  # processes write at the same time
            partial.write_text(content, encoding="utf-8")
            os.replace(partial, self.folder / name)

    def begun(self) -> bool:
        """Whether any job has; if none has, the sweep's folder goes."""
        assert self.folder is not None
        self._collect()
        if any(job["status"] != "not run" for job in self.jobs.values()):
            return True
        if not (self.folder / "sweep.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        return False

    def end(self, stopped: bool = False, error: Exception | None = None) -> int:
        """Complete the record, print it, and return the exit code."""
        assert self.folder is not None
        self._collect()
        running = [job for job in self.jobs.values() if job["status"] == "running"]
        if not self.outlives:
            for job in running:
                job["status"] = "stopped" if stopped else "failed"
                job["error"] = "stopped at once." if stopped else "its process was killed; it left no message."
            self.own = dict(self.jobs)
        try:
            (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
            self._write("stopped" if stopped else "broken off" if error else "finished")
            if not (self.outlives and (stopped or error)):
                shutil.rmtree(self.folder / "jobs", ignore_errors=True)
                for pickle in self.folder.glob(".submitit/**/*.pkl"):  # its logs stay
                    pickle.unlink()
        except OSError as e:
            print(f"warning: the record of the sweep could not be written ({e.strerror}).", file=sys.stderr)
        print(f"\n{self.report()}\n\nfiles: {self.folder}", flush=True)
        if self.outlives and (stopped or error):
            here = "" if self.slurm else "The jobs that Ctrl-C has reached too stop after their step. "
            print(
                f"{here}Jobs that run or wait in the queue go on, and write into these files when they end.",
                file=sys.stderr,
            )
        if error is not None:
            print(f"error: the sweep broke off: {one_line(error)}", file=sys.stderr)
        failed = error is not None or any(job["status"] == "failed" for job in self.jobs.values())
        return 130 if stopped else int(failed)

    def let_go(self) -> None:
        signal.signal(signal.SIGTERM, self.handler)

    # ---- what it says --------------------------------------------------------------------------------------

    def report(self) -> str:
        """Markdown: a line a job, errors, the command for what is left, and a line a configuration over its seeds."""
        jobs = [self.jobs[n] for n in sorted(self.jobs)]
        counts = {
            s: sum(job["status"] == s for job in jobs)
            for s in ("ok", "skipped", "failed", "stopped", "running", "not run")
        }
        parts = [jobs_table(jobs), ", ".join(f"{n} {s}" for s, n in counts.items() if n) + "."]
        errors = [f"- {job['job']} ({label(job, jobs)}): {job['error']}" for job in jobs if job["error"]]
        if errors:
            parts.append("errors:\n\n" + "\n".join(errors))
        rerun = self.rerun()
        if rerun:
            again = "Repeating the sweep does that too: finished jobs are skipped." if self.grid else ""
            parts.append(f"What is left, alone:\n\n    {rerun}\n\n{again}".rstrip())
        found = configurations(jobs)
        if any(c["test"] for c in found) and any(len(c["seeds"]) + len(c["missing"]) > 1 for c in found):
            parts.append("over seeds, mean and 95 % t-interval of test metrics:\n\n" + seeds_table(found))
        return "\n\n".join(parts)

    def rerun(self) -> str | None:
        """One command for the jobs that are not done: the least grid that has them all, of which finished ones are skipped."""
        left = [job for job in self.jobs.values() if job["status"] not in DONE]
        if not left:
            return None
        if not self.grid:  # drawn values make no grid
            words = [[*self._flags(), *_without_overwrite(job["overrides"])] for job in left]
            return "; ".join(shlex.join(["alignkit", "train", *w]) for w in words)
        values: dict[str, list[str]] = {}
        for word in (w for job in left for w in _without_overwrite(job["overrides"])):
            key, _, value = word.partition("=")
            values.setdefault(key, [])
            values[key] += [value] if value not in values[key] else []
        hydra = [w for w in self.words if w.startswith("hydra")]
        return shlex.join(
            ["alignkit", "train", "-m", *self._flags(), *hydra, *(f"{k}={','.join(v)}" for k, v in values.items())]
        )

    def _flags(self) -> list[str]:
        """The words of the command that are not the sweep's: --config-dir and its folder."""
        return [w for w in self.words if w not in (*self.task, "-m", "--multirun") and not w.startswith("hydra")]


def processes_of(config: DictConfig, jobs: dict[int, dict[str, Any]]) -> int:
    """The processes of the job that has most (``run.processes``, also of a pipeline's steps)."""
    stage = config.get("stage")
    if stage in NEEDS and stage not in (*SHARED, "pipeline"):
        return 1
    inside = OmegaConf.to_container(OmegaConf.masked_copy(config, ["steps", "more"]))  # words of a pipeline's steps
    words = json.dumps([inside, [job["overrides"] for job in jobs.values()]])
    return max([config.run.processes, *(int(n) for n in re.findall(r"\brun\.processes=(\d+)", words))])


def same_run(jobs: dict[int, dict[str, Any]]) -> list[str]:
    """A warning, in words, of jobs that would be one run in one directory: that differ in ``run.*`` alone."""
    seen: dict[tuple[str, ...], int] = {}
    for number, job in jobs.items():
        words = [str(w).lstrip("+") for w in job["overrides"]]
        if any(w.startswith(("run.root=", "run.dir=")) and "$" in w for w in words):
            return []
        own = tuple(
            sorted(w for w in words if not w.startswith("run.") or w.startswith(("run.root=", "run.dir=", "run.name=")))
        )
        earlier = seen.setdefault(own, number)
        if earlier != number:
            apart = {w.partition("=")[0] for w in {*words} ^ {str(w).lstrip("+") for w in jobs[earlier]["overrides"]}}
            which = ", ".join(sorted(apart)) or "nothing"
            return [
                f"warning: jobs {earlier} and {number} differ in {which} alone, which makes no other run: they have one directory, and the "
                "second finds the first one's result, or its lock. Give each its own, as with 'run.root=runs/${run.processes}'."
            ]
    return []


def equip(launcher: DictConfig, processes: int, on_gpus: bool) -> list[str]:
    """Have a submitit launcher ask for what a job of several processes needs: it is one task, which starts them on its node.

    Returns:
        What is asked for because nothing was set, and warnings of what was set too low, in words.
    """
    tasks = launcher.get("tasks_per_node") or 1
    told = [] if tasks == 1 else [
        f"warning: hydra.launcher.tasks_per_node={tasks}: each of them would run the whole job, and a run directory lets in one. Set 1; "
        "run.processes=N starts N processes in the one task."
    ]  # fmt: skip
    if processes == 1:
        return told
    slurm = launcher._target_.endswith(SLURM)
    more = launcher.get("additional_parameters") or {}
    named = [launcher.get(k) for k in ("gpus_per_node", "gpus_per_task", "gres")]
    named += [more.get(k) for k in ("gpus", "gpus-per-node", "gpus_per_node", "gpus-per-task", "gpus_per_task", "gres")]
    given = [str(one) for one in named if one is not None]
    if slurm and on_gpus and not given:
        launcher.gpus_per_node = processes
        told.append(
            f"note: run.processes={processes}, so a job asks for {processes} GPUs of its node (hydra.launcher.gpus_per_node; none with "
            "model.device=cpu)."
        )
    gpus = [int(found[1]) for one in given if (found := re.search(r"(\d+)$", one))]  # as in gpu:a100:4
    if gpus and 0 < max(gpus) < processes:
        told.append(
            f"warning: run.processes={processes} starts {processes} processes, each of which takes a GPU, but a job asks for "
            f"{max(gpus)}: set hydra.launcher.gpus_per_node={processes}."
        )
    cores = launcher.get("cpus_per_task")
    if slurm and cores is None and not launcher.get("cpus_per_gpu"):
        launcher.cpus_per_task = processes
        told.append(f"note: a job asks for {processes} cores, one a process (hydra.launcher.cpus_per_task).")
    elif cores is not None and cores < processes:
        told.append(
            f"warning: hydra.launcher.cpus_per_task={cores} is less than one core a process (run.processes={processes})."
        )
    return told


def jobs_table(jobs: list[dict[str, Any]]) -> str:
    """Markdown, a line a job."""
    lines = ["| job | settings | state | seconds | result | directory |", "|---|---|---|---|---|---|"]
    for job in jobs:
        seconds = "" if job["seconds"] is None else f"{job['seconds']:.1f}"
        result = " ".join(f"{name} {value:.4g}" for name, value in (job["result"] or {}).items())
        cells = [str(job["job"]), label(job, jobs), job["status"], seconds, result, job["directory"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def seeds_table(found: list[dict[str, Any]]) -> str:
    """Markdown, a line a configuration: what ``configurations`` found."""
    names = list(dict.fromkeys(name for c in found for name in c["test"]))
    lines = ["| configuration | n | " + "".join(f"{name} | " for name in names) + "missing seeds |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for c in found:
        cells = [c["configuration"].replace("|", "\\|"), str(len(c["seeds"]))]
        for name in names:
            cell = c["test"].get(name)
            text = "" if cell is None else f"{cell['mean']:.4g}"
            if cell and "low" in cell:
                text += f" [{cell['low']:.4g}, {cell['high']:.4g}]"
            cells.append(text + (f" (n = {cell['n']})" if cell and cell["n"] != len(c["seeds"]) else ""))
        lines.append("| " + " | ".join([*cells, ", ".join(c["missing"])]) + " |")
    return "\n".join(lines)


def configurations(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a configuration, which is what differs between jobs besides the seed: the seeds that are done, those that
    are missing, and of each test metric mean, n and, from two seeds on, the 95 % t-interval."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for job in jobs:
        groups.setdefault(tuple(w for w in job["overrides"] if _key(w) != "seed"), []).append(job)
    found = []
    for members in groups.values():
        done = [job for job in members if job["status"] in DONE]
        names = dict.fromkeys(name for job in done for name in job["test"])
        found.append({
            "configuration": label(members[0], jobs, seed=False), "seeds": [_seed(job) for job in done],
            "missing": [_seed(job) for job in members if job["status"] not in DONE],
            "test": {name: mean([job["test"][name] for job in done if name in job["test"]]) for name in names},
        })  # fmt: skip
    return found


def label(job: dict[str, Any], jobs: list[dict[str, Any]], seed: bool = True) -> str:
    """The words of a job that not all jobs have."""
    shared = set.intersection(*(set(other["overrides"]) for other in jobs))
    words = [w for w in job["overrides"] if w not in shared and (seed or _key(w) != "seed")]
    return " ".join(w.lstrip("+") for w in words) or "all"


def mean(values: list[float]) -> dict[str, float]:
    """Mean and n, and from two values on the 95 % t-interval ``low`` … ``high``."""
    from alignkit.report.stats import t_quantile  # here: every start would wait for what it imports

    n, middle = len(values), math.fsum(values) / len(values)
    if n < 2:
        return {"mean": middle, "n": n}
    spread = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1))
    half = t_quantile(n - 1) * spread / math.sqrt(n)
    return {"mean": middle, "n": n, "low": middle - half, "high": middle + half}


def measured(file: Path, select: str) -> dict[str, Any]:
    """Of a ``result.json``: ``test``, every test metric, and ``result``, the one to show: the metric that picks checkpoints, on
    test or, of a run without test rows, on dev."""
    result = json.loads(file.read_text(encoding="utf-8"))
    evaluation = result.get("evaluation") or {}
    after = evaluation.get("after", evaluation) or {}
    cells = after.get("test") or {}
    test = {k: c["value"] for k, c in cells.items() if isinstance(c, dict) and isinstance(c.get("value"), int | float)}
    best = result.get("best") or {}
    shown = {f"dev {select}": best["value"]} if "value" in best else {}
    if test:
        name = select if select in test else next(iter(test))
        shown = {f"test {name}": test[name]}
    return {"test": test, "result": shown or None}


def one_line(error: BaseException) -> str:
    """A message on one line; of what is no user's mistake with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (UserError, Stopped)) else f"{type(error).__name__}: {text}"


def _job(number: int, words: list[str]) -> dict[str, Any]:
    return {
        "job": number, "overrides": list(words), "directory": "", "status": "not run", "error": None, "seconds": None,
        "result": None, "test": {},
    }  # fmt: skip


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _seed(job: dict[str, Any]) -> str:
    return next((w.partition("=")[2] for w in job["overrides"] if _key(w) == "seed"), "0")


def _without_overwrite(words: list[str]) -> list[str]:
    """Finished runs of the grid are to be skipped, and a failed one goes on from its last checkpoint."""
    return [w for w in words if _key(w) != "run.overwrite"]


def _name(parsed: list[Any]) -> str:
    """``name=…`` where it is given, else the methods or presets."""
    found: dict[str, list[str]] = {}
    for override in parsed:
        if override.key_or_group in ("name", "preset", "algo"):
            listed = override.is_discrete_sweep()
            found[override.key_or_group] = (
                [str(v) for v in override.sweep_string_iterator()] if listed else [override.get_value_element_as_str()]
            )
    names = found.get("name") or [*found.get("preset", []), *found.get("algo", [])]
    return re.sub(r"[^\w-]+", "", "-".join(names))[:60] or "sweep"


def _stamp(file: Path) -> int | None:
    """When a file was written: a run that is finished leaves its result alone."""
    return file.stat().st_mtime_ns if file.exists() else None


def _versions() -> dict[str, str]:
    found = {"alignkit": __version__, "python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "hydra-core",
        "hydra-joblib-launcher",
        "hydra-submitit-launcher",
        "hydra-optuna-sweeper",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _free_memory() -> None:
    """A job's models are gone before the next job loads its own."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
