"""What every RL method brings to the loop of ``stages/rl.py``: settings, and a default for each of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from alignkit import losses, ops
from alignkit.batch import Batch, Loss
from alignkit.data import Row
from alignkit.decode import Decode
from alignkit.errors import need, need_adamw
from alignkit.policy import Policy
from alignkit.rewards import Reward


@dataclass(kw_only=True)
class RL:
    """Settings of the RL loop and of its optimizer.

    Any float can be a schedule, as ``algo.kl={start: 0.1, end: 0.01, shape: exponential, steps: 50}``; shapes are
    linear, cosine and exponential; without steps it lasts as long as the run.
    """

    steps: int = 100  # sampling steps
    token_budget: int | None = None  # end the run once this many tokens were sampled, dropped and greedy ones included
    prompts_per_step: int = 32  # inputs a step
    max_new_tokens: int = 64  # longest response that is sampled
    epochs: int = 1  # passes over the samples of a step; methods without a ratio take later ones for on-policy
    minibatches: int = 1  # optimizer steps a pass
    micro_tokens: int = 4096  # tokens of a micro-batch, a prompt counted once: memory and speed, never the result
    lr: float = 1e-5  # peak learning rate of AdamW
    warmup: int = 10  # steps of linear warm-up
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"  # decay after the warm-up
    floor: float = 0.0  # share of the peak rate that the decay ends at
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    normalize: Literal["groups", "sequences", "responses", "tokens", "constant"] = "groups"  # what the mean is over
    mle_weight: float = 0.0  # weight of the references' negative log-likelihood beside the policy gradient
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample within this much probability mass; 1: all
    reward_norm: Literal["none", "running"] = (
        "none"  # running: less the mean and over the deviation of all rewards so far
    )
    reward_clip: float | None = None  # rewards, normalised where they are, are cut to ± this
    missing_eos_penalty: float = 0.0  # taken from the reward of a response that was cut off
    kl: float = 0.0  # coefficient of KL(policy || start model); 0: no reference model is held
    kl_in: Literal["reward", "loss"] = "reward"  # where the KL goes
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float | None = None  # nats a response that `kl` is adapted towards; null: `kl` stays
    kl_horizon: int = 10000  # samples in which the controller changes `kl` by 20 % at most
    kl_limit: float | None = None  # end the run once the KL, in nats a response, is above

    def __post_init__(self) -> None:
        self.seen = [0.0, 0.0, 0.0]  # number, mean and sum of squared deviations of the rewards so far
        self.over = False  # whether the KL went beyond its limit: the run is then at its end
        self._schedules = {f.name: dict(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Mapping)}
        for name, spec in self._schedules.items():
            if not {"start", "end"} <= set(spec) or (spec.get("steps") or 1) < 1:
                raise ValueError(f"{name}: a schedule needs start and end, and steps of at least 1 where given")
            if spec.get("shape") == "exponential" and min(spec["start"], spec["end"]) <= 0:
                raise ValueError(f"{name}: an exponential schedule needs start and end above 0")
        self.at(0)
        need_adamw(self)
        need(self, "steps >= 1", "prompts_per_step >= 1", "max_new_tokens >= 1", "epochs >= 1", "minibatches >= 1")
        need(self, "micro_tokens >= 1", "token_budget >= 1", "top_k >= 0", "top_p > 0", "top_p <= 1", "mle_weight >= 0")
        need(self, "reward_clip > 0", "missing_eos_penalty >= 0", "kl >= 0", "kl_horizon >= 1", "kl_limit > 0")
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"minibatches ({self.minibatches}) cannot be more than prompts_per_step ({self.prompts_per_step})"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1" and self.wants_penalty:
            raise ValueError("kl_in=loss needs kl_estimator=k2 or k3: as a loss, k1 has no expected gradient")
        if self.wants_mle and self.normalize != "groups":
            raise ValueError("mle_weight needs normalize=groups: both terms are then means over inputs")
        if self.kl_target is not None and ("kl" in self._schedules or self.kl <= 0 or self.kl_target <= 0):
            raise ValueError("kl_target needs a kl above 0 to start from, and no schedule on it")

    # ---- what a method brings ------------------------------------------------------------------------------------

    critic: ClassVar[Any] = None  # an actor–critic method declares a setting of this name: see critic.py
    needs_reference: ClassVar[bool] = False  # whether the loss itself reads ref_logprobs
    weighable: ClassVar[bool] = (
        True  # whether a factor on a token's advantage is one on that token's part of the gradient
    )

    def sample(self, policy: Policy, rows: list[Row], reward: Reward, generator: torch.Generator) -> Batch:
        """Draw responses to the rows of a step: ``k`` to each, as most methods have it. May bring their ``scores``, where it
        had to ask the reward."""
        return draw(self, policy, rows, generator)

    def credit(self, batch: Batch) -> Batch:
        """Turn ``scores`` (B,) into ``advantages`` (B, T)."""
        raise NotImplementedError(
            f"{type(self).__name__} must define credit(batch), which turns scores into advantages"
        )

    def objective(self, logprobs: Tensor, batch: Batch) -> Loss:
        """The method's loss of current log-probabilities (B, T); here the policy gradient."""
        assert batch.advantages is not None
        return losses.policy_gradient(
            logprobs, batch.advantages, batch.mask, batch.group, self.normalize, self.max_new_tokens
        )

    def metrics(self, batch: Batch) -> dict[str, float]:
        """What this method alone has to log of a step."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a step depends on besides weights, optimizer, seed and step: saved with every checkpoint, as JSON."""
        kept: dict[str, Any] = {"kl": self.kl, "over": self.over} if self.wants_reference else {}
        return kept | ({"seen": self.seen} if self.reward_norm == "running" else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        self.kl = self.kl if "kl" in self._schedules else state.get("kl", self.kl)
        self.over = state.get("over", False)
        self.seen = state.get("seen", self.seen)

    # ---- what the stage calls ------------------------------------------------------------------------------------

    @property
    def rows_per_step(self) -> int:
        """Rows drawn for a step; more than ``prompts_per_step`` where a method passes over some."""
        return self.prompts_per_step

    @property
    def wants_mle(self) -> bool:
        """Whether the references' likelihood is weighed in, now or later."""
        return self.mle_weight > 0 or "mle_weight" in self._schedules

    @property
    def wants_penalty(self) -> bool:
        """Whether a KL is charged, now or later."""
        return self.kl > 0 or "kl" in self._schedules

    @property
    def wants_reference(self) -> bool:
        return self.needs_reference or self.wants_penalty or self.kl_limit is not None

    @property
    def decoding(self) -> Decode:
        return Decode(max_new_tokens=self.max_new_tokens, top_k=self.top_k, top_p=self.top_p)

    @property
    def decodings(self) -> tuple[Decode, ...]:
        """All ways in which a step decodes: what an engine must be able to do."""
        return (self.decoding,)

    def at(self, step: int) -> None:
        """Set every scheduled setting to its value at ``step``."""
        for name, spec in self._schedules.items():
            setattr(self, name, ops.scheduled(spec, step, self.steps))

    def rates(self, step: int) -> list[float]:
        """Learning rates at ``step``: the policy's, and the critic's where there is one."""
        own = self._schedules.get("lr")  # takes the place of `schedule`, not of the warm-up
        factor = ops.warmup_decay(step, self.steps, self.warmup, "constant" if own else self.schedule, self.floor)
        if self.critic is None:
            return [factor * self.lr]
        return [factor * self.lr, factor * self.critic.lr * (self.lr / own["start"] if own and own["start"] else 1.0)]

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The objective, and what settings add to it: a critic's loss, the KL, the references' likelihood.

        ``mle_weight = (1 - lambda) / lambda`` gives the weighting lambda L_RL + (1 - lambda) L_MLE of ESRL's released
        code up to a factor, which AdamW does not see (``max_grad_norm`` does: divide it by lambda).
        """
        logprobs, raw = policy.score(batch, batch.extra.get("logprob_temperature"))
        loss = self.objective(logprobs, batch)
        total, metrics = loss.total, dict(loss.metrics)
        if batch.logprobs is not None:
            apart = (logprobs.detach() - batch.logprobs).abs() * batch.mask
            metrics["log_ratio"] = float(apart.sum() / batch.mask.sum())
        if self.critic is not None:
            raw = policy.value_outputs(batch) if raw is None else raw
            value, n = self._aggregate(self.critic.token_losses(raw, batch), batch)
            total = total + self.critic.weight * value
            metrics["value_loss"] = float(value.detach()) / n
        if self.kl and self.kl_in == "loss":
            assert batch.ref_logprobs is not None
            nats = ops.kl(logprobs, batch.ref_logprobs, self.kl_estimator)
            if "given" in batch.extra:  # not drawn from the policy, so no estimate of its KL
                nats = nats * ~batch.extra["given"][:, None]
            total = total + self.kl * self._aggregate(nats, batch)[0]
        if self.mle_weight:
            starts = batch.group_starts().tolist()
            gold = policy.demonstrations([batch.rows[i] for i in starts], self.max_new_tokens)
            mle = losses.nll(policy.forward(gold), gold.mask, "sequences")
            total, metrics = total + self.mle_weight * mle.total, {**metrics, **mle.metrics}
        return Loss(total, loss.count, metrics)

    def _aggregate(self, x: Tensor, batch: Batch) -> tuple[Tensor, float]:
        return losses.aggregate(x, batch.mask, batch.group, self.normalize, self.max_new_tokens)

    def adapt(self, batch: Batch) -> float | None:
        """KL(policy || start model) of samples in nats a response, where it is known; moves ``kl`` towards the target, and
        notes when the limit is passed."""
        if batch.ref_logprobs is None:
            return None
        batch = batch.drawn()
        assert batch.logprobs is not None and batch.ref_logprobs is not None
        nats = float(((batch.logprobs - batch.ref_logprobs) * batch.mask).sum(1).mean())
        self.over = self.kl_limit is not None and nats > self.kl_limit
        if self.kl_target:
            self.kl = ops.adapt_kl(self.kl, nats, self.kl_target, len(batch), self.kl_horizon)
        return nats

    def observe(self, batch: Batch) -> None:
        """Take a step's scores into the running mean and deviation, before they are used."""
        if self.reward_norm == "running":
            scores = batch.drawn().scores
            assert scores is not None
            self.seen = ops.moments(self.seen, scores)

    # ---- what methods share --------------------------------------------------------------------------------------

    def clipped(self, logprobs: Tensor, batch: Batch, **how: Any) -> Loss:
        """``losses.clipped`` against the policy that sampled; ``how`` are its keywords (low, high, dual, level)."""
        assert batch.logprobs is not None and batch.advantages is not None
        return losses.clipped(
            logprobs, batch.logprobs, batch.advantages, batch.mask, batch.group, self.normalize, self.max_new_tokens, **how
        )  # fmt: skip

    def shaped(self, batch: Batch) -> Tensor:
        """(B,) scores, normalised and cut to the clip as set, less the penalty of a response without an end."""
        assert batch.scores is not None
        mean, deviation = self.scale
        return self._cut((batch.scores - mean) / deviation) - self._unended(batch)

    @property
    def scale(self) -> tuple[float, float]:
        """(mean, deviation) that rewards are normalised by."""
        if self.reward_norm == "none" or self.seen[0] < 2:
            return 0.0, 1.0
        return self.seen[1], max((self.seen[2] / (self.seen[0] - 1)) ** 0.5, 1e-6)

    def _cut(self, rewards: Tensor) -> Tensor:
        return rewards if self.reward_clip is None else rewards.clamp(-self.reward_clip, self.reward_clip)

    def _unended(self, batch: Batch) -> Tensor | float:
        return self.missing_eos_penalty * (~batch.extra["ended"]) if self.missing_eos_penalty else 0.0

    def penalty(self, batch: Batch) -> Tensor | float:
        """(B, T) what the KL takes from the reward of each token; 0 where it is not in the reward."""
        if not self.kl or self.kl_in != "reward":
            return 0.0
        assert batch.logprobs is not None and batch.ref_logprobs is not None
        return self.kl * ops.kl(batch.logprobs, batch.ref_logprobs, self.kl_estimator) * batch.mask

    def outcomes(self, batch: Batch) -> Tensor:
        """(B,) shaped scores less the KL of the whole response: the reward of a method with one action a response."""
        penalty = self.penalty(batch)
        return self.shaped(batch) - (penalty.sum(1) if isinstance(penalty, Tensor) else 0.0)

    def token_rewards(self, batch: Batch) -> Tensor:
        """(B, T) the reward of a method with token actions: the shaped score at the last, or what a reward gives each token
        (normalised and cut by itself), less the KL of each token."""
        tokens, last = batch.extra.get("token_scores"), ops.last_token(batch.mask)
        if tokens is None:
            return last * self.shaped(batch)[:, None] - self.penalty(batch)
        mean, deviation = self.scale
        missing = self._unended(batch)
        at_end = mean / deviation + (missing[:, None] if isinstance(missing, Tensor) else missing)
        return self._cut(tokens / deviation) - last * at_end - self.penalty(batch)


def draw(algo: Any, policy: Policy, rows: list[Row], generator: torch.Generator) -> Batch:
    """``algo.k`` responses to each row at ``algo.temperature``, which log-probabilities then have too, in sampling
    and in the loss: the tempered policy is what is trained."""
    tau = torch.full((len(rows),), algo.temperature)
    how = replace(algo.decoding, tempered=True)
    batch = policy.generate(rows, algo.k, how, temperature=tau, generator=generator)
    if algo.temperature != 1:
        batch.extra["logprob_temperature"] = torch.full((len(batch),), algo.temperature, device=policy.device)
    return batch


def spread(advantages: Tensor, batch: Batch) -> Batch:
    """The batch with one advantage a response (B,) laid on each of its tokens."""
    return batch.with_(advantages=advantages.float()[:, None] * batch.mask)
