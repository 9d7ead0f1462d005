"""Contrastive preference optimisation: DPO without the reference model, and the chosen responses' likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from alignkit import losses
from alignkit.algos._pref import Pairs, Pref, gap
from alignkit.errors import need


@dataclass(kw_only=True)
class CPO(Pref):
    """CPO (arXiv 2401.08417): -log sigmoid(beta (l+ - l-)) - weight log-likelihood(chosen), l the summed log-probability.

    The likelihood is a token's, on average, as released; the paper writes that of the whole response
    (``likelihood=sum``).
    """

    beta: float = 0.1
    weight: float = 1.0  # of the chosen responses' negative log-likelihood
    likelihood: Literal["mean", "sum"] = "mean"  # over a response's tokens
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beta > 0", "weight >= 0")

    def margins(self, pairs: Pairs) -> Tensor:
        return self.beta * gap(pairs.logprobs)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        likely = pairs.averages if self.likelihood == "mean" else pairs.logprobs
        return losses.logistic(self.margins(pairs)) - self.weight * likely[:, 0]
