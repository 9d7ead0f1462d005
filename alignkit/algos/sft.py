"""Supervised fine-tuning: maximum likelihood of the responses, given the prompts."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit import losses
from alignkit.algos._fit import Fit
from alignkit.batch import Batch, Loss
from alignkit.errors import need
from alignkit.policy import Policy


@dataclass(kw_only=True)
class SFT(Fit):
    """Supervised fine-tuning (maximum likelihood) on demonstrations; the start of nearly every other method.

    Prompt tokens are not trained; the end-of-sequence token is. The loss is the mean over all response tokens of
    the batch, whatever the micro-batches (the dropout masks do depend on how it is cut).
    """

    max_response_tokens: int | None = None  # longer responses are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "max_response_tokens >= 1")

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        return losses.nll(policy.forward(batch), batch.mask)
