"""SimPO: a preference loss on average log-probabilities, with a margin and without a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from alignkit import losses
from alignkit.algos._pref import Pairs, Pref, gap
from alignkit.errors import need


@dataclass(kw_only=True)
class SimPO(Pref):
    """SimPO (arXiv 2405.14734): -log sigmoid(beta (a+ - a-) - gamma), a the mean log-probability of a response's tokens.

    ``gamma`` is the paper's; the released code's ``gamma_beta_ratio`` is gamma / beta.
    """

    beta: float = 2.0
    gamma: float = 1.0  # margin that is asked for
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beta > 0", "gamma >= 0")

    def margins(self, pairs: Pairs) -> Tensor:
        return self.beta * gap(pairs.averages)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        return losses.logistic(self.margins(pairs) - self.gamma)
