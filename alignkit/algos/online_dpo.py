"""Online DPO (arXiv 2402.04792): sample, let the reward pick the better and the worse, take a preference step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignkit import losses, ops
from alignkit.algos._rl import RL, spread
from alignkit.batch import Batch, Loss
from alignkit.errors import need


@dataclass(kw_only=True)
class OnlineDPO(RL):
    """Online DPO (OAIF, arXiv 2402.04792): k responses of the current policy, the best and the worst by the reward, and
    the DPO or IPO loss of that pair against the start model. A pair with equal rewards is left out of the mean.
    """

    k: int = 2  # responses an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    beta: float = 0.1  # of dpo; tau of ipo
    preference: Literal["dpo", "ipo"] = "dpo"
    needs_reference: ClassVar[bool] = True
    weighable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize != "groups":
            raise ValueError("online DPO's mean is over pairs: normalize must be groups")
        need(self, "k >= 2", "temperature > 0", "beta > 0")
        if self.wants_penalty or self.wants_mle:
            raise ValueError("online DPO holds to the start model through beta: kl and mle_weight must be 0")

    def credit(self, batch: Batch) -> Batch:
        """Two rows a group, the chosen first; advantages ± half the difference of their rewards."""
        rewards = self.outcomes(batch)
        best, worst = ops.best_and_worst(rewards, batch.group)
        kept = torch.stack([best, worst], dim=1).flatten()
        kept_rewards, batch = rewards[kept], batch.take(kept)
        return spread(ops.centred(kept_rewards, batch.group), batch)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        assert batch.ref_logprobs is not None and batch.advantages is not None
        log_ratios = ((logprobs - batch.ref_logprobs) * batch.mask).sum(1)
        margins = log_ratios[0::2] - log_ratios[1::2]
        differ = batch.advantages[0::2, 0] > 0
        loss = losses.preference(margins, self.preference, self.beta) * differ
        n = float(differ.sum())
        won = float(((margins > 0) & differ).sum()) / max(n, 1.0)
        return Loss(loss.sum(), n, {"preference_accuracy": won})
