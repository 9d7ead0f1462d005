"""DPO with PCRM's prior constraint: the margin of a pair has a soft ceiling, the lower the more alike its responses are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignkit import losses, ops
from alignkit.algos._pref import Pairs, Pref, gap
from alignkit.errors import need


@dataclass(kw_only=True)
class DPOPCRM(Pref):
    """DPO with PCRM's ceiling (arXiv 2404.00978): -log sigmoid(d) - log sigmoid(delta* - d), d DPO's margin times beta.

    delta* = beta1 / (s + beta2) + beta3, s the responses' length ratio (or ``fixed``: the same for every pair). The least
    loss is at d = delta* / 2. Formula and constants are the authors' released code; the paper's text was not at hand.
    The cosine of a frozen encoder is not offered yet.
    """

    beta: float = 0.1  # how closely the policy is held to the start model
    smoothing: float = 0.0  # share of labels taken for flipped, in both terms
    constraint: Literal["length_ratio", "fixed"] = "length_ratio"
    beta1: float = 20.0  # how fast the ceiling rises as the responses differ
    beta2: float = 0.001
    beta3: float = -15.0
    fixed: float = 4.5  # the ceiling of constraint=fixed
    weight: float = 1.0  # of the ceiling's term; 0: DPO

    def __post_init__(self) -> None:
        super().__post_init__()
        need(
            self, "beta > 0", "smoothing >= 0", "smoothing < 0.5", "beta1 > 0", "beta2 > 0", "fixed > 0", "weight >= 0"
        )
        lowest = self.beta1 / (1 + self.beta2) + self.beta3
        if lowest <= 0:
            raise ValueError(
                f"beta1 / (1 + beta2) + beta3 is {lowest:.4g}: the ceiling of equally long responses must be above 0, or "
                f"preferences are reversed"
            )

    def margins(self, pairs: Pairs) -> Tensor:
        return self.beta * gap(pairs.log_ratios)

    def ceilings(self, pairs: Pairs) -> Tensor:
        """(N,) delta* of each pair; no gradient."""
        if self.constraint == "fixed":
            return torch.full_like(pairs.logprobs[:, 0], self.fixed)
        return ops.ceiling(ops.length_ratio(pairs.ids, pairs.mask), self.beta1, self.beta2, self.beta3)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        margins = self.margins(pairs)
        over = losses.logistic(self.ceilings(pairs) - margins, self.smoothing)
        return losses.logistic(margins, self.smoothing) + self.weight * over

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        ceilings = self.ceilings(pairs)
        past = (self.margins(pairs) > ceilings / 2).float()
        return {"ceiling": float(ceilings.mean()), "past_target": float(past.mean())}
