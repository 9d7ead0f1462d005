"""REBEL (arXiv 2404.16767): regress differences of log-ratios on differences of rewards."""

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
class REBEL(RL):
    """REBEL (arXiv 2404.16767): (D - eta (r - r'))² over two responses to one input, D the difference of their
    log pi / pi_t, pi_t the policy that sampled them; no critic, no clipping.

    Released form; ``form=paper`` divides by eta². eta goes with the scale of the reward. ``pairs=best_worst`` samples k
    responses and keeps the best and the worst (the released large-batch variant). KL in the reward. Pairs with equal
    rewards stay, with the target 0; a pair of identical responses is left out.
    """

    k: int = 2  # responses an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    eta: float = 1.0
    form: Literal["code", "paper"] = "code"
    pairs: Literal["two", "best_worst"] = "two"

    weighable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize != "groups":
            raise ValueError("REBEL's mean is over pairs: normalize must be groups")
        need(self, "k >= 2", "temperature > 0", "eta > 0")
        if self.pairs == "two" and self.k != 2:
            raise ValueError("pairs=two takes k=2; pairs=best_worst chooses two of k")
        if (self.kl_in == "loss" and self.wants_penalty) or self.wants_mle:
            raise ValueError(
                "REBEL's mean is over pairs: its KL goes into the reward (kl_in=reward), mle_weight must be 0"
            )

    def credit(self, batch: Batch) -> Batch:
        rewards = self.outcomes(batch)
        if self.pairs == "best_worst":
            best, worst = ops.best_and_worst(rewards, batch.group)
            kept = torch.stack([best, worst], dim=1).flatten()
            batch, rewards = batch.take(kept), rewards[kept]
        even, odd = (batch.response_ids * batch.mask).view(-1, 2, batch.mask.shape[1]).unbind(1)
        batch.extra["alike"] = (even == odd).all(1).repeat_interleave(2)
        return spread(ops.centred(rewards, batch.group), batch)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        assert batch.logprobs is not None and batch.advantages is not None
        differ = ~batch.extra["alike"]
        log_ratios = ((logprobs - batch.logprobs) * batch.mask).sum(1)
        return losses.rebel(log_ratios[differ], batch.advantages[differ, 0], self.eta, self.form == "paper")
