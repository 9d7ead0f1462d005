"""What every method that is one of TRL's own trainers brings to ``stages/trl.py``: settings, rows, and names of log values.

Facts of TRL 1.16, read from its source; nothing of it is imported before a setting is compared with its configuration class.
"""

from __future__ import annotations

import ast
import importlib.metadata
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import EnumType
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import AutoConfig

from alignkit import policy
from alignkit.config import Model
from alignkit.data import Row
from alignkit.errors import UserError, need, need_adamw, suggest
from alignkit.loading import resolve

FIRST, NEXT = (1, 16), (2,)  # versions that are accepted: from, below
SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "inverse_sqrt": "inverse_sqrt",
}
OURS = {  # TRL's name → the setting that takes its place, for every trainer
    "learning_rate": "algo.lr", "warmup_steps": "algo.warmup", "lr_scheduler_type": "algo.schedule",
    "weight_decay": "algo.weight_decay", "adam_beta1": "algo.betas", "adam_beta2": "algo.betas",
    "max_grad_norm": "algo.max_grad_norm", "max_steps": "algo.steps", "num_train_epochs": "algo.steps",
    "per_device_train_batch_size": "algo.batch_size", "seed": "seed", "output_dir": "run.dir", "run_name": "run.name",
    "save_strategy": "run.save_every", "save_steps": "run.save_every", "save_total_limit": "run.keep",
    "report_to": "run.wandb", "project": "run.project", "bf16": "model.compute", "fp16": "model.compute",
    "gradient_checkpointing": "model.gradient_checkpointing", "activation_checkpointing": "model.gradient_checkpointing",
    "use_cpu": "model.device", "model_init_kwargs": "model",
    "eval_strategy": "evaluate.every", "eval_steps": "evaluate.every", "eval_on_start": "evaluate.every",
    "load_best_model_at_end": "evaluate.final", "metric_for_best_model": "evaluate.select",
}  # fmt: skip
NEVER = (  # pattern of TRL's names → why they cannot be set
    (r"push_to_hub|hub_\w+|trackio_\w+|log_completions_hub_repo", "nothing is uploaded"),
    (r"logging_\w+|disable_tqdm", "every step is in metrics.jsonl"),
    (r"resume_from_checkpoint", "the same command goes on from the last checkpoint"),
    (r"save_only_model|ignore_data_skip|auto_find_batch_size|sync_ref_model|enable_jit_checkpoint",
     "a stopped run could then not go on as if it had not been stopped"),
    (r"deepspeed|fsdp\w*|ddp_\w+|parallelism_config|local_rank", "a run is one process on one device"),
)  # fmt: skip


@dataclass(kw_only=True)
class TRL:
    """Settings that alignkit and a trainer of TRL both have, and in ``trl`` all others under TRL's names."""

    lr: float = 5e-5  # peak learning rate
    warmup: int = 10  # steps of linear warm-up, TRL's: from 0 at the first step
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"  # decay after the warm-up
    weight_decay: float = 0.0  # TRL leaves out biases and norms
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    trl: dict[str, Any] = field(default_factory=dict)  # algo.trl.NAME=value: what else TRL's configuration has

    floor: ClassVar[float] = 0.0  # of the decay: TRL has none
    trainer: ClassVar[str]  # NAME of trl.NAMETrainer and trl.NAMEConfig
    ours: ClassVar[dict[str, str]] = {}  # as OURS, of this trainer
    logged: ClassVar[dict[str, str]] = {}  # TRL's log name → alignkit's, where both mean the same
    needs_reward: ClassVar[bool] = False
    wants_reference: ClassVar[bool] = False  # whether TRL reads the start model again, under its path
    ranks: ClassVar[Any] = None  # the method of stage pref by which held-out pairs are ranked

    def __post_init__(self) -> None:
        need_adamw(self)
        accepted()
        if not self.trl:
            return
        known = {f.name for f in fields(self.config_class) if f.init}
        for name in self.trl:
            if name not in known:
                raise ValueError(f"trl.{name}: {self.config_class.__name__} has no such field.{suggest(name, known)}")
            if setting := {**OURS, **self.ours}.get(name):
                raise ValueError(f"trl.{name}: is alignkit's to set: {setting}")
            if why := next((why for pattern, why in NEVER if re.fullmatch(pattern, name)), None):
                raise ValueError(f"trl.{name}: cannot be set: {why}")
        if not isinstance(parts := self.trl.get("gradient_accumulation_steps", 1), int):
            raise ValueError(f"trl.gradient_accumulation_steps: must be int, is {parts!r}")
        if self.parts < 1 or self.per_step(1) % self.parts:
            raise ValueError(
                f"trl.gradient_accumulation_steps ({self.parts}) must divide {self.per_step(1)} rows a step"
            )

    @property
    def config_class(self) -> Any:
        """TRL's configuration class, which takes seconds to import."""
        import trl

        return getattr(trl, f"{self.trainer}Config")

    @property
    def parts(self) -> int:
        """Micro-batches of an optimizer step."""
        return int(self.trl.get("gradient_accumulation_steps", 1))

    def per_step(self, sides: int) -> int:
        """Sequences, or pairs where the loss compares two, of an optimizer step; ``sides``: judged responses of a row."""
        raise NotImplementedError

    def steps_over(self, rows: int) -> int:
        """Optimizer steps on a data set of so many rows."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """TRL's name → value, of what both have."""
        return {
            "learning_rate": self.lr, "warmup_steps": self.warmup, "lr_scheduler_type": SCHEDULES[self.schedule],
            "weight_decay": self.weight_decay, "adam_beta1": self.betas[0], "adam_beta2": self.betas[1],
            "max_grad_norm": self.max_grad_norm,
        }  # fmt: skip

    def configure(self, **ours: Any) -> Any:
        """TRL's configuration: what alignkit sets, and ``trl``, compared with what TRL says of its fields.

        TRL looks at most values where it first needs them, in its first step. A value fits where it, or what TRL makes of it (a
        word becomes a list of one), has the field's type and is one of its words, where the field takes a few only.

        Raises:
            UserError: one does not fit, or TRL refuses it; names the setting.
        """
        try:
            config = self.config_class(**ours, **self.trl)
        except (ValueError, TypeError, ImportError) as e:
            self._compare(None)  # says it more clearly, where a type is to blame
            raise UserError(self.refused(e)) from None
        self._compare(config)
        return config

    def _compare(self, config: Any) -> None:
        hints, known = get_type_hints(self.config_class), {f.name: f for f in fields(self.config_class)}
        for name, given in self.trl.items():
            made = getattr(config, name, given)
            if not (_fits(given, hints[name]) or _fits(made, hints[name])):
                kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
                raise UserError(f"algo.trl.{name}: must be {kind}, is {given!r}.")
            words = self._words(known[name], hints[name])
            for word in made if isinstance(made, list) else [made]:
                if words and isinstance(word, str) and word not in words:
                    raise UserError(f"algo.trl.{name}: TRL {accepted()} has no {word!r}.{suggest(word, words)}")

    def _words(self, known: Any, hint: Any) -> list[str]:
        """The words that a field may have, where TRL says so: in the field, by its type, or by what its trainer compares it with;
        empty where it takes others."""
        if known.metadata.get("choices"):
            return list(known.metadata["choices"])
        enums: list[Any] = [one for one in get_args(hint) if isinstance(one, EnumType)]
        named = [str(word.value) for one in enums for word in one]
        return named or _compared(self.trainer, known.name, hint, known.default)

    def refused(self, error: Exception) -> str:
        """What TRL says against the settings, in one line that begins with the one of ``trl`` that it speaks of."""
        blamed = self.blamed(error)
        return f"{f'algo.trl.{blamed}' if blamed else 'algo.trl'}: TRL {accepted()} refuses it: {' '.join(str(error).split())}"

    def blamed(self, error: Exception) -> str | None:
        """The setting of ``trl`` that an error's text speaks of, by its name, a word that it was given, or a key in it."""
        said = set(re.findall(r"\w+", str(error)))
        return next((name for name, value in self.trl.items() if said & {name, *_within(value)}), None)

    def window(self, config: Any) -> int:
        """Optimizer steps from one sampling to the next in which TRL keeps nothing on disk of the samples it goes on with."""
        return 1

    def build(self, cfg: Model, seed: int, texts: list[str], checkpoint: Path | None) -> Any:
        """The model as alignkit reads it, before TRL has it.

        Raises:
            UserError: an encoder–decoder model, said before weights are read.
        """
        refuse_encoder_decoder(cfg)
        return policy.load(cfg, seed, texts, checkpoint)

    def module(self, reader: Any) -> Any:
        """What TRL trains: its weights are those of ``reader``."""
        return reader.model

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        """The training rows.

        Raises:
            UserError: the trainer cannot learn from them.
        """
        return rows

    def dataset(self, reader: Any, rows: list[Row], seed: int) -> list[dict[str, Any]]:
        """The rows in the form that TRL's trainer reads."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Offline(TRL):
    """Settings of the trainers that learn from a data set."""

    steps: int | None = None  # optimizer steps; null: what `epochs` says
    epochs: float = 1.0  # passes over the training rows
    batch_size: int = 32  # rows a step; of pairs, pairs

    def __post_init__(self) -> None:
        need(self, "batch_size >= 1", "steps >= 1", "epochs > 0")
        super().__post_init__()

    def per_step(self, sides: int) -> int:
        return self.batch_size

    def steps_over(self, rows: int) -> int:
        return self.steps or math.ceil(self.epochs * rows / self.batch_size)


@dataclass(kw_only=True)
class Online(TRL):
    """Settings of the trainers that learn from samples and a reward."""

    steps: int = 100  # optimizer steps
    prompts_per_step: int = 32  # inputs of an optimizer step
    k: int = 8  # responses an input
    max_new_tokens: int = 64  # longest response that is sampled
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    kl: float = 0.0  # coefficient of KL(policy || start model); TRL's beta
    lr: float = 1e-4
    ours: ClassVar[dict[str, str]] = {
        "per_device_train_batch_size": "algo.prompts_per_step", "num_generations": "algo.k",
        "max_completion_length": "algo.max_new_tokens", "temperature": "algo.temperature", "beta": "algo.kl",
        "generation_batch_size": "algo.prompts_per_step, or algo.trl.steps_per_generation",
    }  # fmt: skip
    logged: ClassVar[dict[str, str]] = {
        "reward": "reward", "completions/mean_length": "length", "completions/clipped_ratio": "cut_off", "step_time": "step_seconds",
    }  # fmt: skip
    needs_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need(self, "steps >= 1", "prompts_per_step >= 1", "k >= 2", "max_new_tokens >= 1", "temperature > 0", "kl >= 0")
        super().__post_init__()

    @property
    def wants_reference(self) -> bool:  # type: ignore[override]
        return self.kl > 0

    @property
    def batch_size(self) -> int:
        """Rows a step."""
        return self.prompts_per_step

    def per_step(self, sides: int) -> int:
        return self.prompts_per_step * self.k

    def steps_over(self, rows: int) -> int:
        return self.steps

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {
            "num_generations": self.k, "max_completion_length": self.max_new_tokens, "temperature": self.temperature, "beta": self.kl,
        }  # fmt: skip

    def configure(self, **ours: Any) -> Any:
        config = super().configure(**ours)
        for name in ("steps_per_generation", "num_iterations"):
            if getattr(config, name) < 1:
                raise UserError(f"algo.trl.{name}: must be at least 1, is {getattr(config, name)}.")
        return config

    def window(self, config: Any) -> int:
        passes = config.steps_per_generation * config.num_iterations
        return int(passes // math.gcd(passes, config.gradient_accumulation_steps))

    def dataset(self, reader: Any, rows: list[Row], seed: int) -> list[dict[str, Any]]:
        """Prompts, and the row's place, by which a reward gets the whole row back."""
        reader.encode_prompts(rows)  # refuses what does not fit
        return [{"prompt": row["prompt"], "id": i} for i, row in enumerate(rows)]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type; of what is no class (``Any``, ``Literal``) TRL is the judge."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inside) and all(map(_fits, value, inside))
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inside[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def _compared(trainer: str, name: str, hint: Any, default: Any) -> list[str]:
    """The words with which TRL's trainer compares a setting, read from its source: those are all that there are. Empty where the
    setting takes more than words, or is not told apart by them."""
    if hint not in (str, list[str]):
        return []
    import trl

    source = Path(str(trl.__file__)).parent / "trainer" / f"{trainer.lower()}_trainer.py"
    found = {
        word.value
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and getattr(node.left, "attr", getattr(node.left, "id", None)) == name
        for word in ast.walk(node.comparators[0])
        if isinstance(word, ast.Constant) and isinstance(word.value, str)
    }
    return sorted(found) if len(found) > 1 and (not isinstance(default, str) or default in found) else []


def _within(value: Any) -> Iterator[str]:
    """The words and keys in a setting's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _within(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _within(inner)


def accepted() -> str:
    """The installed TRL's version.

    Raises:
        UserError: it is missing, or none that this was written for.
    """
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    found = tuple(int(x) for x in re.findall(r"\d+", version)[:2])
    if not FIRST <= found < NEXT:
        raise UserError(
            f"stage trl calls TRL 1.16 or later, below 2; installed is {version}: pip install 'trl>=1.16,<2'."
        )
    return version


def refuse_encoder_decoder(cfg: Model) -> None:
    """Refuse what TRL would train as something else: it hands prompt and response to the model as one sequence.

    Raises:
        UserError: the model's configuration says that it is an encoder–decoder.
    """
    try:
        config = (
            AutoConfig.from_pretrained(resolve(cfg.path))
            if cfg.path
            else AutoConfig.for_model(cfg.config["model_type"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return  # `loading.read` says what is wrong
    if config.is_encoder_decoder:
        raise UserError(
            f"model: {config.model_type} is an encoder–decoder model. TRL hands it prompt and response as one sequence, so that its "
            f"encoder reads the answer. Take a causal model (model=tiny_causal), or alignkit's own method, without trl_."
        )


def shuffled(rows: list[Any], seed: int) -> list[Any]:
    """The rows in an order drawn from the seed, for a trainer that reads them in theirs."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order]


def as_text(reader: Any, row: Row, response: str) -> tuple[Any, Any]:
    """(prompt, completion) from which TRL makes the tokens that alignkit has: of text the two as they decode together, since a
    tokenizer may write a space between them."""
    if not isinstance(row["prompt"], str):
        return row["prompt"], [{"role": "assistant", "content": response}]
    prompt, answer = reader.prompt_ids([row])[0], reader.encode_responses([response])[0]
    start, whole = (reader.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + answer))
    return start, whole.removeprefix(start)
