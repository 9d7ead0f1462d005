"""REINFORCE, k samples an input, with the usual baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from alignkit import ops
from alignkit.algos._rl import RL, spread
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import need
from alignkit.policy import Policy
from alignkit.rewards import Reward


@dataclass(kw_only=True)
class Reinforce(RL):
    """REINFORCE with a fixed number of samples an input and a choice of baselines.

    L = -(1/B) sum_i (1/k) sum_j (r_ij - b) log p(y_ij | x_i); the sum is over tokens, end-of-sequence included.
    Sampling is two-stage: ids without a graph, then one teacher-forced pass.
    """

    k: int = 8  # samples an input
    temperature: float = 1.0  # of the samples; log-probabilities stay at 1
    baseline: Literal["none", "fifo", "batch", "leave_one_out"] = "leave_one_out"  # what is subtracted from a reward
    queue: int = 1000  # rewards that the fifo baseline remembers

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "k >= 1", "temperature > 0", "queue >= 1")
        if self.baseline == "leave_one_out" and self.k < 2:
            raise ValueError("baseline=leave_one_out needs k ≥ 2: with one sample the advantage is always 0")
        self._queue: list[float] = []

    def sample(self, policy: Policy, rows: list[Row], reward: Reward, generator: torch.Generator) -> Batch:
        tau = torch.full((len(rows),), self.temperature)
        return policy.generate(rows, self.k, self.decoding, temperature=tau, generator=generator)

    def credit(self, batch: Batch) -> Batch:
        rewards = self.outcomes(batch)
        if self.baseline == "fifo":
            self._queue = ops.fifo(self._queue, rewards.tolist(), self.queue)
        return spread(rewards - ops.baseline(self.baseline, rewards, batch.group, self._queue), batch)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "queue": self._queue}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._queue = state["queue"]
