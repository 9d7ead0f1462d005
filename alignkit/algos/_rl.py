"""What every RL method brings to the loop of ``stages/rl.py``: settings, and a default for each of its four calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import losses
from alignkit.batch import Batch, Loss
from alignkit.data import Row
from alignkit.decode import Decode
from alignkit.policy import Policy
from alignkit.rewards import Reward


@dataclass(kw_only=True)
class RL:
    """Settings of the RL loop and of its optimizer."""

    steps: int = 100  # sampling steps
    prompts_per_step: int = 32  # inputs a step
    max_new_tokens: int = 64  # longest response that is sampled
    epochs: int = 1  # passes over the samples of a step; more than 1 is off-policy, and not corrected by a ratio
    minibatches: int = 1  # optimizer steps a pass
    micro_tokens: int = 4096  # tokens of a micro-batch, padding counted: memory and speed, never the result
    lr: float = 1e-5  # peak learning rate of AdamW
    warmup: int = 10  # steps of linear warm-up
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"  # decay after the warm-up
    floor: float = 0.0  # share of the peak rate that the decay ends at
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    normalize: Literal["groups", "sequences", "tokens"] = "groups"  # what the mean is over: inputs, responses, tokens
    mle_weight: float = 0.0  # weight of the references' negative log-likelihood beside the policy gradient
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample within this much probability mass; 1: all

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "max_new_tokens", "epochs", "minibatches", "micro_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.max_grad_norm < 0:
            raise ValueError("max_grad_norm must not be negative; 0 turns clipping off")
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"minibatches ({self.minibatches}) cannot be more than prompts_per_step ({self.prompts_per_step})"
            )
        if self.lr < 0 or self.mle_weight < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("lr, mle_weight and top_k must not be negative; top_p lies in (0, 1]")
        if self.mle_weight and self.normalize != "groups":
            raise ValueError("mle_weight needs normalize=groups: both terms are then means over inputs")

    @property
    def decoding(self) -> Decode:
        return Decode(max_new_tokens=self.max_new_tokens, top_k=self.top_k, top_p=self.top_p)

    def sample(self, policy: Policy, rows: list[Row], reward: Reward, generator: torch.Generator) -> Batch:
        """Draw responses to the rows of a step."""
        raise NotImplementedError

    def credit(self, batch: Batch) -> Batch:
        """Turn ``scores`` (B,) into ``advantages`` (B, T)."""
        raise NotImplementedError

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Policy gradient, and the references' likelihood where ``mle_weight`` asks for it.

        ``mle_weight = (1 - lambda) / lambda`` gives the weighting lambda L_RL + (1 - lambda) L_MLE of the released
        code up to a factor, which AdamW does not see (``max_grad_norm`` does: divide it by lambda).
        """
        assert batch.advantages is not None
        logprobs = policy.forward(batch, batch.extra.get("logprob_temperature"))
        loss = losses.policy_gradient(logprobs, batch.advantages, batch.mask, batch.group, self.normalize)
        if self.mle_weight:
            starts = batch.group_starts().tolist()
            gold = policy.demonstrations([batch.rows[i] for i in starts], self.max_new_tokens)
            mle = losses.nll(policy.forward(gold), gold.mask, "sequences")
            loss = Loss(loss.total + self.mle_weight * mle.total, loss.count, {**loss.metrics, **mle.metrics})
        return loss

    def metrics(self, batch: Batch) -> dict[str, float]:
        """What this method alone has to log of a step."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a step depends on besides weights, optimizer, seed and step: saved with every checkpoint, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""


def spread(advantages: Tensor, batch: Batch) -> Batch:
    """The batch with one advantage a response (B,) laid on each of its tokens."""
    return batch.with_(advantages=advantages.float()[:, None] * batch.mask)
