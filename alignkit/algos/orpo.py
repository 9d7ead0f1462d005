"""ORPO: likelihood of the chosen responses and odds against the rejected ones, in one loss without a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from alignkit import losses, ops
from alignkit.algos._pref import Pairs, Pref, gap
from alignkit.errors import need


@dataclass(kw_only=True)
class ORPO(Pref):
    """ORPO (arXiv 2403.07691): NLL(chosen) - lambda log sigmoid(log odds(chosen) - log odds(rejected)).

    odds = P / (1 - P) with P = exp(a), a the mean log-probability of a response's tokens; the NLL is -a of the chosen
    response. (TRL's also covers the prompt.)
    """

    weight: float = 0.1  # lambda
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "weight >= 0")

    def margins(self, pairs: Pairs) -> Tensor:
        return gap(ops.log_odds(pairs.averages))

    def pair_losses(self, pairs: Pairs) -> Tensor:
        return -pairs.averages[:, 0] + self.weight * losses.logistic(self.margins(pairs))
