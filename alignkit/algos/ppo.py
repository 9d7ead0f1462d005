"""PPO for language models (arXiv 1707.06347, 1909.08593)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from alignkit import ops
from alignkit.algos._rl import RL
from alignkit.batch import Batch, Loss
from alignkit.critic import Critic
from alignkit.errors import need


@dataclass(kw_only=True)
class PPO(RL):
    """PPO (arXiv 1707.06347) with token actions: r_t = -kl log(pi/ref)_t, plus the score at the last token; advantages by
    GAE (arXiv 1506.02438), whitened over the batch's tokens; clipped ratio; a critic trained towards A + V.

    ``critic.trunk`` shares or does not share the policy's; ``critic.loss=hl_gauss`` (arXiv 2403.03950) predicts a histogram.
    ``kl_target`` turns on the adaptive controller (arXiv 1909.08593).
    """

    k: int = 1  # responses an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    clip: float = 0.2  # of the token ratio
    dual_clip: float | None = None  # with A < 0 the loss is at most this times -A; null: off
    gamma: float = 1.0
    lam: float = 0.95
    whiten: Literal["none", "scale", "full"] = (
        "full"  # advantages: as they are, to variance 1, to mean 0 and variance 1
    )
    critic: Critic = field(default_factory=Critic)  # type: ignore[misc]  # how values are predicted and trained
    epochs: int = 4
    kl: float = 0.05
    normalize: Literal["groups", "sequences", "responses", "tokens", "constant"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.critic, Critic):
            raise ValueError("critic must be given: critic._target_=alignkit.critic.Critic")
        need(self, "k >= 1", "temperature > 0", "clip > 0", "dual_clip > 1")
        need(self, "gamma >= 0", "gamma <= 1", "lam >= 0", "lam <= 1")

    def credit(self, batch: Batch) -> Batch:
        assert batch.values is not None
        advantages, returns = ops.gae(self.token_rewards(batch), batch.values, batch.mask, self.gamma, self.lam)
        if self.whiten != "none":
            advantages = ops.whiten(advantages, batch.mask, shift=self.whiten == "full")
        return batch.with_(advantages=advantages, returns=returns)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        return self.clipped(logprobs, batch, low=self.clip, dual=self.dual_clip)

    def metrics(self, batch: Batch) -> dict[str, float]:
        return {"explained_variance": ops.explained_variance(batch)}
