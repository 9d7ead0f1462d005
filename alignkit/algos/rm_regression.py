"""A reward model from ratings: the mean squared error of what its head puts out for each attribute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from alignkit.algos._rm import RM
from alignkit.batch import Batch, Loss
from alignkit.data import Row
from alignkit.errors import UserError, suggest
from alignkit.heads import Attributes
from alignkit.run import Run


@dataclass(kw_only=True)
class RMRegression(RM):
    """Regression on ratings (HelpSteer2, arXiv 2406.08673): mean squared error over the ratings that are there.

    The head is ``alignkit.heads.Attributes``: its names are attributes of ``data.ratings``, its weights make the score.
    The mean is over all ratings of a step's batch (NeMo-Aligner's is over those of a micro-batch).
    """

    wants: ClassVar[str] = "ratings"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.head, Attributes):
            raise ValueError("head must be alignkit.heads.Attributes, with names and weights of the ratings")

    def survey(self, model: Any, rows: list[Row], run: Run, texts: list[str]) -> None:
        found = {name for row in rows for name, value in row["ratings"].items() if value is not None}
        for name in self.head.names:  # type: ignore[attr-defined]
            if name not in found:
                raise UserError(f"algo.head.names: no training row has a rating '{name}'.{suggest(name, found)}")
        empty = sum(row["response"] is None for row in rows)
        if empty:
            raise UserError(f"{empty} training rows have ratings but no response. Set data.response.")

    def batch(self, model: Any, rows: list[Row]) -> Batch:
        """Responses with ``extra["ratings"]`` (B, k), not a number where there is none."""
        batch = model.responses(rows)
        names = self.head.names  # type: ignore[attr-defined]
        ratings = [
            [float("nan") if (v := row["ratings"].get(name)) is None else float(v) for name in names] for row in rows
        ]
        return batch.with_(extra={"ratings": torch.tensor(ratings, device=batch.mask.device)})

    def loss(self, model: Any, batch: Batch) -> Loss:
        ratings = batch.extra["ratings"]
        known = ~ratings.isnan()
        error = torch.where(known, model.outputs(batch)[0] - ratings.nan_to_num(), 0.0).square()
        n = float(known.sum())
        return Loss(error.sum(), n, {"error": float(error.detach().sum()) / max(n, 1.0)})
