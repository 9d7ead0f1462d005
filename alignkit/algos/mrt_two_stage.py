"""MRT with two-stage sampling, as in the authors' earlier release (the CSEM code of arXiv 2308.04386)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit import losses, ops
from alignkit.algos._rl import RL, spread
from alignkit.batch import Batch, Loss
from alignkit.errors import need


@dataclass(kw_only=True)
class MRTTwoStage(RL):
    """0.7 MRT + 0.3 MLE on five samples among the 50 likeliest tokens: the release from which ESRL's two stages are known.

    As there: Q = softmax(alpha log p) over the samples, duplicates and all, without the reference; no baseline besides
    MRT's own; ``mle_weight`` = 0.3 / 0.7. Not as there: padding is masked out of log p; sampling adds no Gumbel noise
    before it draws (the release draws twice); the likelihood is not label-smoothed; the mean is over inputs.
    """

    k: int = 5  # samples of an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    alpha: float = 0.005  # sharpness of Q
    top_k: int = 50
    mle_weight: float = 0.42857142857142855  # 0.3 / 0.7

    weighable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize != "groups":
            raise ValueError("MRT's mean is over inputs: normalize must be groups")
        need(self, "k >= 2", "temperature > 0", "alpha > 0")

    def credit(self, batch: Batch) -> Batch:
        return spread(ops.centred(self.outcomes(batch), batch.group), batch)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        assert batch.advantages is not None
        every = torch.ones(len(batch), dtype=torch.bool, device=batch.mask.device)
        return losses.mrt((logprobs * batch.mask).sum(1), batch.advantages[:, 0], batch.group, self.alpha, every)
