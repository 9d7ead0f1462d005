"""``alignkit train … --dry-run``: everything that a run does before its first step, and what it would need. Nothing is written.

Models are built on torch's meta device: they have their shapes, and no weights. So what is said of memory is an estimate, which
``estimate.py`` makes of the shapes.
"""

from __future__ import annotations

import atexit
import copy
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from alignkit import gpus, processes
from alignkit.config import check, whole
from alignkit.data import Data, Row
from alignkit.errors import UserError
from alignkit.estimate import (
    BYTES,
    Held,
    Lengths,
    Phases,
    beside,
    most_of,
    needs,
    offloaded,
    own_parameters,
    samples_of,
    shared,
    steps_of,
    work_of,
)
from alignkit.report.collect import _flat, differing
from alignkit.sweep import Sweep, label

LOOKED_AT = 512  # rows whose lengths are measured: the longest, by characters, and others spread evenly
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher"
SMALL = 1e9  # bytes that every GPU has: of a run that needs less, there is no table of them


@dataclass
class Found:
    """What a dry run has found out."""

    lines: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)  # what could not be, and why

    def say(self, name: str, text: str) -> None:
        self.lines.append(f"{name:<11} {text}")


def dry_run(cfg: DictConfig) -> None:
    """Check a composed configuration, its data and models, and print what a run of it would do and need.

    Raises:
        UserError: what a real run would refuse before its first step. A model or data set of the hub that is not in the cache
            is no mistake: it is said that it could not be checked.
    """
    check(cfg)
    if processes.several():
        from alignkit.launch import refuse_unshared

        refuse_unshared(cfg)
        if not processes.first():
            return
    if _like_an_earlier_job(cfg):
        return
    found, place = Found(), _there(Path(cfg.run.dir))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        if Launching.sweep is None or not Launching.sweep.slurm:
            raise UserError(f"{cfg.run.dir} cannot be written, for {place} cannot. Choose another run.root or run.dir.")
        found.unchecked.append(
            f"{cfg.run.dir}: {place} of this machine cannot be written; the jobs and the command that submits them have to."
        )
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(f"dry run of {cfg.name}, stage {cfg.stage}, seed {cfg.seed}: nothing is run and nothing is written.")
    print(f"directory   {cfg.run.dir}{_already(Path(cfg.run.dir))}")
    if cfg.stage == "pipeline":
        _pipeline(cfg, found)
    elif cfg.stage == "study":
        from alignkit.launch import _build

        algo = _build(cfg.algo, "algo")
        found.say("study", f"{type(algo).__name__}: an experiment without a language model; its settings are accepted.")
    else:
        _single(cfg, found)
    print("\n".join(found.lines))
    if found.unchecked:
        print("\ncould not be checked:\n" + "\n".join(f"  - {one}" for one in found.unchecked))
        print("No mistake was found in the rest; a run ends with one where it cannot have these.")


def _like_an_earlier_job(cfg: DictConfig) -> bool:
    """Of a job of a sweep say which it is; of one that differs from an earlier one in its seed alone that is all there is to say."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    assert Launching.sweep is not None
    number, jobs = int(HydraConfig.get().job.num), Launching.sweep.jobs
    which = f"job {number} ({label(jobs[number], [*jobs.values()])})"
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    settings["seed"] = settings["run"]["name"] = settings["run"]["dir"] = None
    earlier = Launching.told.setdefault(json.dumps(settings, sort_keys=True), number)
    if earlier != number:
        print(f"{which}: as job {earlier} but for its seed; {cfg.run.dir}{_already(Path(cfg.run.dir))}")
        return True
    print(f"{'' if number == 0 else chr(10)}== {which}")
    return False


def dry_words(words: list[str]) -> list[str]:
    """The words of a sweep without what Hydra and its callback would write: jobs run here, in turn.

    Raises:
        UserError: a sweeper that needs results, a launcher that is not installed.
    """
    sweeper = next((w for w in words if w.startswith("hydra/sweeper=")), None)
    if sweeper not in (None, "hydra/sweeper=basic"):
        raise UserError(f"--dry-run: {sweeper} chooses jobs by their results, of which there are none. Leave it out.")
    if not {"-m", "--multirun"} & set(words):
        return words
    launcher = next((w.partition("=")[2] for w in words if w.startswith("hydra/launcher=")), "")
    if launcher.startswith("submitit"):
        try:
            import hydra_plugins.hydra_submitit_launcher  # noqa: F401
        except ImportError:
            raise UserError(
                f"hydra/launcher={launcher}: hydra-submitit-launcher is not installed: pip install -e '.[slurm]' in alignkit's folder."
            ) from None
    folder = tempfile.mkdtemp(prefix="alignkit-dry-run-")  # Hydra notes the sweep in it
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [*words, f"hydra.sweep.dir={folder}", "hydra.callbacks.sweep._target_=alignkit.dry_run.Launching"]


class Launching(Callback):
    """Hydra's callback in the place of the sweep's: says what the launcher would do, and has the jobs looked at here instead."""

    sweep: Sweep | None = None
    told: ClassVar[dict[str, int]] = {}  # a configuration without its seed → the job of which all was said

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Launching.sweep, Launching.told = Sweep(), {}
        scratch, sweep = Path(config.hydra.sweep.dir), Launching.sweep
        real = copy.deepcopy(config)
        with open_dict(real):
            real.run.root = str(scratch)  # where it may clear up
            asked = sweep.begin(real)
            sweep.let_go()
            assert sweep.folder is not None
            real.hydra.sweep.dir = str(Path(config.run.root) / sweep.folder.relative_to(scratch))
            config.hydra.launcher = {"_target_": f"{BASIC_LAUNCHER}.BasicLauncher"}
        logging.getLogger(BASIC_LAUNCHER).setLevel(logging.WARNING)  # it would say that it launches jobs
        name = real.hydra.runtime.choices["hydra/launcher"]
        if name != "basic":
            given: Any = OmegaConf.to_container(real.hydra.launcher, resolve=True)
            size = real.hydra.sweeper.max_batch_size or len(sweep.jobs)
            asked = [launching(name, given, len(sweep.jobs), size, sweep.processes), *asked]
        if asked:
            print("\n".join([*asked, ""]), flush=True)


def launching(name: str, given: dict[str, Any], jobs: int, at_once: int, several: int = 1) -> str:
    """What a launcher would do with the jobs of a sweep.

    Args:
        given: its settings, as Hydra composes them.
        at_once: jobs that the sweeper hands it together, and waits for.
        several: processes that a job starts (``run.processes``).
    """
    batches = [min(at_once, jobs - i) for i in range(0, jobs, at_once)]
    told = f"launcher    {name}: {jobs} job{'s' if jobs > 1 else ''}" + (
        f", {at_once} at a time" if len(batches) > 1 else ""
    )
    if name == "submitit_local":
        n = given["tasks_per_node"] * several
        seen = (
            f"each sees GPUs of this machine: {given['gpus_per_node']}, the first ones"
            if given["gpus_per_node"]
            else "none sees a GPU (hydra.launcher.gpus_per_node=1 shows each of them the first)"
        )
        return (
            f"{told}; {batches[0] * n} processes on this machine, started together and ended after {given['timeout_min']} minutes "
            f"(hydra.launcher.timeout_min); {seen}. Their output: {given['submitit_folder']}."
        )
    if name != "submitit_slurm":
        return f"{told}, {', '.join(f'{k}={v}' for k, v in given.items() if v is not None and k != '_target_')}."
    from submitit.slurm.slurm import SlurmExecutor

    class Here(SlurmExecutor):
        """Submits nothing, so it needs no srun."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = Here(given["submitit_folder"], max_num_timeout=given["max_num_timeout"])
    own = {
        k: v for k, v in given.items() if v is not None and k not in ("_target_", "submitit_folder", "max_num_timeout")
    }
    executor._internal_update_parameters(**executor._convert_parameters(own))
    if batches[0] > 1:
        executor.parameters["map_count"] = batches[0]  # as map_array does
    script = executor._make_submission_file_text(executor._submitit_command_str, "")
    which = "the first script" if len(batches) > 1 else "the script"
    return f"{told}. Nothing is submitted; {which} that sbatch would be given:\n\n{script}"


def _already(directory: Path) -> str:
    if (directory / "result.json").is_file():
        return " (holds a finished run: the command would do nothing but say so)"
    begun = directory.is_dir() and (any(directory.glob("checkpoint-*")) or (directory / "parts").is_dir())
    return " (holds an unfinished run, which the command goes on with)" if begun else ""


def _pipeline(cfg: DictConfig, found: Found) -> None:
    """The steps, each composed and compared with its classes; its data and models may be those of an earlier step."""
    from alignkit.stages import pipeline

    commands = pipeline.steps(cfg)
    for name, step in pipeline.accept(commands, cfg.run).items():
        own = [w for w in commands[name] if not w.startswith(("run.", "seed="))]
        count, part = shared(step)
        among = f", in {count} processes{', each with a part of the layers' if part else ''}" if count > 1 else ""
        found.say(f"step {name}", f"stage {step.stage}, composed and accepted{among}: alignkit train {' '.join(own)}")
    found.lines.append(
        "Each step can be looked at by itself: its words and --dry-run, once the runs that it reads are there."
    )


# ---- one run ---------------------------------------------------------------------------------------------------


def _single(cfg: DictConfig, found: Found) -> None:
    from alignkit import launch

    data: Data = launch._build(cfg.data, "data")
    rows = _rows(cfg, data, found)
    algo = launch._build(cfg.algo, "algo") if cfg.algo else None
    learned: list[Held] = []
    for name in ("reward", "audit.reward"):
        node = OmegaConf.select(cfg, name)
        if node:
            learned += _reward(node, name, found)
    if cfg.stage == "rl" and cfg.engine:
        from alignkit import engines

        engines.build(cfg, algo)
        found.say("engine", f"{cfg.engine._target_.rpartition('.')[2]}; its own memory is not in what follows")
    prepared = _prepared(cfg, data, algo, rows)
    trl = _trl(cfg, algo, data, len(prepared)) if cfg.stage == "trl" else None
    reader, more = _models(cfg, data, algo, rows.get("train", []), found)
    lengths = _lengths(reader, prepared or rows.get("test") or rows.get("dev") or [], data) if reader else Lengths()
    _say_steps(cfg, algo, prepared, rows, lengths, found, trl)
    if reader is not None:
        _say_models(reader, cfg, [*more, *learned], found)
        _say_processes(cfg, algo, found)
        if cfg.stage == "trl":
            found.say("memory", "TRL's own; algo.trl.gradient_accumulation_steps cuts a step into parts.")
        else:
            sides = len(data.sides) if prepared and "chosen" in prepared[0] and cfg.stage in ("pref", "rm") else 1
            phases = needs(cfg, algo, reader, [*more, *learned], lengths, sides)
            _say_memory(phases, found)
            if cfg.run.offload:
                found.say("run.offload", f"besides, about {_size(offloaded(cfg, reader, [*more, *learned]))} of the processor's memory"
                          f"{', of each process' if shared(cfg)[0] > 1 else ''}: AdamW's copy of the weights, their gradients and moments.")  # fmt: skip
            work = work_of(cfg, algo, reader, [*more, *learned], lengths, len(prepared), sides)
            _say_gpus(phases, work, shared(cfg), found)
        _say_disk(cfg, reader, more, found)
    _say_time(cfg, algo, len(prepared), found)
    if reader is not None and (prepared or rows):
        from alignkit.show import console, render

        first = prepared[:1] or rows.get("train", [])[:1] or next((r[:1] for r in rows.values() if r), [])
        out = console()
        with out.capture() as captured:
            render(out, cfg.stage, reader, first, data)
        found.lines += ["", "the first row as the model reads it; [tokens] are the response:", captured.get().rstrip()]


def _rows(cfg: DictConfig, data: Data, found: Found) -> dict[str, list[Row]]:
    """The rows of every split; of hub data that are not in the cache, none."""
    from alignkit import launch

    named = [str(getattr(data, split)) for split in ("train", "dev", "test") if getattr(data, split)]
    try:
        record = launch._read(cfg, data)
    except UserError as e:
        if not any(source.startswith("hf:") for source in named) or not str(e).startswith("hf:"):
            raise
        found.unchecked.append(f"the data ({str(e).splitlines()[0]}): rows, lengths, steps by epochs and the example.")
        return {}
    counts = [f"{split} {n:,}" for split, n in record["rows"].items()]
    found.say("rows", ", ".join(counts))
    return {split: data.rows(split) for split in record["rows"]}


def _prepared(cfg: DictConfig, data: Data, algo: Any, rows: dict[str, list[Row]]) -> list[Row]:
    """The training rows as the method takes them: what it refuses is refused here."""
    train = rows.get("train", [])
    if not train or algo is None:
        return train
    if cfg.stage == "rm":
        from alignkit.stages.rm import refuse_other_data

        refuse_other_data(cfg, data, algo)
    if cfg.stage == "refine":
        if algo.needs_reward and not cfg.reward:
            raise UserError(f"{cfg.name} goes by a reward: choose one with reward=NAME (see `alignkit list`).")
        return list(algo.prepare(train))
    if hasattr(algo, "prepare"):
        return list(algo.prepare(train, data.sides))
    return train


def _trl(cfg: DictConfig, algo: Any, data: Data, rows: int) -> Any:
    """The configuration that TRL's trainer would be given: what it refuses is refused here."""
    from alignkit.stages.trl import configured

    return configured(cfg, algo, steps_of(cfg, algo, rows) or 1, len(data.sides))


def _reward(node: DictConfig, name: str, found: Found) -> list[Held]:
    """Build a reward; of learned ones only their models' shapes."""
    from alignkit import launch

    models = list(_learned(OmegaConf.to_container(node, resolve=True)))
    if not models:
        launch._build(node, name)
        return []
    held = []
    for path, dtype in models:
        try:
            shape = _shape(path, found, f"{name}: the reward model {path}", _reward_folder)
        except UserError as e:
            raise UserError(f"{name}: {str(e).replace('model.path', 'reward.model')}") from None
        if shape is not None:
            held.append(Held(f"reward model {path}", shape, 0, BYTES.get(dtype, 4)))
    return held


def _learned(value: Any) -> list[tuple[str, str]]:
    """(path, dtype) of every model that a reward reads."""
    if not isinstance(value, dict):
        return []
    inside = [one for item in value.values() for one in _learned(item)]
    if str(value.get("_target_", "")).endswith(".Learned"):
        paths = value["model"] if isinstance(value["model"], list) else [value["model"]]
        return [(str(path), value.get("dtype", "float32")) for path in paths] + inside
    return inside


def _reward_folder(path: str) -> str:
    from alignkit.reward_model import _folder

    return str(_folder(path))


def _shape(path: str, found: Found, what: str, folder: Callable[[str], str]) -> int | None:
    """Parameters of a model that is only read."""
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder(path))
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModel.from_config(config).parameters())
    except (OSError, ValueError, UserError) as e:
        if isinstance(e, UserError) and (Path(path).expanduser().exists() or path.startswith((".", "/", "~"))):
            raise
        found.unchecked.append(f"{what}: {' '.join(str(e).split())[:160]}")
        return None


def _models(cfg: DictConfig, data: Data, algo: Any, train: list[Row], found: Found) -> tuple[Any, list[Held]]:
    """(the model that is trained or read, without weights; the others beside it), None where it could not be had."""
    model: Any = OmegaConf.to_object(cfg.model)
    device, model.device = model.device, "meta"
    texts = data.texts() if train else []
    what = f"the model {model.path}" if model.path else "the model"
    if not model.path and not train and not model.tokenizer:
        found.unchecked.append("the model: its tokenizer is trained on the data.")
        return None, []
    try:
        _device(device)
        reader = _build_reader(cfg, model, algo, texts)
    except UserError as e:
        if not _of_hub(cfg) or "cannot be loaded" not in str(e):
            raise
        found.say("model", f"{model.path or 'its tokenizer'} could not be looked at: see the end.")
        found.unchecked.append(
            f"{what}, and with it parameters, memory, GPUs, disk, lengths and the example: {' '.join(str(e).split())}"
        )
        return None, []
    return reader, beside(cfg, algo, reader)


def _build_reader(cfg: DictConfig, model: Any, algo: Any, texts: list[str]) -> Any:
    from alignkit import classifier, policy, reward_model

    if cfg.stage == "evaluate_rm":
        return reward_model.build(model, reward_model.Reading(), cfg.seed, texts)
    if cfg.stage == "evaluate_classes":
        return classifier.load(model, cfg.seed)
    if algo is not None and hasattr(algo, "build") and cfg.stage != "pref":
        return algo.build(model, cfg.seed, texts, None)
    return policy.load(model, cfg.seed, texts)


def _of_hub(cfg: DictConfig) -> bool:
    """Whether a model of this configuration may be one of the hub: an id, no folder."""
    named = [cfg.model.path, cfg.model.tokenizer, cfg.algo.get("teacher"), cfg.algo.get("base"), cfg.model.steer.value]
    return any(p and not p.startswith(("bundled:", ".", "/", "~")) and not Path(p).exists() for p in named)


def _device(device: str) -> None:
    """Refuse a device that is not there, as a real run does."""
    from alignkit.loading import device_of

    device_of(device)


def _lengths(reader: Any, rows: list[Row], data: Data) -> Lengths:
    """Tokens of the longest rows and of others."""
    if not rows:
        return Lengths()
    sides = [side for side in data.sides if side in rows[0]] or ["response"]

    def characters(row: Row) -> int:
        return len(str(row["prompt"])) + max(len(row.get(side) or "") for side in sides)

    longest = sorted(rows, key=characters, reverse=True)[: LOOKED_AT // 8]
    spread = rows[:: max(1, len(rows) // LOOKED_AT)][:LOOKED_AT]

    def tokens(some: list[Row]) -> list[tuple[int, list[int]]]:
        prompts = [len(ids) for ids in reader.prompt_ids(some)]
        if hasattr(reader, "labels"):
            return [(n, [1]) for n in prompts]
        answers = [[len(reader.encode_responses([row[s]])[0]) if row.get(s) else 0 for s in sides] for row in some]
        return list(zip(prompts, answers, strict=True))

    long, usual = tokens(longest), tokens(spread)
    return Lengths(
        sum(p for p, _ in usual) / len(usual),
        sum(sum(each) / len(each) for _, each in usual) / len(usual),
        max(p for p, _ in long + usual),
        max(p + max(each) for p, each in long + usual),
    )


# ---- what is said ----------------------------------------------------------------------------------------------


def _say_models(reader: Any, cfg: DictConfig, more: list[Held], found: Found) -> None:
    all_of_it, trained = own_parameters(reader, cfg)
    what = cfg.model.path or "built from scratch"
    how = "none is trained" if not trained else "all trained" if trained == all_of_it else f"{trained:,} trained"
    kind = f"{reader.model.config.model_type}, {reader.kind}"
    found.say("model", f"{what} ({kind}): {all_of_it:,} parameters, {how}, {cfg.model.dtype}.")
    for one in more:
        how = (
            "frozen" if not one.trained else "trained" if one.trained == one.parameters else f"{one.trained:,} trained"
        )
        found.say("beside it", f"{one.what}: {one.parameters:,} parameters, {how}.")


def _say_steps(
    cfg: DictConfig,
    algo: Any,
    prepared: list[Row],
    rows: dict[str, list[Row]],
    lengths: Lengths,
    found: Found,
    trl: Any = None,
) -> None:
    if prepared and len(prepared) != len(rows.get("train", [])):
        found.say("taken", f"{len(prepared):,} training rows, as the method prepares them.")
    if lengths.longest:
        found.say(
            "lengths",
            f"prompt {lengths.prompt:.0f} tokens, response {lengths.response:.0f} (means); longest row {lengths.longest}.",
        )
    steps = steps_of(cfg, algo, len(prepared))
    if steps is None:
        if cfg.stage in ("evaluate", "evaluate_rm", "evaluate_classes", "judge"):
            n = len(rows.get("test") or rows.get("dev") or [])
            found.say("work", f"{min(n, cfg.evaluate.rows or n):,} rows are measured.")
        return
    if cfg.stage == "rl":
        most, why = samples_of(algo)
        drawn = algo.prompts_per_step * most
        found.say("steps", f"{steps:,} of {algo.prompts_per_step} prompts with up to {most} samples ({why}); "
                           f"{steps * algo.epochs * algo.minibatches:,} optimizer updates.")  # fmt: skip
        found.say("sampled", f"at most {drawn * algo.max_new_tokens:,} tokens a step, {steps * drawn * algo.max_new_tokens:,} in all"
                            + (f"; ends at algo.token_budget={algo.token_budget:,}." if algo.token_budget else "."))  # fmt: skip
        tokens = drawn * algo.max_new_tokens * algo.epochs
        found.say("trained", f"at most {tokens:,} response tokens a step, {steps * tokens:,} in all.")
    elif cfg.stage == "trl" and algo.needs_reward:
        # in micro-batches, of which TRL counts steps_per_generation and num_iterations
        samplings = math.ceil(steps * algo.parts / (trl.steps_per_generation * trl.num_iterations))
        each, longest = trl.generation_batch_size, algo.max_new_tokens
        found.say("steps", f"{steps:,} optimizer updates of {algo.prompts_per_step} prompts with {algo.k} samples (algo.k), "
                           f"{samplings * each / algo.k / max(1, len(prepared)):.2f} passes over the rows.")  # fmt: skip
        found.say("sampled", f"at most {each * longest:,} tokens a sampling, {samplings * each * longest:,} in all ({samplings:,} "
                             f"samplings of {each} responses).")  # fmt: skip
        tokens = algo.per_step(1) * longest
        found.say("trained", f"at most {tokens:,} response tokens a step, {steps * tokens:,} in all.")
    elif cfg.stage == "refine":
        found.say(
            "parts", f"{steps:,} of {algo.rows_per_part} rows; at most {algo.max_new_tokens} tokens a draft or sample."
        )
    else:
        paired = cfg.stage in ("pref", "rm") or (cfg.stage == "trl" and algo.trainer != "SFT")
        sides = 2 if paired and prepared and "chosen" in prepared[0] else 1
        each = algo.batch_size * sides * lengths.response
        episodes = f" ({algo.episodes_} student trainings)" if cfg.stage == "select" else ""
        found.say("steps", f"{steps:,} optimizer updates of {algo.batch_size} rows{episodes}, {steps * algo.batch_size / max(1, len(prepared)):.2f} "
                           f"passes over the rows.")  # fmt: skip
        if each:
            found.say("trained", f"about {each:,.0f} response tokens a step, {steps * each:,.0f} in all.")
    if getattr(algo, "warmup", 0) >= steps:
        found.lines.append(
            f"            warning: algo.warmup={algo.warmup} is not shorter than the run ({steps:,} steps)."
        )
    every = cfg.evaluate.every
    held = {s: min(len(r), cfg.evaluate.rows or len(r)) for s, r in rows.items() if s != "train" and r}
    if cfg.stage not in ("refine", "select") and held:
        times = (1 + math.ceil(steps / every)) if every and held.get("dev") else 0
        found.say("evaluate", f"dev {held.get('dev', 0)} rows up to {times} times, test {held.get('test', 0)} rows "
                              f"{_tested(cfg)}.")  # fmt: skip


def _tested(cfg: DictConfig) -> str:
    """When the test rows are measured; a model from scratch is not measured before it is trained, but by rl."""
    if not cfg.evaluate.test:
        return "never"
    return "before and after" if cfg.model.path or cfg.stage == "rl" else "after"


def _say_memory(phases: Phases, found: Found) -> None:
    for name, parts in phases.items():
        text = ", ".join(f"{what} {_size(amount)}" for what, amount in parts)
        found.say(f"{name} needs", f"about {_size(sum(a for _, a in parts))}: {text}.")
    if phases:
        found.lines.append(
            "            An estimate: parameters times bytes of a weight, AdamW's moments twice the trained ones; activations 34 bytes a\n"
            "            token, layer and width in 16 bits (68 in float32), at the longest rows and the full micro-batch; not what the\n"
            "            libraries and the allocator hold themselves."
        )


def _say_processes(cfg: DictConfig, algo: Any, found: Found) -> None:
    """What one of several processes is assumed to hold and to do."""
    count, part = shared(cfg)
    if count == 1:
        if cfg.run.processes > 1:
            found.say(
                "processes",
                f"1: run.processes={cfg.run.processes} is for stages that several share, not for {cfg.stage}.",
            )
        return
    why = "WORLD_SIZE" if processes.several() else "run.processes"
    found.say(
        "processes",
        f"{count} ({why}) share out the passes of each step. Memory and time are those of one of them, which has a GPU to itself; "
        f"on processors all {count} are in the memory of their machine.",
    )
    text = "Each holds the whole model, and its gradients and moments."
    if part:
        text = (
            "run.shard: each keeps its part of the layers, of their gradients and their moments; embeddings, last norm, head and\n"
            "            other models it holds whole, and to sample, evaluate and save the layers too."
        )
    found.lines.append(f"            {text}")
    work = getattr(algo, "prompts_per_step" if cfg.stage == "rl" else "batch_size", count)
    if work < count:
        what = "algo.prompts_per_step" if cfg.stage == "rl" else "algo.batch_size"
        found.lines.append(
            f"            warning: {what}={work} is less than {count}: some have nothing to do in a step."
        )


def _say_gpus(phases: Phases, work: gpus.Work | None, among: tuple[int, bool], found: Found) -> None:
    """A table of GPUs, of a run that not every one of them holds with ease."""
    most = most_of(phases)
    if max(most.values(), default=0.0) < SMALL:
        return
    count, part = among
    lines = [["GPU" if count == 1 else f"{count} GPUs, each", *most, "time"]]
    for gpu in gpus.GPUS:
        time = "–" if work is None else _clock(work.seconds(gpu))
        fits = all(gpu.holds(need) for need in most.values())
        lines.append(
            [gpu.name, *("fits" if gpu.holds(need) else "no" for need in most.values()), time if fits else f"({time})"]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for i, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        found.say("fits on" if i == 0 else "", text)
    found.lines += [f"            {line}" for line in (*gpus.ASSUMED, "In brackets: of a GPU as fast that held it.")]
    if count > 1:
        found.lines.append(
            f"            Passes are taken to be shared out evenly (sampling by whole prompts); that processes wait for each other and for\n"
            f"            messages (gradients{', layers' if part else ''}) is not counted."
        )


def _say_disk(cfg: DictConfig, reader: Any, more: list[Held], found: Found) -> None:
    from alignkit.launch import EVALUATES

    if cfg.stage in EVALUATES or cfg.stage == "refine":
        return
    all_of_it, trained = own_parameters(reader, cfg)
    width = BYTES[cfg.model.dtype]
    critics = [one for one in more if one.trained]
    saved = (trained if cfg.model.lora.r else all_of_it) * width
    state = 2 * trained * width + sum(3 * one.trained * width for one in critics)
    count = cfg.run.keep + (0 if cfg.stage == "select" else 1) + 1
    need = count * (saved + state) + (0 if cfg.stage == "select" else all_of_it * width)
    free = shutil.disk_usage(_there(Path(cfg.run.dir))).free
    found.say(
        "disk",
        f"about {_size(need)}: {count} checkpoints of {_size(saved + state)} (run.keep={cfg.run.keep}, the best, one being written) and "
        f"final/; {_size(free)} are free.",
    )
    if need > free:
        found.lines.append(
            "            warning: they do not fit. Free some space, keep fewer, or choose another run.root."
        )


def _there(path: Path) -> Path:
    """The part of it that exists."""
    path = path.absolute()
    return path if path.exists() else _there(path.parent)


def _size(amount: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if amount >= size:
            return f"{amount / size:.1f} {unit}" if amount < 100 * size else f"{amount / size:,.0f} {unit}"
    return f"{amount / 1e3:.0f} kB"


# ---- time ------------------------------------------------------------------------------------------------------

OF_NO_WEIGHT = (
    "algo.steps",
    "algo.epochs",
    "algo.lr",
    "algo.warmup",
    "algo.schedule",
    "algo.floor",
    "algo.weight_decay",
)


def _say_time(cfg: DictConfig, algo: Any, rows: int, found: Found) -> None:
    """Seconds a step of a finished run of the same method and model, where there is one below ``run.root``."""
    steps = steps_of(cfg, algo, rows)
    if steps is None:
        return
    now = _flat(json.loads(json.dumps(whole(cfg), default=str)))
    best: tuple[int, Path, dict[str, Any], list[str]] | None = None
    for file in sorted([*Path(cfg.run.root).glob("*/result.json"), *Path(cfg.run.root).glob("*/*/result.json")]):
        like = _family(file, now)
        if like is not None and (best is None or len(like[1]) < best[0]):
            best = (len(like[1]), file.parent, like[0], like[1])
    if best is None:
        found.say("time", f"not known: no finished run of this method and model lies below {cfg.run.root}.")
        return
    _, folder, result, apart = best
    spent = {k: v for k, v in result["seconds"].items() if k not in ("evaluate", "teacher")}
    each = sum(spent.values()) / result["steps"]
    then, now_in = _processes_of(folder), shared(cfg)[0]
    among = f"; it ran in {then} process{'es' if then > 1 else ''}, this in {now_in}" if then != now_in else ""
    also = f"; {folder.name} differs in {', '.join(apart[:6])}{' …' if len(apart) > 6 else ''}" if apart else ""
    found.say(
        "time",
        f"about {_clock(each * steps)} for {steps:,} steps without evaluation, at the {each:.2g} s a step that {folder} took{also}{among}. "
        f"Another machine has another speed.",
    )


def _processes_of(folder: Path) -> int:
    """Of a finished run; 1 where it does not say."""
    try:
        return int(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def _family(file: Path, now: dict[str, Any]) -> tuple[dict[str, Any], list[str]] | None:
    """(result, the settings in which it differs) of a finished run of the same stage, method and model."""
    import yaml

    from alignkit.report.collect import YAML_LOADER

    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        config = yaml.load((file.parent / "config.yaml").read_text(encoding="utf-8"), YAML_LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(config, dict) or not result.get("steps") or not isinstance(result.get("seconds"), dict):
        return None
    then = _flat(config)
    keys = [k for k in differing([then, now]) if k.partition(".")[0] in ("algo", "model", "data", "reward", "stage")]
    keys = [k for k in keys if k not in OF_NO_WEIGHT and k not in ("data.dev", "data.test", "data.limit")]
    same = not any(k == "stage" or k == "algo._target_" or k.startswith("model.") for k in keys)
    return (result, keys) if same else None


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
