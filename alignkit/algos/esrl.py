"""ESRL (arXiv 2308.02223): two-stage sampling, and samples and temperature by estimated capability."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import ops
from alignkit.algos._rl import RL, spread
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.decode import Decode
from alignkit.errors import need
from alignkit.policy import Policy
from alignkit.rewards import Reward, scores_of


@dataclass(kw_only=True)
class ESRL(RL):
    """ESRL (arXiv 2308.02223): fewer and cooler samples for inputs that the model already handles.

    Two-stage sampling: ids without a graph, then one teacher-forced pass whose gradient is that of sampling with a
    graph. Dynamic sampling: a capability C in [0, 1] of each input sets its number of samples and temperature.
    A FIFO queue of rewards gives a global baseline (``baseline=fifo``).

    From the paper's abstract and figures: the two stages, and that both k and tau follow capability (high: fewer,
    cooler). The queue: a second-hand summary and the authors' released code. alignkit's own reading, not the paper's: the rules k = clip(floor(k_max (1 - C) + 0.5), k_min,
    k_max) and tau = tau_min + (tau_max - tau_min) (1 - C), the queue's size and mean, 1/k weights, all defaults. ``+algo=esrl`` keeps tau at 1 and centres rewards per
    input (leave_one_out), which measured better than the queue on the bundled task: docs/log.md.
    """

    k_min: int = 2  # samples of an input that the model masters
    k_max: int = 8  # samples of an input that it fails
    tau_min: float = 1.0  # temperature at capability 1
    tau_max: float = 1.0  # temperature at capability 0
    capability: Literal["metric", "max_prob", "entropy", "previous"] = "previous"  # where C comes from
    reward_max: float = 1.0  # reward at which `metric` and `previous` put C = 1
    baseline: Literal["none", "fifo", "batch", "leave_one_out"] = "fifo"  # what is subtracted from a reward
    queue: int = 1000  # rewards that the fifo baseline remembers
    standardize: bool = False  # divide advantages by the population deviation of the queue
    logprob_temperature: Literal["one", "sampling"] = "one"  # gradient of the model, or of the tempered policy

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "k_min >= 1", "tau_min > 0", "reward_max > 0", "queue >= 1")
        for low, high in (("k_min", "k_max"), ("tau_min", "tau_max")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low)}) must be at most {high} ({getattr(self, high)})")
        if self.baseline == "leave_one_out" and self.k_min < 2:
            raise ValueError("baseline=leave_one_out needs k_min ≥ 2: one sample has advantage 0")
        if self.standardize and self.baseline != "fifo":
            raise ValueError("standardize needs baseline=fifo, whose queue it measures")
        self._queue: list[float] = []
        self._previous: dict[str, float] = {}  # row id → mean reward when it was last drawn

    @property
    def decodings(self) -> tuple[Decode, ...]:
        return (self.decoding,) if self.capability == "previous" else (self.decoding, self._probing)

    @property
    def _probing(self) -> Decode:
        return replace(self.decoding, greedy=True, entropy=self.capability == "entropy")

    def sample(self, policy: Policy, rows: list[Row], reward: Reward, generator: torch.Generator) -> Batch:
        c, probes = self._capability(policy, rows, reward)
        k, tau = (
            ops.samples_by_capability(c, self.k_min, self.k_max),
            ops.temperature_by_capability(c, self.tau_min, self.tau_max),
        )
        how = replace(self.decoding, tempered=self.logprob_temperature == "sampling")
        batch = policy.generate(rows, k.tolist(), how, temperature=tau, generator=generator)
        batch.extra["capability"] = c.to(policy.device).repeat_interleave(k.to(policy.device))
        batch.extra["tau"] = tau.to(policy.device).repeat_interleave(k.to(policy.device))
        if self.logprob_temperature == "sampling":
            batch.extra["logprob_temperature"] = batch.extra["tau"]
        return batch.with_(probe_tokens=probes)

    def _capability(self, policy: Policy, rows: list[Row], reward: Reward) -> tuple[Tensor, int]:
        """(n,) capabilities in [0, 1], and the tokens that a greedy hypothesis cost, where one was needed."""
        if self.capability == "previous":
            means = [self._previous.get(str(row["id"]), 0.0) for row in rows]
            return (torch.tensor(means) / self.reward_max).clamp(0, 1), 0
        greedy = policy.generate(rows, 1, self._probing)
        tokens = int(greedy.mask.sum())
        if self.capability == "metric":
            return (scores_of(reward, greedy).cpu() / self.reward_max).clamp(0, 1), tokens
        if self.capability == "max_prob":
            assert greedy.logprobs is not None
            return ops.masked_mean(greedy.logprobs.exp(), greedy.mask).cpu(), tokens
        share = greedy.extra["entropy"] / torch.tensor(float(policy.model.config.vocab_size)).log()
        return (1 - ops.masked_mean(share, greedy.mask)).cpu(), tokens

    def credit(self, batch: Batch) -> Batch:
        assert batch.scores is not None
        rewards = self.outcomes(batch)
        if self.baseline == "fifo":
            self._queue = ops.fifo(self._queue, rewards.tolist(), self.queue)
        means = ops.group_mean(batch.scores, batch.group)
        if self.capability == "previous":
            self._previous.update({str(batch.rows[i]["id"]): float(means[i]) for i in batch.group_starts().tolist()})
        advantages = rewards - ops.baseline(self.baseline, rewards, batch.group, self._queue)
        if self.standardize:
            advantages = advantages / (torch.tensor(self._queue).std(correction=0) + 1e-8)
        return spread(advantages, batch)

    def metrics(self, batch: Batch) -> dict[str, float]:
        starts = batch.group_starts()
        named = {"capability": batch.extra["capability"], "tau": batch.extra["tau"], "k": batch.group_sizes().float()}
        return {name: float(x[starts].mean()) for name, x in named.items()}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "queue": self._queue, "previous": self._previous}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._queue, self._previous = state["queue"], state["previous"]
