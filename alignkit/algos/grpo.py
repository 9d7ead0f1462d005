"""GRPO (arXiv 2402.03300): a response's advantage is its reward, standardised within its group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from alignkit import ops
from alignkit.algos._rl import RL, spread
from alignkit.batch import Batch, Loss
from alignkit.errors import need


@dataclass(kw_only=True)
class GRPO(RL):
    """GRPO (arXiv 2402.03300): A = (R - mean) / (std + eps) over the responses to one input; no critic.

    Clipped token ratio, mean over each response's tokens, then over responses; KL to the start model in the loss (k3).
    The deviation is the sample one (ddof 1), as in TRL, verl and oat; eps is TRL's. TRL's own default loss is DAPO's
    token mean without KL: ``algo.normalize=tokens algo.kl=0``.
    """

    k: int = 8  # responses an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    clip: float = 0.2  # of the token ratio
    eps: float = 1e-4  # added to the deviation
    normalize: Literal["groups", "sequences", "responses", "tokens", "constant"] = "responses"
    kl: float = 0.04
    kl_in: Literal["reward", "loss"] = "loss"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "k >= 2", "temperature > 0", "clip > 0", "eps > 0")

    def credit(self, batch: Batch) -> Batch:
        rewards = self.outcomes(batch)
        return spread(ops.centred(rewards, batch.group) / (ops.group_std(rewards, batch.group) + self.eps), batch)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        return self.clipped(logprobs, batch, low=self.clip)
