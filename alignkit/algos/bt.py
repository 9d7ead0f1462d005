"""The Bradley–Terry reward model: a logistic regression on differences of scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import losses
from alignkit.algos._pref import right
from alignkit.algos._rm import RM
from alignkit.batch import Batch, Loss
from alignkit.data import Row
from alignkit.errors import UserError, need
from alignkit.run import Run


@dataclass(kw_only=True)
class BT(RM):
    """Bradley–Terry: -log sigmoid(d), d the chosen response's score less the rejected one's.

    ``margin`` takes the number m in a column of the pair: ``subtract`` -log sigmoid(d - m), ``scale`` -m log sigmoid(d)
    (forms of HelpSteer2's code, arXiv 2406.08673). ``centring`` adds c (r_chosen + r_rejected)², TRL's way of keeping scores
    around 0 (its mean, not the difference, is free under the loss).
    """

    temperature: float = 1.0  # type: ignore[misc]  # d is divided by it, of the trained model too
    smoothing: float = 0.0  # share of labels taken for flipped
    centring: float = 0.0  # weight of the squared sum of both scores
    margin: Literal["none", "subtract", "scale"] = "none"  # what the pair's margin does
    margin_column: str = "margin"  # column of a pair's margin, a number

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "temperature > 0", "smoothing >= 0", "smoothing < 0.5", "centring >= 0")

    def survey(self, model: Any, rows: list[Row], run: Run, texts: list[str]) -> None:
        for row in rows:
            self._margin(row)

    def loss(self, model: Any, batch: Batch) -> Loss:
        z = model.outputs(batch)[0]
        margins = model.margins(z)
        pair = self.pair_losses(margins, [float(m) for m in map(self._margin, batch.rows[0::2])])
        if self.centring:
            scores = model.head.scores(z)
            pair = pair + self.centring * (scores[0::2] + scores[1::2]).square()
        with torch.no_grad():
            metrics = {
                "preference_accuracy": float(right(margins).mean()),
                "margin": float(margins.mean()),
            }
        return Loss(pair.sum(), float(len(pair)), metrics)

    def pair_losses(self, margins: Tensor, given: list[float]) -> Tensor:
        """(N,) losses of score differences (N,); ``given``: the N margins of the data."""
        m = torch.tensor(given, dtype=margins.dtype, device=margins.device)
        if self.margin == "subtract":
            return losses.logistic(margins - m, self.smoothing)
        pair = losses.logistic(margins, self.smoothing)
        return m * pair if self.margin == "scale" else pair

    def _margin(self, row: Row) -> float:
        if self.margin == "none":
            return 0.0
        found = row.get(self.margin_column)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise UserError(
                f"row {row['id']}: column '{self.margin_column}' must be a number for algo.margin={self.margin}, is {found!r}. "
                f"Set algo.margin_column."
            )
        if self.margin == "scale" and found < 0:
            raise UserError(
                f"row {row['id']}: column '{self.margin_column}' is {found}; algo.margin=scale weighs a pair by it, so it must not "
                f"be negative. Turn such pairs around."
            )
        return float(found)
