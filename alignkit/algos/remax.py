"""ReMax (arXiv 2310.10505): REINFORCE whose baseline is the reward of the greedy response."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from alignkit.algos._rl import RL, draw, spread
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import need
from alignkit.policy import Policy
from alignkit.rewards import Reward


@dataclass(kw_only=True)
class ReMax(RL):
    """ReMax (arXiv 2310.10505): A = R(sampled) - R(greedy); the loss is -A log pi over the number of tokens, as released.

    The greedy responses are scored with the others, their KL included where it is in the reward (alignkit's reading; the
    released code charges each token its own KL only), and then leave the batch: they are decoded and counted, not trained.
    """

    k: int = 1  # responses an input, beside the greedy one
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    difference_clip: float | None = None  # the released code cuts A to ± 5
    normalize: Literal["groups", "sequences", "responses", "tokens", "constant"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "k >= 1", "temperature > 0", "difference_clip > 0")

    def sample(self, policy: Policy, rows: list[Row], reward: Reward, generator: torch.Generator) -> Batch:
        batch = draw(self, policy, rows, generator)
        tau = torch.full((len(rows),), self.temperature)
        greedy = policy.generate(rows, 1, replace(self.decoding, greedy=True, tempered=True), temperature=tau)
        batch.extra["given"] = torch.zeros(len(batch), dtype=torch.bool, device=policy.device)
        greedy.extra |= {k: v.new_ones(len(greedy)) * v[0] for k, v in batch.extra.items() if k not in greedy.extra}
        greedy.extra["given"] = torch.ones(len(greedy), dtype=torch.bool, device=policy.device)
        return batch.with_(probe_tokens=int(greedy.mask.sum())).merge(greedy)

    def credit(self, batch: Batch) -> Batch:
        rewards, greedy = self.outcomes(batch), batch.extra["given"]
        baseline = rewards[greedy].repeat_interleave(self.k)
        batch = batch.take((~greedy).nonzero()[:, 0])
        advantages = rewards[~greedy] - baseline
        if self.difference_clip is not None:
            advantages = advantages.clamp(-self.difference_clip, self.difference_clip)
        return spread(advantages, batch)
