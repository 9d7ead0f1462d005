"""What every method that learns from a data set brings to the loop of ``stages/fit.py``: settings, and no state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from alignkit import policy
from alignkit.batch import Batch, Loss
from alignkit.config import Model
from alignkit.data import Row
from alignkit.errors import need, need_adamw
from alignkit.run import Run


@dataclass(kw_only=True)
class Fit:
    """Settings of the supervised loop and of its optimizer."""

    steps: int | None = None  # optimizer steps; null: what `epochs` says
    epochs: float = 1.0  # passes over the training rows
    batch_size: int = 64  # rows a step; of pairs, pairs
    lr: float = 5e-4  # peak learning rate of AdamW
    warmup: int = 100  # steps of linear warm-up
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"  # decay after the warm-up
    floor: float = 0.0  # share of the peak rate that the decay ends at
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    micro_tokens: int = 8192  # tokens of a micro-batch: memory and speed; the result only through dropout

    def __post_init__(self) -> None:
        need(self, "batch_size >= 1", "micro_tokens >= 1", "steps >= 1", "epochs > 0")
        need_adamw(self)

    def build(self, cfg: Model, seed: int, texts: list[str], checkpoint: Path | None) -> Any:
        """The model that is trained; the arguments are those of ``policy.load``."""
        return policy.load(cfg, seed, texts, checkpoint)

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        """The training rows, once, before a model is loaded: refuse them, warn of them, add what a row's loss needs.

        Args:
            sides: keys of a row's responses: chosen and rejected, or the one response that ``row["desirable"]`` judges.

        Raises:
            UserError: the method cannot learn from such rows.
        """
        return rows

    def survey(self, policy: Any, rows: list[Row], run: Run, texts: list[str]) -> None:
        """Look at the training rows once, before the first step of every start; ``texts`` as for ``policy.load``."""

    def whole(self, policy: Any, batch: Batch, generator: torch.Generator) -> Batch:
        """A step's batch before it is split, without a graph: what the loss needs of all its rows, or draws for them, goes
        into ``extra``."""
        return batch

    def loss(self, policy: Any, batch: Batch) -> Loss:
        """The method's loss of one micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(policy, batch)")

    def state(self) -> dict[str, object]:
        """What a step depends on besides weights, optimizer, seed and step."""
        return {}

    def load_state(self, state: dict[str, object]) -> None:
        """Take back what ``state`` gave."""
