"""DPO with PCRM's prior constraint: the margin of a pair has a soft ceiling, the lower the more alike its responses are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignkit.algos._pref import Pairs, Pref, gap
from alignkit.batch import Batch
from alignkit.constraint import Constraint
from alignkit.data import Row
from alignkit.errors import need
from alignkit.run import Run


@dataclass(kw_only=True)
class DPOPCRM(Pref):
    """DPO with PCRM's ceiling (arXiv 2404.00978): -log sigmoid(d) - log sigmoid(delta* - d), d DPO's margin times beta.

    The least loss is at d = delta* / 2. Formula and constants are the authors' released code; the paper's text was not at
    hand. That code's cosine is raw here (``constraint.angular=false``), and angular for reward models.
    """

    beta: float = 0.1  # how closely the policy is held to the start model
    smoothing: float = 0.0  # share of labels taken for flipped, in both terms
    constraint: Constraint = field(default_factory=Constraint)  # the ceiling

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beta > 0", "smoothing >= 0", "smoothing < 0.5")

    def survey(self, policy: Any, rows: list[Row], run: Run, texts: list[str]) -> None:
        self.constraint.survey(lambda part: policy.pairs(part, self.max_response_tokens, self.end), rows, run, texts)

    def whole(self, policy: Any, batch: Batch, generator: torch.Generator) -> Batch:
        return self.constraint.whole(batch, generator)

    def margins(self, pairs: Pairs) -> Tensor:
        return self.beta * gap(pairs.log_ratios)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        return self.constraint.loss(self.margins(pairs), pairs.extra["ceiling"][:, 0], self.smoothing)

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        ceilings = pairs.extra["ceiling"][:, 0]
        past = (self.margins(pairs) > ceilings / 2).float()
        return {"ceiling": float(ceilings.mean()), "past_target": float(past.mean())}
