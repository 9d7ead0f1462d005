"""Minimum risk training (arXiv 1512.02433)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit import losses, ops
from alignkit.algos._rl import RL, draw, spread
from alignkit.batch import Batch, Loss
from alignkit.data import Row
from alignkit.errors import need
from alignkit.policy import Policy
from alignkit.rewards import Reward
from alignkit.scoring import by_parts


@dataclass(kw_only=True)
class MRT(RL):
    """Minimum risk training (arXiv 1512.02433): the expected risk under Q(y) ~ p(y)^alpha over a set of distinct candidates.

    The gradient is alpha Q (reward - expected reward): a self-normalised policy gradient with a baseline of its own. The
    mean is over inputs. A candidate that was drawn twice stands in the set once; the reference is one where ``gold``.
    """

    k: int = 8  # candidates drawn for an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    alpha: float = 0.005  # sharpness of Q
    gold: bool = True  # the row's response is a candidate too
    distinct: bool = True  # equal candidates count once
    length_normalized: bool = False  # Q from the mean log-probability of a token instead of the sum

    weighable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize != "groups":
            raise ValueError("MRT's mean is over inputs: normalize must be groups")
        need(self, f"k >= {1 if self.gold else 2}", "temperature > 0", "alpha > 0")  # a set needs two candidates

    def sample(self, policy: Policy, rows: list[Row], reward: Reward, generator: torch.Generator) -> Batch:
        batch = draw(self, policy, rows, generator)
        if not self.gold:
            return batch
        gold = policy.demonstrations(rows, self.max_new_tokens)
        tau = torch.full((len(rows),), self.temperature, device=policy.device)
        if self.temperature != 1:
            gold.extra["logprob_temperature"] = tau
        gold.extra["given"] = torch.ones(len(gold), dtype=torch.bool, device=policy.device)
        batch.extra["given"] = torch.zeros(len(batch), dtype=torch.bool, device=policy.device)
        with torch.no_grad():
            gold.extra["tau"] = tau
            logprobs = by_parts(gold, self.micro_tokens, lambda part: policy.forward(part, part.extra["tau"]))
            gold = gold.with_(logprobs=logprobs)
        if "engine_logprobs" in batch.extra:
            gold.extra["engine_logprobs"] = logprobs  # no engine has drawn it
        return batch.merge(gold)

    def credit(self, batch: Batch) -> Batch:
        rewards = self.outcomes(batch)
        kept = torch.ones(len(batch), dtype=torch.bool, device=batch.mask.device)
        if self.distinct:
            seen: set[tuple[int, tuple[int, ...]]] = set()
            for i, (g, n) in enumerate(zip(batch.group.tolist(), batch.lengths.tolist(), strict=True)):
                candidate = (g, tuple(batch.response_ids[i, :n].tolist()))
                kept[i] = candidate not in seen
                seen.add(candidate)
        batch.extra["kept"] = kept
        return spread(ops.centred(rewards, batch.group), batch)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        assert batch.advantages is not None
        sums = (logprobs * batch.mask).sum(1)
        if self.length_normalized:
            sums = sums / batch.lengths
        # centred rewards give the same gradient: Q sums to one
        return losses.mrt(sums, batch.advantages[:, 0], batch.group, self.alpha, batch.extra["kept"])

    def metrics(self, batch: Batch) -> dict[str, float]:
        return {"distinct": float(batch.extra["kept"].float().mean())}
