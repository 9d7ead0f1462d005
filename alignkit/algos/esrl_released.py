"""The RLHF variant of ESRL's released code: the most confident inputs leave the batch, PPO trains on the rest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import ops
from alignkit.algos._rl import RL, draw
from alignkit.batch import Batch, Loss
from alignkit.critic import Critic
from alignkit.data import Row
from alignkit.decode import Decode
from alignkit.errors import need
from alignkit.policy import Policy
from alignkit.rewards import Reward


@dataclass(kw_only=True)
class ESRLReleased(RL):
    """What the authors of ESRL (arXiv 2308.02223) released for RLHF: neither k nor temperature adapts.

    One response an input (top_k 50, top_p 0.95); capability C = 1 + mean_t exp(q_t) q_t of the likeliest token's
    probability; the ``drop`` share of inputs with the largest C leaves before scoring, though it was generated and counts;
    then PPO with a critic. Scores and advantages are whitened by FIFO queues, the step's own values pushed first.

    Not as there: q is of the unfiltered model and stops at the end of a response; the share is of the whole batch and
    rounded down; the KL is not clamped at 0; the first queue holds scores, not token rewards (whitening those would pay or
    charge every token without a reward); empty answers stay; each step trains on its own batch, not on two stored ones.
    """

    k: int = 1  # responses an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    top_k: int = 50
    top_p: float = 0.95
    drop: float = 0.3  # share of the inputs, the most confident, that leaves
    queue: int = 1000  # scores, and advantages, that are remembered for whitening; 0: none is done
    reward_clip: float | None = 10.0
    clip: float = 0.2  # of the token ratio
    gamma: float = 0.95
    lam: float = 0.95
    critic: Critic = field(default_factory=Critic)  # type: ignore[misc]  # how values are predicted and trained
    epochs: int = 4
    kl: float = 0.1
    normalize: Literal["groups", "sequences", "responses", "tokens", "constant"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.critic, Critic):
            raise ValueError("critic must be given: critic._target_=alignkit.critic.Critic")
        need(self, "k >= 1", "temperature > 0", "clip > 0", "drop >= 0", "drop < 1", "queue >= 0")
        need(self, "gamma >= 0", "gamma <= 1", "lam >= 0", "lam <= 1")
        self._scores: list[float] = []
        self._advantages: list[float] = []

    @property
    def decoding(self) -> Decode:
        return replace(super().decoding, top=True)

    def sample(self, policy: Policy, rows: list[Row], reward: Reward, generator: torch.Generator) -> Batch:
        batch = draw(self, policy, rows, generator)
        capability = ops.group_mean(ops.released_capability(batch.extra["top"], batch.mask), batch.group)
        starts = batch.group_starts()
        order = capability[starts].argsort(descending=True, stable=True)
        gone = batch.group[starts[order[: int(self.drop * len(starts) + 1e-9)]]]
        kept = batch.take((~torch.isin(batch.group, gone)).nonzero()[:, 0])
        return kept.with_(probe_tokens=int(batch.mask.sum() - kept.mask.sum()))

    def shaped(self, batch: Batch) -> Tensor:
        """(B,) clipped scores, by the mean and deviation of the queue."""
        return self._whitened(super().shaped(batch), self._scores)

    def credit(self, batch: Batch) -> Batch:
        assert batch.values is not None
        self._scores = ops.fifo(self._scores, super().shaped(batch).tolist(), self.queue)
        advantages, returns = ops.gae(self.token_rewards(batch), batch.values, batch.mask, self.gamma, self.lam)
        self._advantages = ops.fifo(self._advantages, advantages[batch.mask].tolist(), self.queue)
        return batch.with_(advantages=self._whitened(advantages, self._advantages) * batch.mask, returns=returns)

    def _whitened(self, x: Tensor, queue: list[float]) -> Tensor:
        if not self.queue:
            return x
        past = torch.tensor(queue, dtype=torch.float64)
        apart, std = x - float(past.mean()), float(past.std(correction=0))
        return apart / std if std > 1e-6 else apart  # equal rewards are centred alone

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        return self.clipped(logprobs, batch, low=self.clip)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "scores": self._scores, "advantages": self._advantages}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._scores, self._advantages = state["scores"], state["advantages"]
