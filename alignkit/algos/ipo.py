"""Identity preference optimisation: a squared loss, which does not push a margin to infinity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from alignkit import losses
from alignkit.algos._pref import Pairs, Pref, gap
from alignkit.errors import need


@dataclass(kw_only=True)
class IPO(Pref):
    """IPO (arXiv 2310.12036): (d - 1 / (2 beta))², d the chosen response's log pi/ref less the rejected one's.

    The paper sums log-probabilities over a response; TRL averages them over its tokens.
    """

    beta: float = 0.1  # tau of the paper: the margin that is aimed at is 1 / (2 beta)
    logprobs: Literal["sum", "mean"] = "sum"  # of a response's tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beta > 0")

    def margins(self, pairs: Pairs) -> Tensor:
        return gap(pairs.log_ratios if self.logprobs == "sum" else pairs.log_ratios / pairs.lengths)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        return losses.preference(self.margins(pairs), "ipo", self.beta)
