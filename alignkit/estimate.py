"""What a run holds in memory, phase by phase, and what it computes: estimates from the shapes of its models and its settings.

Activations are 34 bytes a token, layer and width in 16 bits (arXiv 2205.05198, without the attention matrix, which is not kept),
twice that in float32. ``gpus.py`` says what is assumed of GPUs.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from alignkit import gpus, processes
from alignkit.config import SHARED

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Phases = dict[str, list[tuple[str, float]]]


@dataclass
class Layers:
    """Of a model's layers, in parameters."""

    parameters: int
    trained: int
    largest: int  # one of them


@dataclass
class Held:
    """A model in memory."""

    what: str
    parameters: int
    trained: int
    width: int  # bytes of a weight
    layers: Layers | None = None  # those that ``run.shard`` parts among the processes

    @property
    def weights(self) -> float:
        return self.parameters * self.width

    def part(self, count: int) -> float:
        """Bytes of what one of ``count`` processes keeps of the weights with ``run.shard``: all that is no layer, its part of these."""
        kept = self.parameters - (self.layers.parameters * (1 - 1 / count) if self.layers else 0)
        return kept * self.width

    def trained_part(self, count: int) -> float:
        """The same of the trained weights: so much are their gradients, and twice that AdamW's moments."""
        kept = self.trained - (self.layers.trained * (1 - 1 / count) if self.layers else 0)
        return kept * self.width


@dataclass
class Lengths:
    """Tokens of the rows that were looked at."""

    prompt: float = 0.0  # mean
    response: float = 0.0
    longest_prompt: int = 0
    longest: int = 0  # of prompt and response together


def shared(cfg: DictConfig) -> tuple[int, bool]:
    """(processes that share a run's passes, whether each holds a part of the layers alone)."""
    if cfg.stage not in SHARED:
        return 1, False
    count = int(os.environ["WORLD_SIZE"]) if processes.several() else int(cfg.run.processes)
    return count, bool(cfg.run.shard) and count > 1


def beside(cfg: DictConfig, algo: Any, reader: Any) -> list[Held]:
    """The models that a run holds beside the one that is trained or read."""
    more = []
    width = BYTES[cfg.model.dtype]
    critic = getattr(algo, "critic", None) if cfg.stage == "rl" else None
    if critic is not None:
        from dataclasses import replace

        built = replace(critic, path=None).build(reader.model)
        own = [p for p in built.parameters() if p.requires_grad]
        more.append(Held("critic", _count(built.parameters()), _count(own), width, layers_in(built)))
    all_of_it = _count(reader.model.parameters())
    if (cfg.stage == "rl" and algo.wants_reference) or (cfg.stage == "pref" and algo.needs_reference):
        if cfg.model.lora.r and cfg.stage == "rl":
            pass  # the model itself with its adapters off
        else:
            name = "start model" if cfg.stage == "rl" else "start model (asked before the first step, then let go)"
            more.append(Held(name, all_of_it, 0, width))
    teacher = getattr(algo, "teacher_model", None)
    if teacher is not None:
        more.append(Held("teacher", _count(teacher.model.parameters()), 0, 4))
    if reader.beside is not None:
        maps = _count(reader.beside.parameters())
        more.append(Held("maps to the teacher's width", maps, maps, width))
    base = getattr(reader, "base", None)
    if base is not None and hasattr(base, "model"):
        more.append(Held("frozen base", _count(base.model.parameters()), 0, width))
    return more


def steps_of(cfg: DictConfig, algo: Any, rows: int) -> int | None:
    """Steps of the training loop, where the stage has one and the rows are known."""
    if cfg.stage == "rl":
        return int(algo.steps)
    if cfg.stage in ("sft", "pref", "rm", "distill", "select", "trl") and (rows or algo.steps):
        steps = int(algo.steps_over(rows))
        if cfg.stage == "select":
            algo.phase_ends(steps)  # refuses more phases than steps
            return steps * int(algo.episodes_)
        return steps
    if cfg.stage == "refine" and rows:
        return math.ceil(rows / algo.rows_per_part)
    return None


def samples_of(algo: Any) -> tuple[int, str]:
    """(samples of an input at most, how that is known) of a method that samples."""
    for name in ("k_max", "k", "n", "samples"):
        value = getattr(algo, name, None)
        if isinstance(value, int):
            return value, f"algo.{name}"
    return 1, "one each"


def needs(cfg: DictConfig, algo: Any, reader: Any, more: list[Held], lengths: Lengths, sides: int = 1) -> Phases:
    """Phase → (what, bytes): what is held, and what the largest micro-batch needs besides; an estimate.

    Args:
        sides: responses a row that are learned from.
    """
    all_of_it, trained = own_parameters(reader, cfg)
    width = BYTES[cfg.model.dtype]
    count, part = shared(cfg)
    own = Held("model", all_of_it, trained, width, layers_in(reader.model) if part else None)
    computing = 2 if cfg.model.compute == "bfloat16" else width
    cast = all_of_it * 2.0 if computing < width else 0.0
    asked = [one for one in more if "then let go" in one.what]
    models = [own, *(one for one in more if one not in asked)]
    weights = sum(one.weights for one in models)
    gradients = sum(one.trained_part(count if part else 1) for one in models)
    moments = 2 * gradients
    layered = [one for one in models if part and one.layers is not None]
    vocabulary = int(getattr(reader.model.config, "vocab_size", 0) or 0)
    layers, size = reader.depth * (2 if reader.kind == "seq2seq" else 1), reader.width
    phases: Phases = {}
    learned = [("moments", moments)] if moments and not cfg.run.offload else []
    held = [
        ("weights", weights),
        *(
            [
                (
                    "its part of the layers",
                    sum(one.layers.parameters * one.width / count for one in layered if one.layers),
                )
            ]
            if layered
            else []
        ),
        *learned,
        *([("bfloat16 copy", cast)] if cast else []),
    ]
    if asked:
        phases["start model"] = [*held, ("its weights", sum(one.weights for one in asked))]
    new = cfg.evaluate.max_new_tokens if cfg.stage != "rl" and cfg.stage != "refine" else algo.max_new_tokens
    new += getattr(algo, "max_feedback_tokens", 0)  # behind the draft
    if cfg.stage in ("rl", "refine", "evaluate") or (cfg.stage in ("sft", "pref") and cfg.evaluate.every):
        if cfg.stage == "rl":
            at_once = -(-algo.prompts_per_step // count) * samples_of(algo)[0]
        elif cfg.stage == "refine":
            at_once = algo.rows_per_part * samples_of(algo)[0]
        else:
            at_once = -(-cfg.evaluate.batch_size // count)
        cache = at_once * (lengths.longest_prompt + new) * _cached(reader) * computing
        name = "sample" if cfg.stage in ("rl", "refine") else "evaluate"
        phases[name] = [*held, (f"cache of {at_once} responses at full length", cache)]
    if trained:
        budget = int(algo.micro_tokens)
        rows = algo.batch_size * sides if hasattr(algo, "batch_size") else algo.prompts_per_step * samples_of(algo)[0]
        longest = lengths.longest_prompt + algo.max_new_tokens if cfg.stage == "rl" else lengths.longest
        tokens = max(longest, min(budget, rows * max(1, longest) // count))
        deep = 17 * computing
        if cfg.model.gradient_checkpointing:
            activations = tokens * size * (layers * computing + deep)
        else:
            activations = tokens * layers * size * deep
        writes = cfg.stage in ("sft", "pref", "rl") or (
            cfg.stage in ("distill", "select") and not hasattr(reader, "labels")
        )
        logits = 2 * tokens * vocabulary * computing if writes else 0
        if cast and cfg.model.gradient_checkpointing:  # a layer that is computed anew is cast for its own pass alone
            mine = layers_in(reader.model)
            cast = 2.0 * (all_of_it - mine.parameters + mine.largest)
            held = [*held[:-1], ("bfloat16 copy", cast)]
        if layered and not {"sample", "evaluate"} & phases.keys():  # these have all layers, as saving has
            phases["save"] = [(what, amount) for what, amount in held if what != "bfloat16 copy"]
        if layered:  # together for their own passes alone; what autograd keeps of a layer's cast it keeps until its backward pass
            one_layer = max(one.layers.largest for one in layered if one.layers)
            held = [
                ("its part of the weights", sum(one.part(count) if one in layered else one.weights for one in models)),
                ("two layers together and the gradient of one", 3.0 * one_layer * width),
                *learned,
                *([("bfloat16 copy", cast)] if cast else []),
            ]
        phases["update"] = [
            *held, ("gradients", gradients), (f"activations of {tokens:,} tokens", activations),
            *([("their logits and the gradient of these", logits)] if logits else []),
        ]  # fmt: skip
    return phases


def offloaded(cfg: DictConfig, reader: Any, more: list[Held]) -> float:
    """Bytes of the processor's memory that ``run.offload`` takes: of each trained weight a copy, its gradient and two moments."""
    count, part = shared(cfg)
    own = Held("model", *own_parameters(reader, cfg), BYTES[cfg.model.dtype], layers_in(reader.model) if part else None)
    return sum(4 * one.trained_part(count if part else 1) for one in (own, *more))


def most_of(phases: Phases) -> dict[str, float]:
    """Phase → bytes."""
    return {name: sum(amount for _, amount in parts) for name, parts in phases.items()}


def work_of(
    cfg: DictConfig, algo: Any, reader: Any, more: list[Held], lengths: Lengths, rows: int, sides: int
) -> gpus.Work | None:
    """What a run computes, at most: every response at full length, evaluation, rewards by rule and requests not counted. Of a run
    that several processes share, what one of them does.

    Of an encoder–decoder half the weights see the prompt, half the response.

    Args:
        sides: responses a row that are learned from.
    """
    steps = steps_of(cfg, algo, rows)
    if steps is None or cfg.stage == "select" or not lengths.longest:
        return None
    all_of_it, trained = own_parameters(reader, cfg)
    among, _ = shared(cfg)
    half = 2 if reader.kind == "seq2seq" else 1
    learn = 4 * all_of_it + 2 * trained + (2 * all_of_it if cfg.model.gradient_checkpointing else 0)
    learn += sum(6 * one.parameters for one in more if one.trained)
    ask = sum(2 * one.parameters for one in more if not one.trained)
    width = 2 if cfg.model.compute == "bfloat16" else BYTES[cfg.model.dtype]
    work = gpus.Work()
    if cfg.stage in ("rl", "refine"):
        new, count = algo.max_new_tokens, samples_of(algo)[0]
        if hasattr(algo, "max_feedback_tokens"):  # criticises itself: the draft, and each rewrite anew
            new += (algo.rounds + 1) * algo.max_feedback_tokens
        prompts = -(-algo.prompts_per_step // among) if cfg.stage == "rl" else algo.rows_per_part  # whole groups
        if getattr(algo, "drafts", None):
            return None  # the drafts are there already
        work = gpus.decoding(
            steps, prompts * count, lengths.prompt, new, all_of_it // half, _cached(reader) * width, width
        )
        work.operations = steps * prompts * lengths.prompt * 2 * all_of_it / half
        tokens = steps * prompts * count * (lengths.prompt + new)
        if cfg.stage == "rl":
            tokens = steps * algo.prompts_per_step * count * (lengths.prompt + new) / among
            ask += sum(2 * one.parameters for one in more if one.trained)  # values, before the update
            work.operations += tokens * (ask + algo.epochs * learn) / half
        else:
            work.operations += tokens * ask / half
    else:
        tokens = steps * algo.batch_size * sides * (lengths.prompt + lengths.response) / among
        work.operations = tokens * (ask + learn) / half
    work.bfloat16 = width == 2
    return work


def own_parameters(reader: Any, cfg: DictConfig) -> tuple[int, int]:
    """(parameters, those that are trained) of the model itself."""
    from alignkit.launch import EVALUATES

    parameters = list(reader.model.parameters())
    frozen = cfg.stage in EVALUATES or cfg.stage == "refine"
    return _count(parameters), 0 if frozen else _count(p for p in parameters if p.requires_grad)


def layers_in(model: Any) -> Layers:
    """Those that ``sharding.Shards`` parts."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [[*m.parameters()] for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    every = [p for one in found for p in one]
    return Layers(_count(every), _count(p for p in every if p.requires_grad), max(map(_count, found), default=0))


def _cached(reader: Any) -> int:
    """Numbers that decoding keeps of a token: keys and values of every layer."""
    config = reader.model.config
    heads = getattr(config, "num_key_value_heads", None)
    head = getattr(config, "head_dim", None) or reader.width // max(1, getattr(config, "num_attention_heads", 1) or 1)
    return int(reader.depth * 2 * (heads * head if heads else reader.width))


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)
