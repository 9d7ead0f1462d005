"""Dr. GRPO (arXiv 2503.20783): GRPO without the two normalisations that bias it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from alignkit import ops
from alignkit.algos._rl import RL, spread
from alignkit.batch import Batch, Loss
from alignkit.errors import need


@dataclass(kw_only=True)
class DrGRPO(RL):
    """Dr. GRPO (arXiv 2503.20783): A = R - mean over the responses to one input, not divided by their deviation, and token
    losses summed and divided by a constant, the longest response, not by each response's own length. No KL.

    The mean over responses is taken too, as in TRL and oat; verl divides by the constant alone.
    """

    k: int = 8  # responses an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    clip: float = 0.2  # of the token ratio
    normalize: Literal["groups", "sequences", "responses", "tokens", "constant"] = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "k >= 2", "temperature > 0", "clip > 0")

    def credit(self, batch: Batch) -> Batch:
        rewards = self.outcomes(batch)
        return spread(ops.centred(rewards, batch.group), batch)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        return self.clipped(logprobs, batch, low=self.clip)
