"""What every method that learns from pairs brings to the loop: settings, and its loss from log-probabilities of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from alignkit.algos._fit import Fit
from alignkit.batch import Batch, Loss
from alignkit.critique import FEEDBACK
from alignkit.data import Row
from alignkit.errors import UserError, need
from alignkit.policy import Policy


@dataclass
class Pairs:
    """N pairs, the chosen response first: log-probabilities of whole responses and their tokens.

    Of data without pairs, N single responses: 1 stands for 2 in every shape, and ``extra["desirable"]`` judges them.
    """

    logprobs: Tensor  # (N, 2) under the policy
    ref_logprobs: Tensor | None  # (N, 2) under the start model
    ids: Tensor  # (N, 2, T) int64
    mask: Tensor  # (N, 2, T) bool
    token_logprobs: Tensor | None = None  # (N, 2, T) of the tokens under the policy, 0 off the mask
    extra: dict[str, Tensor] = field(default_factory=dict)  # (N, 2, ...) of the batch: what one method alone needs

    @property
    def lengths(self) -> Tensor:
        """(N, 2) tokens of each response."""
        return self.mask.sum(2)

    @property
    def log_ratios(self) -> Tensor:
        """(N, 2) log pi/ref of each response."""
        assert self.ref_logprobs is not None
        return self.logprobs - self.ref_logprobs

    @property
    def signs(self) -> Tensor:
        """(N, 2) 1 of a response that is wanted, -1 of one that is not."""
        if "desirable" in self.extra:
            return self.extra["desirable"].to(self.logprobs.dtype) * 2 - 1
        return torch.tensor([1.0, -1.0]).to(self.logprobs).expand_as(self.logprobs)

    @property
    def averages(self) -> Tensor:
        """(N, 2) log-probability of a token, on average."""
        return self.logprobs / self.lengths


def gap(values: Tensor) -> Tensor:
    """(N, 2) → (N,): the chosen one's less the rejected one's."""
    return values[:, 0] - values[:, 1]


class Question(NamedTuple):
    """What a loss reads of the frozen start model for each training response: asked once, and kept on disk."""

    name: str  # its key in ``Batch.extra``
    answer: Callable[[Policy, Batch], Tensor]  # (start model, batch) → (B,) or (B, T)
    settings: tuple[Any, ...] = ()  # what the answer depends on besides start model, rows and cut


@dataclass(kw_only=True)
class Pref(Fit):
    """Settings of the loop over pairs and of its optimizer."""

    batch_size: int = 32
    lr: float = 5e-5
    warmup: int = 10
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_response_tokens: int | None = None  # longer responses are cut
    terminator: Literal["eos", "feedback"] = (
        "eos"  # what ends a response: of a model that then criticises itself, `### Feedback`
    )
    needs_reference: ClassVar[bool] = True  # whether the loss reads ref_logprobs

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "max_response_tokens >= 1")

    @property
    def end(self) -> str | None:
        """The text that closes a response; None: the end-of-sequence token does."""
        return None if self.terminator == "eos" else f"\n\n{FEEDBACK}"

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        if len(sides) == 1:
            raise UserError(
                f"{type(self).__name__} learns from pairs, not from responses that data.desirable judges one by one: give "
                f"data.chosen and data.rejected, or take a method that does (+algo=kto)."
            )
        return rows

    def questions(self) -> list[Question]:
        """What the loss, but not ``margins``, reads of the start model besides ref_logprobs."""
        return []

    def margins(self, pairs: Pairs) -> Tensor:
        """(N,) by how much the method prefers each chosen response, on its own scale: above 0 it ranks the pair right."""
        raise NotImplementedError(f"{type(self).__name__} must define margins(pairs)")

    def pair_losses(self, pairs: Pairs) -> Tensor:
        """(N,) the loss of each pair."""
        raise NotImplementedError(f"{type(self).__name__} must define pair_losses(pairs)")

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        """What this method alone has to log: means over pairs."""
        return {}

    def pairs(self, policy: Policy, batch: Batch) -> Pairs:
        """The pairs of a batch whose rows are chosen, rejected, chosen, …; or its single responses."""
        size = 1 if "desirable" in batch.extra else 2
        tokens = policy.forward(batch) * batch.mask
        wide = (-1, size, batch.mask.shape[1])
        extra = {name: x.view(-1, size, *x.shape[1:]) for name, x in batch.extra.items()}
        return Pairs(
            tokens.sum(1).view(-1, size),
            extra.get("ref_logprob"),
            batch.response_ids.view(wide),
            batch.mask.view(wide),
            tokens.view(wide),
            extra,
        )

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The sum over pairs; divided by their number."""
        pairs = self.pairs(policy, batch)
        with torch.no_grad():
            margins = self.margins(pairs)
            metrics = {
                "preference_accuracy": float(right(margins).mean()),
                "margin": float(margins.mean()),
            }
            if pairs.logprobs.shape[1] == 2:  # a part of single responses may have none of a kind
                chosen, rejected = pairs.averages.mean(0).tolist()
                metrics |= {"chosen_logprob": chosen, "rejected_logprob": rejected}
            metrics |= self.metrics(pairs)
        return Loss(self.pair_losses(pairs).sum(), float(len(pairs.logprobs)), metrics)


def right(margins: Tensor) -> Tensor:
    """(N,) 1 where a pair is ranked as in the data, 0 where it is not, a half where the method does not tell.

    Rounding is not telling: at the start every log-ratio to the start model is 0.
    """
    return ((margins.sign() + 1) / 2).masked_fill(margins.abs() < 1e-4, 0.5)
