"""MA-PPO (MA-RLHF, arXiv 2410.02743): PPO over macro actions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from alignkit import ops
from alignkit.algos._rl import RL, draw
from alignkit.batch import Batch, Loss
from alignkit.critic import Critic
from alignkit.data import Row
from alignkit.errors import need
from alignkit.policy import Policy
from alignkit.rewards import Reward

SIZES = (1, 2, 3, 5, 10)  # of randomized macros


@dataclass(kw_only=True)
class MAPPO(RL):
    """MA-PPO (arXiv 2410.02743): consecutive tokens form a macro action; value, reward and advantage are the macro's, and
    each of its tokens gets its advantage; ratio and clipping stay at tokens. n = 1 is PPO. Advantages are not whitened.

    The last token is a macro of its own. ``macro_reward=sum`` adds the discounted rewards of a macro's tokens (the
    definition); ``mean`` weighs them as the values are (the released code), which divides the KL of a response by
    about n but not its score: compare with ``sum`` at kl / n. Cuts at a parse tree's nodes are not offered.
    """

    k: int = 1  # responses an input
    temperature: float = 1.0  # of the samples, and of the log-probabilities
    termination: Literal["fixed", "randomized", "perplexity"] = "fixed"  # where a macro ends
    n: int = 5  # tokens of a fixed macro
    repeat_times: int = 3  # randomized: how often each size of 1, 2, 3, 5, 10 stands in the shuffled list
    macro_value: Literal["equal", "unit", "position"] = (
        "equal"  # mean, last token, or weights 1, 1/2, 1/3 … of its values
    )
    macro_reward: Literal["sum", "mean"] = "sum"
    clip: float = 0.2  # of the token ratio
    gamma: float = 1.0
    lam: float = 0.95
    critic: Critic = field(default_factory=Critic)  # type: ignore[misc]  # how values are predicted and trained
    kl: float = 0.05
    normalize: Literal["groups", "sequences", "responses", "tokens", "constant"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.critic, Critic):
            raise ValueError("critic must be given: critic._target_=alignkit.critic.Critic")
        need(self, "k >= 1", "n >= 1", "repeat_times >= 1", "temperature > 0", "clip > 0")
        need(self, "gamma >= 0", "gamma <= 1", "lam >= 0", "lam <= 1")

    @property
    def wants_reference(self) -> bool:
        return super().wants_reference or self.termination == "perplexity"

    def sample(self, policy: Policy, rows: list[Row], reward: Reward, generator: torch.Generator) -> Batch:
        batch = draw(self, policy, rows, generator)
        if self.termination == "randomized":
            sizes = torch.tensor(SIZES * self.repeat_times)
            order = [sizes[torch.randperm(len(sizes), generator=generator)].tolist() for _ in range(len(batch))]
            batch.extra["macro"] = ops.sized_macros(batch.mask, order)
        return batch

    def credit(self, batch: Batch) -> Batch:
        assert batch.values is not None
        mask = batch.mask
        if self.termination == "fixed":
            batch.extra["macro"] = ops.fixed_macros(mask, self.n)
        elif self.termination == "perplexity":
            assert batch.ref_logprobs is not None
            batch.extra["macro"] = ops.perplexity_macros(batch.ref_logprobs, mask)
        macro = batch.extra["macro"]
        weights, discount = ops.macro_weights(macro, mask, self.macro_value, self.gamma)
        values = ops.macro_sum(batch.values * weights, macro, mask)
        rewards = ops.macro_sum(
            self.token_rewards(batch) * (discount if self.macro_reward == "sum" else weights), macro, mask
        )
        real = ops.macro_sum(torch.ones_like(weights), macro, mask) > 0
        advantages, returns = ops.gae(rewards, values, real, self.gamma, self.lam)
        return batch.with_(advantages=advantages.gather(1, macro) * mask, returns=returns.gather(1, macro) * mask)

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        return self.clipped(logprobs, batch, low=self.clip)

    def metrics(self, batch: Batch) -> dict[str, float]:
        macros = (batch.extra["macro"].masked_fill(~batch.mask, -1).amax(1) + 1).float().mean()
        return {"macros": float(macros), "explained_variance": ops.explained_variance(batch)}
