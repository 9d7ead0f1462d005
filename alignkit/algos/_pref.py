"""What every method that learns from pairs brings to the loop: settings, and its loss from log-probabilities of pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignkit.algos._fit import Fit
from alignkit.batch import Batch, Loss
from alignkit.policy import Policy


@dataclass
class Pairs:
    """N pairs, the chosen response first: log-probabilities of whole responses and their tokens."""

    logprobs: Tensor  # (N, 2) under the policy
    ref_logprobs: Tensor | None  # (N, 2) under the start model
    ids: Tensor  # (N, 2, T) int64
    mask: Tensor  # (N, 2, T) bool
    extra: dict[str, Tensor] = field(default_factory=dict)  # (N, 2, ...) what the method's `prepare` has put there

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
    def averages(self) -> Tensor:
        """(N, 2) log-probability of a token, on average."""
        return self.logprobs / self.lengths


def gap(values: Tensor) -> Tensor:
    """(N, 2) → (N,): the chosen one's less the rejected one's."""
    return values[:, 0] - values[:, 1]


@dataclass(kw_only=True)
class Pref(Fit):
    """Settings of the loop over pairs and of its optimizer."""

    batch_size: int = 32
    lr: float = 5e-5
    warmup: int = 10
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    needs_reference: ClassVar[bool] = True  # whether the loss reads ref_logprobs

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
        """The pairs of a batch whose rows are chosen, rejected, chosen, …"""
        summed = (policy.forward(batch) * batch.mask).sum(1)
        ref = batch.extra.get("ref_logprob")
        wide = (-1, 2, batch.mask.shape[1])
        return Pairs(
            summed.view(-1, 2),
            None if ref is None else ref.view(-1, 2),
            batch.response_ids.view(wide),
            batch.mask.view(wide),
            {name: x.view(-1, 2, *x.shape[1:]) for name, x in batch.extra.items()},
        )

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The sum over pairs; divided by their number."""
        pairs = self.pairs(policy, batch)
        with torch.no_grad():
            margins = self.margins(pairs)
            metrics = {
                "preference_accuracy": float(right(margins).mean()),
                "margin": float(margins.mean()),
                "chosen_logprob": float(pairs.averages[:, 0].mean()),
                "rejected_logprob": float(pairs.averages[:, 1].mean()),
            }
            metrics |= self.metrics(pairs)
        return Loss(self.pair_losses(pairs).sum(), float(len(pairs.logprobs)), metrics)


def right(margins: Tensor) -> Tensor:
    """(N,) 1 where a pair is ranked as in the data, 0 where it is not, a half where the method does not tell.

    Rounding is not telling: at the start every log-ratio to the start model is 0.
    """
    return ((margins.sign() + 1) / 2).masked_fill(margins.abs() < 1e-4, 0.5)
