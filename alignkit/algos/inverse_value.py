"""Inverse value learning: a small model learns what to add to a frozen model's logits (arXiv 2410.21027)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import losses, policy
from alignkit.algos._fit import Fit
from alignkit.batch import Batch, Loss
from alignkit.config import Model
from alignkit.errors import UserError, need
from alignkit.loading import resolve
from alignkit.steering import Steered, Trained, part


@dataclass(kw_only=True)
class InverseValue(Fit):
    """Inverse value learning: a small model learns what to add to a frozen model's logits (arXiv 2410.21027).

    `model` is the value model, `algo.base` the frozen one. The loss is SFT's under z = b + v, and the size of v where `norm` says so. The value model alone is trained and saved; put it
    beside the base, or beside larger models of its family: `alignkit evaluate MODEL model.steer.value=RUN`. Built from scratch
    it takes the base's tokenizer.
    """

    base: str  # the frozen model: hub id, local folder, run directory, or bundled:NAME
    connection: Literal["residual", "cascade", "cascade_plus"] = (
        "residual"  # what the value model reads: the text, what the base expects at each position, or both
    )
    norm: Literal["none", "l1", "l2"] = (
        "none"  # a penalty on the value logits: mean of |v|, or of v², over the vocabulary
    )
    norm_coef: float = 1.0
    norm_over: Literal["labels", "all"] = (
        "labels"  # positions that the penalty is the mean of: those of the responses, or those of the prompts too, as released
    )
    zero_init_head: bool = False  # start at v = 0, with a head of its own
    max_response_tokens: int | None = None  # longer responses are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "max_response_tokens >= 1", "norm_coef >= 0")

    def build(self, cfg: Model, seed: int, texts: list[str], checkpoint: Path | None) -> Steered:
        """The base with the value model that is trained.

        Raises:
            UserError: models that do not fit together, or settings that the model cannot have.
        """
        base = part(self.base, "algo.base", cfg, seed)
        if self.norm_over == "all" and base.is_encoder_decoder:
            raise UserError(
                "algo.norm_over=all: an encoder–decoder puts out logits at its response alone; take labels."
            )
        if self.zero_init_head and cfg.lora.r:
            raise UserError("algo.zero_init_head: the head is no adapter and would not be saved; set model.lora.r=0.")
        if cfg.path is None and cfg.tokenizer is None:
            cfg = replace(cfg, tokenizer=resolve(self.base))
        value = policy.load(cfg, seed, texts, checkpoint)
        if self.zero_init_head and checkpoint is None:
            _zero_head(value.model)
        trained = Trained(
            connection=self.connection,
            norm=self.norm,
            norm_coef=self.norm_coef,
            norm_over=self.norm_over,
            base=self.base,
        )
        return Steered(base, value, trained, names=(f"algo.base={self.base}", f"model.path={cfg.path}", ""))

    def whole(self, policy: Any, batch: Batch, generator: torch.Generator) -> Batch:
        """With ``norm_over=all``: ``extra["per_position"]`` (B,), response tokens over all tokens, which makes a sum over
        positions one that is divided by tokens."""
        tokens = batch.mask.sum()
        share = tokens / (tokens + batch.prompt_mask.sum())
        return batch.with_(extra={**batch.extra, "per_position": share.expand(len(batch))})

    def loss(self, policy: Steered, batch: Batch) -> Loss:
        """Mean over response tokens under z; the norm's mean is over ``norm_over``."""
        over_all = self.norm != "none" and self.norm_over == "all"
        read = policy.read(batch, everywhere=over_all)
        found = losses.nll(policy.logprobs(batch, read), batch.mask)
        if self.norm == "none":
            return found
        sizes = size(read.value if read.everywhere is None else read.everywhere, self.norm).sum()
        if over_all:
            sizes = sizes * batch.extra["per_position"][0]
        found.metrics["value_norm"] = float(sizes.detach()) / max(found.count, 1.0)
        return Loss(found.total + self.norm_coef * sizes, found.count, found.metrics)


def size(v: Tensor, norm: str) -> Tensor:
    """(n,) size of value logits (n, V): the mean of |v| (``l1``) or of v² (``l2``) over the vocabulary."""
    return (v.float().abs() if norm == "l1" else v.float().square()).mean(-1)


def _zero_head(model: Any) -> None:
    """Give the model a head of zeros, which it does not share with its embeddings."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    if getattr(head, "bias", None) is not None:
        torch.nn.init.zeros_(head.bias)
    model.config.tie_word_embeddings = False
