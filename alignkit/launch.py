"""From a composed configuration to a stage: check, directory, data, stage, report."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from alignkit import feedback, processes
from alignkit.config import SHARED, check, same_settings, same_sources
from alignkit.data import Data, Row, hash_source, overlap, read
from alignkit.errors import UserError
from alignkit.signature import file_of
from alignkit.unread import Watch, given

EVALUATES = (
    "evaluate",
    "evaluate_rm",
    "evaluate_classes",
    "judge",
)  # stages that learn nothing: no training rows are read, and they are done again
MODELS = (  # settings that may name the folder of a model or a run
    "model.path", "model.steer.value", "model.steer.minus", "algo.critic.model", "algo.teacher", "algo.selector",
)  # fmt: skip


def launch(cfg: DictConfig) -> dict[str, Any]:
    """Run one configuration; returns what ``result.json`` holds.

    A directory with a finished run is left alone (an evaluation is done again: the model may have changed), one with
    an unfinished run is gone on with. Nothing heavy is imported before the configuration and the data are checked.
    """
    check(cfg)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if processes.several():
        return take_part(cfg)
    data = None if cfg.stage in ("pipeline", "study") else _build(cfg.data, "data")
    if data and data.show:
        from alignkit.show import show_rows

        show_rows(cfg, data)
        return {}
    directory = Path(cfg.run.dir)
    with locked(directory):
        if cfg.run.overwrite:
            _clear(directory, cfg.run.root)
        done = _finished(cfg, directory, data)
        if done is not None:
            print(f"{directory} is finished; nothing to do. Start anew with run.overwrite=true.")
            return done
        _record_composition(cfg, directory / ".hydra")
        if cfg.stage == "pipeline":
            from alignkit.stages import pipeline

            return pipeline.run(cfg)
        if cfg.run.processes > 1 and cfg.stage in SHARED:
            processes.run(cfg, cfg.run.processes)
            finished: dict[str, Any] = json.loads((directory / "result.json").read_text(encoding="utf-8"))
            return finished
        if cfg.run.processes > 1:
            print(f"run.processes={cfg.run.processes}: stage {cfg.stage} runs in one process.", file=sys.stderr)
        return _run(cfg, data)


def take_part(cfg: DictConfig) -> dict[str, Any]:
    """Be one of the processes that torchrun or accelerate has started; what the first one finds.

    Raises:
        UserError: a stage whose work cannot be shared out.
    """
    refuse_unshared(cfg)
    from alignkit import ranks

    directory, data = Path(cfg.run.dir), _build(cfg.data, "data")
    with ranks.joined(cfg.run.patience):
        if data.show:
            if ranks.first():
                from alignkit.show import show_rows

                show_rows(cfg, data)
            ranks.barrier()  # torchrun stops all when one has failed
            return {}
        with locked(directory) if ranks.first() else nullcontext():
            if ranks.first() and cfg.run.overwrite:
                _clear(directory, cfg.run.root)
            ranks.barrier()
            done = ranks.agreed(_finished(cfg, directory, data))
            if done is None:
                if ranks.first():
                    _record_composition(cfg, directory / ".hydra")
                return _run(cfg, data)
            print(f"{directory} is finished; nothing to do. Start anew with run.overwrite=true.")
            return done


def refuse_unshared(cfg: DictConfig) -> None:
    """Of the processes that torchrun or accelerate has started.

    Raises:
        UserError: a stage whose work cannot be shared out; of a pipeline says how that of its steps can.
    """
    started = int(os.environ["WORLD_SIZE"])
    if cfg.run.processes not in (1, started):
        raise UserError(
            f"run.processes={cfg.run.processes}: torchrun or accelerate has started {started}. Leave it out."
        )
    if cfg.stage == "pipeline":
        raise UserError(
            "stage pipeline runs in one process, which starts the steps. Start it without torchrun or accelerate; "
            f"run.processes=N starts N processes of this machine for each step that they can share ({', '.join(SHARED)})."
        )
    if cfg.stage not in SHARED:
        raise UserError(f"stage {cfg.stage} runs in one process. Start it without torchrun or accelerate.")


def share_in(cfg: DictConfig, words: dict[str, str]) -> None:
    """Be one of the processes that ``launch`` has started; it holds the lock and has looked at what is there.

    Args:
        words: the settings that were given, as ``unread.given`` told there.
    """
    from alignkit import ranks

    with ranks.joined(cfg.run.patience):
        _run(cfg, _build(cfg.data, "data"), words)


def _record_composition(cfg: DictConfig, folder: Path) -> None:
    """What Hydra would write of a job. Hydra writes it before the job begins, where a folder that cannot be written would
    end a sweep instead of the job.

    Raises:
        UserError: the disk is full.
    """
    if not HydraConfig.initialized():
        return
    try:
        folder.mkdir(exist_ok=True)
        OmegaConf.save(cfg, folder / "config.yaml")
        OmegaConf.save(HydraConfig.instance().cfg, folder / "hydra.yaml")
        OmegaConf.save(HydraConfig.get().overrides.task, folder / "overrides.yaml")
    except OSError as e:
        raise UserError(
            f"{folder} cannot be written ({e.strerror}). Free some space, or choose another run.root."
        ) from None


def objective(result: dict[str, Any], cfg: DictConfig) -> float | None:
    """What a sweeper maximises: the selected metric on dev; None where there is no dev split."""
    return float(result["best"]["value"]) if result.get("best") else None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch's threads for one run; the next run of a sweep finds what was there before."""
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep a second process out of a run directory; the system lets go of the lock with the process.

    Raises:
        UserError: another process works there, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "a")  # noqa: SIM115
    except OSError as e:
        raise UserError(f"{directory} cannot be written ({e.strerror}). Choose another run.root or run.dir.") from None
    with lock as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process is working on this run. Wait for it, or stop it.") from None
        except (ImportError, OSError):
            pass  # no such locks here: two processes in one directory are then the user's care
        yield


def _run(cfg: DictConfig, data: Data | None, words: dict[str, str] | None = None) -> dict[str, Any]:
    with Watch(cfg, given(cfg) if words is None else words) as watch:
        watch.over("data")
        record = _read(cfg, data) if data else {"sha256": fingerprint(cfg, None)}
        with _threads(cfg.run.threads):
            return _run_stage(cfg, data, record, watch)


def _run_stage(cfg: DictConfig, data: Data | None, record: dict[str, Any], watch: Watch) -> dict[str, Any]:
    from alignkit.run import Run

    algo = _build(cfg.algo, "algo") if cfg.algo else None
    reward = _build(cfg.reward, "reward") if cfg.reward else None
    stage = importlib.import_module(f"alignkit.stages.{cfg.stage}")
    second = _build(cfg.audit.reward, "audit.reward") if cfg.audit.reward else None
    run = Run(cfg, record["sha256"], sys.argv, second)
    if data:
        run.write_json("data.json", record)
    watch.over("algo", "reward", "engine", "audit", "model", "evaluate")
    try:
        result: dict[str, Any] = stage.run(cfg, run, data, algo, reward)
        if not run.state:  # what was read before a resume is not known
            _tell_unread(cfg, run, result, watch.unread())
    finally:
        run.close()
    from alignkit.stages import evaluate

    print(getattr(stage, "report", evaluate.report)(result))
    return result


def _tell_unread(cfg: DictConfig, run: Any, result: dict[str, Any], unread: list[str]) -> None:
    """Say which given settings nothing has read, and note them in ``result.json``."""
    if cfg.stage in EVALUATES:  # `alignkit evaluate RUN` brings the data words of a training run
        unread = [one for one in unread if not one.startswith("data.")]
    result["unread"] = unread
    run.write_json("result.json", result)
    if unread:
        print(
            f"warning: these settings were given, but nothing in this run read them: {', '.join(unread)}.",
            file=sys.stderr,
        )


def _read(cfg: DictConfig, data: Data) -> dict[str, Any]:
    """Read every split that the stage wants; sources, counts, fingerprints, and what is odd about them."""
    wanted = ("dev", "test") if cfg.stage in EVALUATES else ("train", "dev", "test")
    rows = {split: data.rows(split) for split in wanted}
    record: dict[str, Any] = {
        "sources": {split: getattr(data, split) for split in wanted},
        "rows": {split: len(found) for split, found in rows.items()},
        "sha256": fingerprint(cfg, data, wanted),
    }
    for split, n in data.alike.items():
        print(
            f"warning: {n} {split} pairs are left out: both responses are the same ({len(rows[split])} remain).",
            file=sys.stderr,
        )
    for split, n in data.ties.items():
        print(f"warning: {n} {split} pairs are left out: both candidates are equally good.", file=sys.stderr)
    record |= {name: found for name, found in (("alike", data.alike), ("ties", data.ties)) if found}
    if "train" in rows:
        _tell_unused(data, rows["train"])
        n = overlap(rows["dev"], rows["test"])
        if n:
            print(
                f"warning: {n} of {len(rows['test'])} test prompts stand word for word in dev, which picks the best weights.",
                file=sys.stderr,
            )
        record["overlap"] = {split: overlap(rows["train"], rows[split]) for split in ("dev", "test") if rows[split]}
        for split, n in record["overlap"].items():
            if n:
                print(
                    f"warning: {n} of {len(rows[split])} {split} prompts stand word for word in the training data.",
                    file=sys.stderr,
                )
    return record


def _tell_unused(data: Data, rows: list[Row]) -> None:
    """Say that a data set of a run is read through a template that leaves out what the run has written."""
    if data.train is None or not Path(data.train).is_dir() or data.gives("pairs") or data.messages:
        return
    made = next(read(data.train))[1].get("response")
    if isinstance(made, str) and rows[0]["response"] != made:
        print(
            f"warning: {data.train} holds responses that a run has made (column response), but what is learned is "
            f"data.response={data.response!r}. To learn them set 'data.response=\"{{response}}\"'.",
            file=sys.stderr,
        )


def fingerprint(
    cfg: DictConfig, data: Data | None, splits: tuple[str, ...] = ("train", "dev", "test")
) -> dict[str, str]:
    """Setting → SHA-256 of what it names: the data files, and the files that a ``_target_`` outside alignkit names."""
    found = {f"data.{split}": digest for split, digest in data.fingerprint(splits).items()} if data else {}
    for name in ("data", "reward", "engine", "algo", "audit"):
        for path, target in _targets(OmegaConf.to_container(cfg[name], resolve=True), name):
            file = None if target.startswith("alignkit.") else file_of(target)
            if file is not None:
                found[path] = hashlib.sha256(file.read_bytes()).hexdigest()
    if cfg.stage in ("refine", "distill", "select"):
        found |= _inputs(cfg)
    if (
        cfg.algo.get("base") and Path(cfg.algo.base).expanduser().is_dir()
    ):  # a frozen model that another one is trained on
        found["algo.base"] = _hash_folder(Path(cfg.algo.base).expanduser())
    for name in ("reward", "audit"):
        for path, folder in _models(OmegaConf.to_container(cfg[name], resolve=True), name):
            found[path] = _hash_folder(folder)
    return found


def _inputs(cfg: DictConfig) -> dict[str, str]:
    """What a data set or a student is made of besides its rows: the model, and files, models and runs that the method names."""
    nodes: Any = OmegaConf.to_container(cfg.algo, resolve=True)
    found = {}
    model: Any = {"path": cfg.model.path, "steer": OmegaConf.to_container(cfg.model.steer)}
    for path, value in _leaves({"model": model, "algo": nodes}):
        if path.endswith((".not_in", ".donors")) and value:
            found[path] = hash_source(value)
        elif path in MODELS and value and Path(value).expanduser().is_dir():
            found[path] = _hash_folder(Path(value).expanduser())
    return found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _leaves(item, f"{path}.{key}" if path else key)


def _targets(value: Any, path: str) -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key == "_target_":
            yield f"{path}._target_", item
        yield from _targets(item, f"{path}.{key}")


def _models(value: Any, path: str) -> Iterator[tuple[str, Path]]:
    """Setting → folder of every model of a learned reward that lies on this machine."""
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == "model" and str(value.get("_target_", "")).endswith(".Learned"):
            several = isinstance(item, list)
            for i, name in enumerate(item if several else [item]):
                folder = Path(str(name)).expanduser()
                if folder.is_dir():
                    yield f"{path}.model[{i}]" if several else f"{path}.model", folder
        yield from _models(item, f"{path}.{key}")


def _hash_folder(folder: Path) -> str:
    """SHA-256 over the weights and settings of a model, of a run those of its final one."""
    folder = folder / "final" if (folder / "final").is_dir() else folder
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _finished(cfg: DictConfig, directory: Path, data: Data | None) -> dict[str, Any] | None:
    """The result of a finished run of this very configuration on these very data, if there is one."""
    file = directory / "result.json"
    if not file.exists() or cfg.stage in EVALUATES:
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    same_settings(directory, result["signature"], cfg)
    if data is not None:
        record = json.loads((directory / "data.json").read_text(encoding="utf-8"))["sha256"]
        same_sources(directory, {k: v for k, v in record.items() if v}, fingerprint(cfg, data), cfg)
    return result


def _build(node: DictConfig, name: str) -> Any:
    """Instantiate a node; a value that its class refuses is the user's mistake."""
    try:
        return instantiate(node, _convert_="object")
    except Exception as e:
        cause = e.__cause__ or e
        if isinstance(cause, (ValueError, TypeError, UserError)):
            raise UserError(f"{name}: {cause}") from None
        if isinstance(e, InstantiationException) and str(e).startswith("Error locating target"):
            while cause.__cause__:  # the fault in the user's file itself
                cause = cause.__cause__
            raise UserError(
                f"{name}: cannot import {str(e).split(chr(39))[1]}: {type(cause).__name__}: {cause}"
            ) from None
        raise


def _clear(directory: Path, root: str) -> None:
    """Empty a run directory, and take what it has spent on requests off the account of ``root``; a folder that no run has made is
    left alone.

    Raises:
        UserError: the folder holds something, but no run.
    """
    inside = [p for p in directory.iterdir() if p.name not in (".hydra", ".lock")]
    if inside and not (directory / "config.yaml").exists():
        raise UserError(f"{directory} holds files but no run (no config.yaml): run.overwrite=true does not empty it.")
    for path in inside:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    feedback.forget(Path(root) / feedback.FILE, str(directory.resolve()))
