"""Direct preference optimisation: the reward is the policy's own log-ratio to the start model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from alignkit import losses
from alignkit.algos._pref import Pairs, Pref, gap
from alignkit.errors import need


@dataclass(kw_only=True)
class DPO(Pref):
    """DPO (arXiv 2305.18290): -log sigmoid(beta d), d the chosen response's log pi/ref less the rejected one's.

    ``smoothing`` is the share of labels taken for flipped: ``conservative`` mixes both losses (cDPO), ``robust`` is the
    unbiased form, ((1 - e) l(d) - e l(-d)) / (1 - 2e).
    """

    beta: float = 0.1  # how closely the policy is held to the start model
    smoothing: float = 0.0  # share of labels taken for flipped
    correction: Literal["conservative", "robust"] = "conservative"  # what smoothing does

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beta > 0", "smoothing >= 0", "smoothing < 0.5")

    def margins(self, pairs: Pairs) -> Tensor:
        return self.beta * gap(pairs.log_ratios)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        return losses.logistic(self.margins(pairs), self.smoothing, self.correction == "robust")
