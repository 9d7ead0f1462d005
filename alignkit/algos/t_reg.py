"""T-REG: DPO, drawn towards token rewards that the start model gives itself by contrasting two requests to rewrite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from alignkit import losses
from alignkit.algos._pref import Pairs, Pref, Question, gap
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import need
from alignkit.policy import Policy
from alignkit.scoring import by_parts


@dataclass(kw_only=True)
class TREG(Pref):
    """T-REG (arXiv 2412.02685): DPO, drawn towards token rewards that the start model gives by contrasting two requests.

    L_DPO + alpha w (L_REG(chosen) + L_REG(rejected)), L_REG(y) = - sum_t beta rhat_t log pi(y_t); rhat_t = sigmoid(log
    p(y_t | better, y_<t) - log p(y_t | worse, y_<t)) - 1/2 under the start model, which reads y as if it were the
    rewrite that ``better`` and ``worse`` ask for; w = sigmoid(r(rejected) - r(chosen)), r DPO's reward. The formulas
    are from a third-party summary, the paper's text was not at hand; the wording of both requests, no gradient through
    w and rhat, the end token's rhat and beta are ours. Of use where the start model follows instructions.
    """

    beta: float = 0.1  # how closely the policy is held to the start model
    alpha: float = 0.25  # of the regulariser; 0: DPO
    reduction: Literal["sum", "mean"] = "sum"  # of L_REG over a response's tokens
    better: str = (  # request for a better answer: a template over {prompt} and {response}
        "{prompt}\n\nAnswer: {response}\n\n"
        "Rewrite this answer so that it is more helpful, correct, coherent and concise.\n\n"
    )
    worse: str = (  # request for a worse one
        "{prompt}\n\nAnswer: {response}\n\n"
        "Rewrite this answer so that it is unhelpful, incorrect, incoherent and verbose.\n\n"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beta > 0", "alpha >= 0")
        for name in ("better", "worse"):
            template = getattr(self, name)
            try:
                template.format(prompt="", response="")
            except (ValueError, IndexError, KeyError, AttributeError) as e:
                raise ValueError(
                    f"{name}: {template!r} is not a template over {{prompt}} and {{response}} ({e!r}). Double a brace that is "
                    f"text."
                ) from None
        if self.better == self.worse:
            raise ValueError("better and worse are the same request: every token reward would be 0")

    def questions(self) -> list[Question]:
        return [Question("token_reward", self.token_rewards, (self.better, self.worse))]

    def token_rewards(self, start: Policy, batch: Batch) -> Tensor:
        """(B, T) rhat, 0 off the mask."""
        better, worse = (self._asked(start, batch, template) for template in (self.better, self.worse))
        return ((better - worse).sigmoid() - 0.5) * batch.mask

    def _asked(self, start: Policy, batch: Batch, template: str) -> Tensor:
        """(B, T) log-probabilities of the responses as answers to a request to rewrite them."""
        rows = [
            {**row, "prompt": request(template, row, text), "response": text}
            for row, text in zip(batch.rows, batch.responses, strict=True)
        ]
        return by_parts(
            start.demonstrations(rows, self.max_response_tokens, self.end), self.micro_tokens, start.forward
        )

    def margins(self, pairs: Pairs) -> Tensor:
        return self.beta * gap(pairs.log_ratios)

    def regularisers(self, pairs: Pairs) -> Tensor:
        """(N,) w (L_REG(chosen) + L_REG(rejected))."""
        assert pairs.token_logprobs is not None
        rewards = pairs.extra["token_reward"][..., : pairs.mask.shape[2]]  # a micro-batch has fewer columns
        towards = -self.beta * (rewards * pairs.token_logprobs).sum(2)
        if self.reduction == "mean":
            towards = towards / pairs.lengths
        return (-self.margins(pairs)).sigmoid().detach() * towards.sum(1)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        return losses.logistic(self.margins(pairs)) + self.alpha * self.regularisers(pairs)

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        rewards = gap(pairs.extra["token_reward"].sum(2) / pairs.lengths)
        return {"regulariser": float(self.regularisers(pairs).mean()), "token_reward_gap": float(rewards.mean())}


def request(template: str, row: Row, response: str) -> str | list[dict[str, str]]:
    """The row's prompt with the request in its place; of a chat, in the place of the last turn."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return template.format(prompt=prompt, response=response)
    content = template.format(prompt=prompt[-1]["content"], response=response)
    return [*prompt[:-1], {"role": "user", "content": content}]
