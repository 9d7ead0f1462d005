"""RLOO (arXiv 2402.14740): REINFORCE with a leave-one-out baseline, a response being one action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignkit import ops
from alignkit.algos._rl import RL, spread
from alignkit.batch import Batch, Loss
from alignkit.errors import need


@dataclass(kw_only=True)
class RLOO(RL):
    """RLOO (arXiv 2402.14740): A_i = R_i - mean of the other responses' R, which is k/(k-1) (R_i - mean R).

    The KL (k1, summed over tokens) goes into the reward. ``ratio=none`` is the paper's -A log pi(y|x); ``sequence`` is the
    clipped ratio of the whole response that TRL optimises, which allows several epochs.
    """

    k: int = 4  # responses an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    ratio: Literal["none", "sequence"] = "none"
    clip: float = 0.2  # of the sequence ratio
    whiten: bool = False  # advantages to mean 0 and variance 1 over the batch

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "k >= 2", "temperature > 0", "clip > 0")
        if self.ratio == "sequence" and self.normalize == "tokens":
            raise ValueError("ratio=sequence has one action a response: normalize cannot be tokens")
        if self.ratio == "none" and self.epochs * self.minibatches > 1:
            raise ValueError("more than one optimizer step a sampling step needs ratio=sequence")

    def credit(self, batch: Batch) -> Batch:
        rewards = self.outcomes(batch)
        advantages = rewards - ops.leave_one_out(rewards, batch.group)
        if self.whiten:
            advantages = ops.whiten(advantages[:, None], torch.ones_like(batch.mask[:, :1]))[:, 0]
        return spread(advantages, batch)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        if self.ratio == "none":
            return super().objective(logprobs, batch)
        return self.clipped(logprobs, batch, low=self.clip, level="sequence")
