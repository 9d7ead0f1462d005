"""DAPO (arXiv 2503.14476): clip-higher, token mean, over-long shaping, and groups that all have something to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignkit import ops
from alignkit.algos._rl import RL, draw, spread
from alignkit.batch import Batch, Loss
from alignkit.data import Row
from alignkit.errors import need
from alignkit.policy import Policy
from alignkit.rewards import Reward, scores_of


@dataclass(kw_only=True)
class DAPO(RL):
    """DAPO (arXiv 2503.14476): GRPO's standardised advantage with four changes.

    A wider upper clip; the mean over all tokens of the batch; a soft penalty for responses that come near the cap; and
    dynamic sampling: groups whose rewards are all equal are dropped and others sampled in their place, until
    ``prompts_per_step`` groups are full or ``refills`` further draws are used up. What was dropped counts in sampled tokens.
    No KL.
    """

    k: int = 8  # responses an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    clip_low: float = 0.2
    clip_high: float = 0.28
    eps: float = 1e-4  # added to the deviation
    overlong: int = 0  # tokens before the cap over which the penalty falls from 0 to -1; 0: no penalty
    refills: int = 3  # further draws of prompts_per_step inputs, at most; 0: no dynamic sampling
    normalize: Literal["groups", "sequences", "responses", "tokens", "constant"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(
            self,
            "k >= 2",
            "temperature > 0",
            "clip_low > 0",
            "clip_high > 0",
            "eps > 0",
            "refills >= 0",
            "overlong >= 0",
        )
        if self.overlong >= self.max_new_tokens:
            raise ValueError(f"overlong ({self.overlong}) must be below max_new_tokens ({self.max_new_tokens})")

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * (1 + self.refills)

    def sample(self, policy: Policy, rows: list[Row], reward: Reward, generator: torch.Generator) -> Batch:
        """Groups with unequal rewards first; where too few are found, those without a signal fill up."""
        drawn: list[Batch] = []
        live: list[tuple[int, int]] = []  # (draw, group) with unequal rewards
        for first in range(0, len(rows), self.prompts_per_step):
            batch = draw(self, policy, rows[first : first + self.prompts_per_step], generator)
            scores = scores_of(reward, batch)
            batch = batch.with_(scores=scores)
            uneven = ops.group_std(scores, batch.group)[batch.group_starts()] != 0
            live += [(len(drawn), g) for g in uneven.nonzero().flatten().tolist()]
            drawn.append(batch)
            if not self.refills or len(live) >= self.prompts_per_step:
                break
        if not self.refills:
            return drawn[0]
        dead = [(i, g) for i, b in enumerate(drawn) for g in range(len(b.group_starts())) if (i, g) not in set(live)]
        chosen = sorted((live + dead)[: self.prompts_per_step])
        parts = [
            b.take(
                torch.isin(b.group, torch.tensor([g for j, g in chosen if j == i], device=b.group.device)).nonzero()[
                    :, 0
                ]
            )
            for i, b in enumerate(drawn)
            if any(j == i for j, _ in chosen)
        ]
        whole = Batch.stack(parts, left=not policy.is_encoder_decoder)
        spare = sum(int(b.mask.sum()) for b in drawn) - int(whole.mask.sum())
        return whole.with_(probe_tokens=spare)

    def credit(self, batch: Batch) -> Batch:
        rewards = self.outcomes(batch)
        if self.overlong:
            rewards = rewards + ops.overlong(batch.lengths, self.max_new_tokens, self.overlong)
        return spread(ops.centred(rewards, batch.group) / (ops.group_std(rewards, batch.group) + self.eps), batch)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        return self.clipped(logprobs, batch, low=self.clip_low, high=self.clip_high)
