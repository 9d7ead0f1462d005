"""The schema of a run, and ``check``: every unknown, missing and ill-typed key at once, before anything is loaded."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from alignkit.errors import UserError, suggest
from alignkit.signature import Setting, settings_of

PARTS = ("critic", "prompt")  # groups that are chosen for a setting of the method by their name
GROUPS = ("model", "data", "reward", "engine", "algo", "preset", *PARTS)
NEEDS = {  # what a stage cannot do without
    "sft": ("data", "algo"),
    "pref": ("data", "algo"),
    "refine": ("data", "algo"),
    "rm": ("data", "algo"),
    "rl": ("data", "reward", "algo"),
    "distill": ("data", "algo"),
    "select": ("data", "algo"),
    "trl": ("data", "algo"),
    "evaluate": ("data",),
    "evaluate_rm": ("data",),
    "evaluate_classes": ("data",),
    "judge": ("data", "algo"),
    "study": ("algo",),
    "pipeline": ("steps",),
}
SHARED = ("sft", "pref", "rm", "rl", "distill", "evaluate")  # stages whose passes several processes share
SHARDED = tuple(stage for stage in SHARED if stage != "evaluate")  # of which each process may hold a part of the layers
STEPS = (*SHARDED, "select")  # stages that step by ``Run.update``

TEXTS = ("bleu", "chrf", "exact_match", "length_ratio", "reward")
SELECTS = {  # what can pick the best checkpoint of a stage that trains
    "sft": TEXTS,
    "rl": TEXTS,
    "pref": (*TEXTS, "preference_accuracy"),
    "rm": ("preference_accuracy", "correlation"),
    "distill": (*TEXTS, "accuracy"),
    "trl": (*TEXTS, "preference_accuracy"),
}
ALL = tuple(dict.fromkeys(name for names in SELECTS.values() for name in names))


@dataclass
class Lora:
    r: int = 0  # rank; 0: all weights are trained
    alpha: int = 16
    dropout: float = 0.0
    target_modules: Any = (
        None  # list of module names; null: what peft knows for the architecture, else every linear layer
    )


@dataclass
class Steer:
    """Of a model that decodes or is evaluated: what is added to its logits, scale * (value - minus)."""

    value: str | None = None  # a value model (+algo=inverse_value), or an expert: run, folder or hub id; null: nothing
    minus: str | None = None  # what the expert was trained from: proxy tuning
    scale: float = 1.0
    map: str | None = None  # between vocabularies: a file of scripts/map_vocabulary.py; null: they are the same


@dataclass
class Model:
    """The policy: loaded from ``path``, or built from ``config`` with a tokenizer trained on the data."""

    path: str | None = None  # hub id, local folder, run directory, or bundled:NAME
    kind: str = "auto"  # auto | causal | seq2seq | encoder (a reward model alone)
    config: Any = None  # transformers settings of a model built from scratch; model_type is required
    layers: int | None = None  # of a model loaded from path: keep so many of its layers; null: all
    layers_from: str = "skip"  # which: skip (evenly spread: every k-th) | first
    tokenizer: str | None = None  # id, folder or bundled:NAME; null: the model's own, or one trained on the data
    vocab_size: int = 2000  # of a tokenizer trained on the data
    dtype: str = "float32"  # of the weights
    compute: str = "same"  # same | bfloat16: sampling, forward and backward in bfloat16 on float32 master weights
    device: str = "auto"  # auto | cpu | cuda | mps
    gradient_checkpointing: bool = False
    lora: Lora = field(default_factory=Lora)
    steer: Steer = field(default_factory=Steer)


@dataclass
class Evaluate:
    """How held-out rows are decoded and scored: the dev split during training, the test split at both ends."""

    decode: str = "greedy"  # greedy | beam | sample
    protocol: str = "plain"  # plain | first | refine | rerank: of a model that criticises itself, which answer counts
    rounds: int = 1  # of refine: critiques and rewrites in a row
    samples: int = 16  # of rerank: answers, drawn at `temperature`, of which the one with the best own score counts
    beams: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 64
    batch_size: int = 250
    every: int = 50  # steps between evaluations on dev; 0: never
    nll: bool = False  # also report `nll`: nats a token of the held-out rows' own responses
    select: str = "bleu"  # dev metric that picks the best checkpoint: bleu | chrf | exact_match | length_ratio | reward | preference_accuracy | correlation | accuracy
    final: str = "best"  # best | last: which weights become final/
    test: bool = True  # evaluate the test split, before and after RL, after SFT
    rows: int | None = None  # at most this many rows of each split
    bootstrap: int = 1000  # resamples behind the intervals
    section: str | None = None  # of reward models: column by whose values pairs are told apart; their mean is `macro`


@dataclass
class AuditSettings:
    """Stage rl: what is measured beside the reward, and how far it may move from the start until an alarm rings.

    An alarm whose setting is null is switched off.
    """

    on: bool = True
    stop: bool = False  # end the run after the step in which an alarm first rings
    window: int = 5  # steps behind the start, and behind the present values that are held against it
    length: float | None = 1.5  # audit/length: the mean length has grown, or shrunk, by more than this factor
    repetition: float | None = 0.1  # audit/repetition: the share of repeated 3-grams has risen by more than this
    diversity: float | None = 0.5  # audit/diversity: distinct_2 is below this share of its start
    copy: float | None = 0.2  # audit/copy: the share of 3-grams copied from the prompt has risen by more than this
    spread: float | None = (
        3.0  # audit/reference, audit/second: reward up, the other down by more standard errors than this
    )
    reward: Any = None  # a second reward that training never sees, {_target_: …}; null: none


@dataclass
class RunSettings:
    root: str = "runs"
    name: str = "${name}-s${seed}-${signature:}"
    dir: str = "${run.root}/${run.name}"
    overwrite: bool = False  # start anew where the command has run before
    save_every: int = 50  # steps between checkpoints
    keep: int = 2  # checkpoints kept besides the best
    preflight: bool = True  # before the first step: the longest batch, the disk, template and end tokens, the reward on made-up responses
    samples_every: int = 50  # steps between entries in samples.jsonl; 0: never
    wandb: str = "auto"  # auto (online with a key, else offline) | online | offline | disabled
    project: str = "alignkit"  # wandb project
    processes: int = 1  # of this machine that share the work; several machines: torchrun or accelerate launch
    shard: bool = False  # with several processes: each keeps a part of every layer and of its optimizer state (FSDP2)
    offload: bool = False  # AdamW and its moments in the processor's memory: a GPU holds weights and gradients alone
    patience: float | None = (
        1800  # seconds without a message from the other processes before stacks are written; null: wait
    )
    threads: int | None = None  # CPU threads; null: torch's choice. Resume is exact for an equal count
    concurrency: int = 16  # requests to an endpoint at the same time
    budget: float | None = None  # what requests to endpoints may cost, by the critic's prices; then the run stops


@dataclass
class Config:
    name: str = "unnamed"
    stage: str = MISSING
    seed: int = 0
    model: Model = field(default_factory=Model)
    data: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)  # stage rl: what draws; empty: the policy itself
    algo: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)  # of a pipeline: name → list of command-line words
    more: dict[str, Any] = field(
        default_factory=dict
    )  # of a pipeline: step → a word, or a list of words, behind its own
    evaluate: Evaluate = field(default_factory=Evaluate)
    audit: AuditSettings = field(default_factory=AuditSettings)
    run: RunSettings = field(default_factory=RunSettings)


def signature(cfg: DictConfig) -> str:
    """Eight hex digits of the resolved configuration without ``run``, ``name`` and ``hydra``, and without an engine that is none."""
    raw: Any = OmegaConf.to_container(cfg)
    raw["run"] = {**raw["run"], "name": "", "dir": ""}  # they ask for the signature
    whole: Any = OmegaConf.to_container(OmegaConf.create({**raw, "hydra": None}), resolve=True)
    resolved = {k: v for k, v in whole.items() if k not in ("run", "name", "hydra") and (v or k != "engine")}
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:8]


def whole(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration with the defaults of its classes filled in: what ``config.yaml`` keeps of a run."""
    found: dict[str, Any] = _filled(OmegaConf.to_container(cfg, resolve=True))
    return {k: v for k, v in found.items() if v or k != "engine"}


def _filled(value: Any) -> Any:
    if isinstance(value, list):
        return [_filled(item) for item in value]
    if not isinstance(value, dict):
        return value
    filled = {key: _filled(item) for key, item in value.items()}
    for setting in (settings_of(value["_target_"]) or {}).values() if "_target_" in value else ():
        if setting.name not in value and setting.default is not None:
            try:
                filled[setting.name] = _listed(ast.literal_eval(setting.default))
            except (ValueError, SyntaxError, TypeError):
                continue  # not a value that YAML can hold
    return filled


def _listed(value: Any) -> Any:
    """A plain value with lists for tuples, as YAML gives it back."""
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError


def same_settings(directory: Path, begun: str, cfg: DictConfig) -> None:
    """Refuse to go on in a directory of a run with other settings, as a fixed ``run.name`` or ``run.dir`` allows, or a
    default that has changed since.

    Args:
        begun: the signature of the run.

    Raises:
        UserError: the settings differ; names those that do.
    """
    file = directory / "config.yaml"
    before = _flat(OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else {})
    now = _flat(whole(cfg))
    names = [n for n in {**before, **now} if before.get(n, "nothing") != now.get(n, "nothing")]
    names = [n for n in names if n.partition(".")[0] not in ("run", "name", "hydra")]
    names = names if file.exists() else []
    if begun != signature(cfg) or names:
        changes = [f"{n}: {before.get(n, 'nothing')} → {now.get(n, 'nothing')}" for n in names[:8]]
        raise UserError(
            f"{directory} holds a run with other settings ({'; '.join(changes) or 'see its config.yaml'}). Choose another "
            f"run.name or run.dir, or start anew with run.overwrite=true. A new run goes on from this one's weights with "
            f"model.path={directory}."
        )


def same_sources(directory: Path, begun: dict[str, str], now: dict[str, str], cfg: DictConfig) -> None:
    """Refuse to go on, or to call a run finished, where a file behind it has changed.

    Raises:
        UserError: one has; names the setting.
    """
    for name, digest in begun.items():
        if now.get(name) != digest:
            raise UserError(
                f"{directory} was begun with another {name} ({OmegaConf.select(cfg, name)} has changed since). Restore the "
                f"file, or start anew with run.overwrite=true."
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def register() -> None:
    """Make the schema and the ``${signature:}`` resolver known to Hydra. Can be called twice."""
    from hydra.core.config_store import ConfigStore

    OmegaConf.register_new_resolver("signature", lambda _root_: signature(_root_), replace=True)
    schema = OmegaConf.structured(Config)
    for node in (
        "data",
        "reward",
        "engine",
        "algo",
        "steps",
        "more",
        "audit",
    ):  # of audit the second reward: its own keys are typed
        # open nodes, or a sweep over +algo with a fixed algo.lr fails (hydra #283, #2888); `check` closes them
        OmegaConf.set_struct(schema[node], False)
    ConfigStore.instance().store(name="schema", node=schema)


def conf_dir() -> Path:
    """The shipped configuration: inside an installed package, beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def schema_keys(prefix: str = "") -> list[str] | None:
    """Keys under a dotted prefix of the schema; None for an open node or a leaf."""
    node = _part_of_schema(prefix)
    return None if node is None else [f.name for f in fields(node)]


def type_of(key: str) -> str | None:
    """What a key of the schema takes, in words; None of a key that it does not have."""
    above, _, name = key.rpartition(".")
    node = _part_of_schema(above)
    kind = None if node is None else {f.name: str(f.type) for f in fields(node)}.get(name)
    if kind is None:
        return None
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text"}
    plain = kind.removesuffix(" | None")
    return words.get(plain, f"settings, as in {key}.KEY=VALUE") + (" or null" if plain != kind else "")


def _part_of_schema(prefix: str) -> Any:
    node: Any = Config
    for part in filter(None, prefix.split(".")):
        found = {f.name: f for f in fields(node)}.get(part)
        if found is None:
            return None
        node = {
            "model": Model,
            "lora": Lora,
            "steer": Steer,
            "evaluate": Evaluate,
            "audit": AuditSettings,
            "run": RunSettings,
        }.get(part)
        if node is None or not is_dataclass(node):
            return None
    return node


def check(cfg: DictConfig) -> None:
    """Compare a composed configuration with what its classes accept.

    Walks every ``_target_`` and compares keys and scalar types with the class signature, read from source, so
    that torch is not imported. Raises ``UserError`` listing all that is wrong.
    """
    wrong: list[str] = []
    stage = cfg.stage if not OmegaConf.is_missing(cfg, "stage") else None
    if stage not in NEEDS:
        wrong.append(f"stage: '{stage}' is not a stage.{suggest(str(stage), NEEDS)} Name a method with +algo=NAME.")
    else:
        for node in NEEDS[stage]:
            if not cfg.get(node):
                wrong.append(f"{node}: the {stage} stage needs one; choose it with {node}=NAME (see `alignkit list`).")
    if cfg.model.path is None and cfg.model.config is None:
        wrong.append("model.path: must be given (an id, a folder, a run), or model.config for one built from scratch.")
    if cfg.model.layers is not None and cfg.model.layers < 1:
        wrong.append("model.layers: must be at least 1, or null for all.")
    elif cfg.model.layers is not None and cfg.model.path is None:
        wrong.append(
            "model.layers: keeps layers of a model that is loaded; give model.path, or the number in model.config."
        )
    for name, allowed in (
        ("model.kind", ("auto", "causal", "seq2seq", "encoder")),
        ("model.layers_from", ("skip", "first")),
        ("evaluate.decode", ("greedy", "beam", "sample")),
        ("evaluate.protocol", ("plain", "first", "refine", "rerank")),
        ("evaluate.final", ("best", "last")),
        ("evaluate.select", ALL),
        ("run.wandb", ("auto", "online", "offline", "disabled")),
        ("model.dtype", ("float32", "bfloat16", "float16")),
        ("model.compute", ("same", "bfloat16")),
    ):
        chosen = OmegaConf.select(cfg, name)
        if chosen not in allowed:
            wrong.append(f"{name}: must be one of {', '.join(allowed)}; is '{chosen}'.")
    if cfg.evaluate.protocol != "plain" and cfg.evaluate.decode == "beam":
        wrong.append("evaluate.decode: beam search has no place in a protocol; take greedy or sample.")
    if cfg.evaluate.temperature <= 0:
        wrong.append("evaluate.temperature: must be above 0 (evaluate.decode=greedy takes the likeliest token).")
    if cfg.run.budget is not None and cfg.run.budget <= 0:
        wrong.append("run.budget: must be above 0, or null for no limit.")
    for name in (
        "run.save_every",
        "run.keep",
        "run.concurrency",
        "run.processes",
        "evaluate.rounds",
        "evaluate.samples",
        "evaluate.batch_size",
        "evaluate.max_new_tokens",
        "evaluate.beams",
    ):
        if OmegaConf.select(cfg, name) < 1:
            wrong.append(f"{name}: must be at least 1.")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", cfg.model.device):
        wrong.append(f"model.device: must be auto, cpu, mps, cuda or cuda:N; is '{cfg.model.device}'.")
    if cfg.run.threads is not None and cfg.run.threads < 1:
        wrong.append("run.threads: must be at least 1, or null for torch's choice.")
    if cfg.run.patience is not None and cfg.run.patience <= 0:
        wrong.append("run.patience: must be more than 0 seconds, or null to wait for ever.")
    if cfg.run.shard and stage in NEEDS and stage not in (*SHARED, "pipeline"):
        wrong.append(f"run.shard: stage {stage} runs in one process, which has all layers. Leave run.shard out.")
    elif cfg.run.shard and stage in SHARED and stage not in SHARDED:
        wrong.append(
            f"run.shard: has no effect in stage {stage}, where each process has the whole model. Leave it out."
        )
    elif cfg.run.shard and cfg.run.processes <= 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        wrong.append(
            "run.shard: one process has all layers. Start several with run.processes=N, torchrun or accelerate launch."
        )
    if cfg.run.offload and stage in NEEDS and stage not in (*STEPS, "pipeline"):
        wrong.append(f"run.offload: has no effect in stage {stage}, which has no AdamW of alignkit's. Leave it out.")
    if not str(cfg.run.dir).strip():
        wrong.append("run.dir: must not be empty.")
    if not cfg.model.lora.r and (cfg.model.lora.alpha != Lora.alpha or cfg.model.lora.target_modules is not None):
        wrong.append(
            "model.lora.r: is 0, so all weights are trained; set a rank for the other LoRA settings to matter."
        )
    for name in ("evaluate.every", "evaluate.bootstrap", "run.samples_every", "model.lora.r"):
        if OmegaConf.select(cfg, name) < 0:
            wrong.append(f"{name}: must not be negative.")
    if cfg.evaluate.rows is not None and cfg.evaluate.rows < 1:
        wrong.append("evaluate.rows: must be at least 1, or null for all.")
    for name, wanted, fine in (
        ("window", "at least 1", cfg.audit.window >= 1),
        ("length", "above 1, or null", cfg.audit.length is None or cfg.audit.length > 1),
        ("diversity", "between 0 and 1, or null", cfg.audit.diversity is None or 0 < cfg.audit.diversity < 1),
        *((n, "above 0, or null", cfg.audit[n] is None or cfg.audit[n] > 0) for n in ("repetition", "copy", "spread")),
    ):
        if not fine:
            wrong.append(f"audit.{name}: must be {wanted}; is {cfg.audit[name]}.")
    second = cfg.audit.reward
    if second and not (isinstance(second, DictConfig) and "_target_" in second):
        wrong.append("audit.reward: names no _target_; give audit.reward._target_.")
    if second and (stage != "rl" or not cfg.audit.on):
        why = "with audit.on=false" if stage == "rl" else f"in stage {stage}, which is not audited"
        wrong.append(f"audit.reward: has no effect {why}.")
    if cfg.engine and stage != "rl":
        wrong.append(f"engine: has no effect in stage {stage}; it draws what stage rl learns from.")
    for node in ("data", "reward", "engine", "algo", "audit"):
        value: Any = OmegaConf.to_container(cfg[node], resolve=True)
        if not value or (
            stage == "pipeline" and node in ("data", "reward", "algo")
        ):  # which has none of its own, see below
            continue
        if node == "audit":
            value["_target_"] = f"{__name__}.AuditSettings"
        if "_target_" not in value:
            wrong.append(
                f"{node}: names no _target_; choose {node}=NAME (see `alignkit list`) or give {node}._target_."
            )
            continue
        if node == "algo" and stage == "rl":
            value = _without_schedules(value, wrong)
        _walk(value, node, wrong)
    method: Any = OmegaConf.to_container(cfg.algo, resolve=True)
    for path, settings in _endpoints(method, "algo"):
        if any(line.startswith(path) for line in wrong):
            continue
        from alignkit.feedback import Endpoint  # here: few runs have one, and every command would wait for it

        try:
            Endpoint(**{k: v for k, v in settings.items() if k != "_target_"}).connection()
        except (UserError, ValueError) as e:
            wrong.append(f"{path}: {e}")
        if cfg.run.budget is not None and (settings.get("price_in") is None or settings.get("price_out") is None):
            wrong.append(f"{path}.price_in, {path}.price_out: run.budget needs prices, 0 for a server of your own.")
    measured = SELECTS.get(str(stage), ())
    if measured and cfg.evaluate.select in ALL and cfg.evaluate.select not in measured:
        wrong.append(
            f"evaluate.select: in stage {stage} one of {', '.join(measured)} picks the best; is '{cfg.evaluate.select}'."
        )
    if stage == "distill" and method:
        classifies = task_of(method) == "classify"
        if classifies != (cfg.evaluate.select == "accuracy"):
            wrong.append(
                f"evaluate.select: with algo.task={'classify' if classifies else 'write'} it must be "
                f"{'accuracy' if classifies else 'one of ' + ', '.join(TEXTS)}; is '{cfg.evaluate.select}'."
            )
    for step in cfg.more:
        if step not in cfg.steps:
            wrong.append(f"more.{step}: is not a step of this pipeline.{suggest(step, cfg.steps)}")
    if stage == "pipeline" and (cfg.algo or cfg.data or cfg.reward):
        wrong.append(
            "a pipeline has no algo, data or reward of its own: give a step its words, as in 'more.ppo=\"algo.steps=5\"'."
        )
    if stage in (*SELECTS, "select") and cfg.data and cfg.data.get("train") is None:
        wrong.append(f"data.train: the {stage} stage learns from it; name a source.")
    if stage in ("rl", "pref") and cfg.model.lora.dropout:
        wrong.append(f"model.lora.dropout: has no effect in stage {stage}, which runs without dropout.")
    steer = cfg.model.steer
    if steer.value is None and (steer.minus is not None or steer.map is not None or steer.scale != Steer.scale):
        wrong.append("model.steer.value: is null, so nothing is added; name a model for the other settings to matter.")
    elif steer.value is not None and stage in SELECTS:
        wrong.append(
            f"model.steer: is for a model that decodes, and stage {stage} trains one. A value model is trained by "
            f"+algo=inverse_value algo.base=MODEL."
        )
    elif steer.value is not None and stage not in ("evaluate", "refine"):
        wrong.append(f"model.steer: has no effect in stage {stage}.")
    if cfg.evaluate.nll and (stage == "rm" or stage not in (*SELECTS, "evaluate")):
        wrong.append(f"evaluate.nll: has no effect in stage {stage}, which measures no texts.")
    if stage in ("rm", "evaluate_rm") and cfg.evaluate.decode != "greedy":
        wrong.append(f"evaluate.decode: has no effect in stage {stage}, which decodes nothing.")
    if stage == "pref" and cfg.data and not any(cfg.data.get(k) for k in ("chosen", "desirable", "pairing")):
        wrong.append(
            "data.chosen: the pref stage needs pairs: templates data.chosen and data.rejected, or data=polite (or, for kto, "
            "single responses and the column data.desirable that judges them)."
        )
    if stage == "sft" and cfg.data and cfg.data.get("desirable"):
        wrong.append("data.desirable: the sft stage would learn the undesirable responses too; +algo=kto reads it.")
    if wrong:
        raise UserError("the configuration cannot be run:\n" + "\n".join(f"  - {line}" for line in wrong))


def task_of(method: Any) -> str:
    """What a distillation method trains: ``classify`` or ``write``, by its settings or its class's default."""
    try:
        default = (settings_of(method["_target_"]) or {})["task"].default
        return str(method.get("task") or ast.literal_eval(str(default)))
    except (ImportError, AttributeError, SyntaxError, ValueError, KeyError, TypeError):
        return "classify"  # `_walk` says what is wrong


def _without_schedules(algo: dict[str, Any], wrong: list[str]) -> dict[str, Any]:
    """The settings with each schedule's start in its place; what is wrong with a schedule is noted."""
    plain = dict(algo)
    try:
        settings = settings_of(algo["_target_"]) or {}
    except (ImportError, AttributeError, SyntaxError, ValueError):
        settings = {}  # `_walk` says what is wrong
    for key, value in algo.items():
        if not isinstance(value, dict) or "_target_" in value or not {"start", "end"} & set(value):
            continue
        numbers: list[Any] = [value.get("start"), value.get("end")]
        shape, steps = value.get("shape", "linear"), value.get("steps")
        unknown = sorted(set(value) - {"start", "end", "shape", "steps"})
        if key in settings and "float" not in settings[key].type:
            wrong.append(f"algo.{key}: only floats can have a schedule; this is {settings[key].type}.")
        elif unknown:
            wrong.append(f"algo.{key}.{unknown[0]}: unknown.{suggest(unknown[0], ('start', 'end', 'shape', 'steps'))}")
        elif not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
            wrong.append(f"algo.{key}: a schedule needs numbers for start and end, is {value!r}.")
        elif shape not in ("linear", "cosine", "exponential"):
            wrong.append(f"algo.{key}.shape: must be linear, cosine or exponential, is {shape!r}.")
        elif shape == "exponential" and min(numbers) <= 0:
            wrong.append(f"algo.{key}: an exponential schedule needs start and end above 0.")
        elif steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            wrong.append(f"algo.{key}.steps: must be a number of steps, is {steps!r}.")
        del plain[key]
    return plain


def _endpoints(value: Any, path: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, settings) of every critic behind an endpoint."""
    if not isinstance(value, dict):
        return []
    here = [(path, value)] if value.get("_target_") == "alignkit.feedback.Endpoint" else []
    return here + [one for key, item in value.items() for one in _endpoints(item, f"{path}.{key}")]


def _walk(value: Any, path: str, wrong: list[str]) -> None:
    if isinstance(value, list):
        for i, item in enumerate(value):
            _walk(item, f"{path}[{i}]", wrong)
    if not isinstance(value, dict):
        return
    if "_target_" in value:
        if not isinstance(value["_target_"], str) or "." not in value["_target_"].strip("."):
            wrong.append(f"{path}._target_: must be the dotted path of a class, is {value['_target_']!r}.")
            return
        try:
            settings = settings_of(value["_target_"])
        except (ImportError, AttributeError, SyntaxError) as e:
            wrong.append(f"{path}._target_: {e}")
            return
        if settings is not None:
            _compare(value, settings, path, wrong)
    for key, item in value.items():
        _walk(item, f"{path}.{key}", wrong)


def _compare(value: dict[str, Any], settings: dict[str, Setting], path: str, wrong: list[str]) -> None:
    given = {k: v for k, v in value.items() if k not in ("_target_", "_recursive_", "_convert_", "_partial_")}
    for key, item in given.items():
        if key not in settings:
            wrong.append(f"{path}.{key}: unknown.{suggest(key, settings)}")
        elif item == "???":
            wrong.append(f"{path}.{key}: must be given.")
        elif not settings[key].accepts(item):
            wrong.append(f"{path}.{key}: must be {settings[key].type}, is {item!r}.")
    for key, setting in settings.items():
        if setting.required and key not in given:
            wrong.append(f"{path}.{key}: must be given.")
