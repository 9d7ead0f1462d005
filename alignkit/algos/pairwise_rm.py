"""A generative comparator as reward model: it reads two responses and says whether the first is better."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignkit import losses, policy
from alignkit.algos._fit import Fit
from alignkit.algos._pref import right
from alignkit.batch import Batch, Loss
from alignkit.comparator import Comparator
from alignkit.config import Model
from alignkit.data import Row
from alignkit.run import Run


@dataclass(kw_only=True)
class PairwiseRM(Fit):
    """Pairwise reward model (arXiv 2504.04950): the language model's own next token, yes or no, after both responses.

    Every pair is learned in both orders, -log p(chosen first) - log (1 - p(rejected first)), each weighing a half. Known
    of the paper are the idea and the use of p as a reward against an anchor; prompt, loss and averaging are ours.
    """

    batch_size: int = 16
    lr: float = 1e-4
    warmup: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"
    template: str = (
        "{prompt}\n\nFirst: {first}\n\nSecond: {second}\n\nIs the first better?"  # what is asked; saved with the model
    )
    yes: str = " YES"
    no: str = " NO"
    wants: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all("{" + name + "}" in self.template for name in ("prompt", "first", "second")):
            raise ValueError(f"template: must hold {{prompt}}, {{first}} and {{second}}, is {self.template!r}")

    def build(self, cfg: Model, seed: int, texts: list[str], checkpoint: Path | None) -> Comparator:
        """The model that is trained."""
        return Comparator(policy.load(cfg, seed, texts, checkpoint), self.template, self.yes, self.no)

    def survey(self, model: Comparator, rows: list[Row], run: Run, texts: list[str]) -> None:
        for i in range(0, len(rows), 512):  # a comparison that does not fit is refused now
            model.pairs(rows[i : i + 512])

    def batch(self, model: Comparator, rows: list[Row]) -> Batch:
        """What a step learns from: every pair in both orders, before yes and before no."""
        return model.pairs(rows)

    def loss(self, model: Comparator, batch: Batch) -> Loss:
        logits = model.logits(batch)
        pair = self.pair_losses(logits)
        with torch.no_grad():
            p = torch.sigmoid(logits)
            metrics = {
                "preference_accuracy": float(right(logits[0::2] - logits[1::2]).mean()),
                "position_bias": float((p[0::2] + p[1::2] - 1).abs().mean()),
            }
        return Loss(pair.sum(), float(len(pair)), metrics)

    def pair_losses(self, logits: Tensor) -> Tensor:
        """(N,) from (2N,) log-odds of yes: chosen first, rejected first, chosen first, …"""
        return (losses.logistic(logits[0::2]) + losses.logistic(-logits[1::2])) / 2
