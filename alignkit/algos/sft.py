"""Supervised fine-tuning: maximum likelihood of the responses, given the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignkit import losses
from alignkit.batch import Batch, Loss
from alignkit.errors import need, need_adamw
from alignkit.policy import Policy


@dataclass(kw_only=True)
class SFT:
    """Supervised fine-tuning (maximum likelihood) on demonstrations; the start of nearly every other method.

    Prompt tokens are not trained; the end-of-sequence token is. The loss is the mean over all response tokens of
    the batch, whatever the micro-batches (the dropout masks do depend on how it is cut).
    """

    steps: int | None = None  # optimizer steps; null: what `epochs` says
    epochs: float = 1.0  # passes over the training rows
    batch_size: int = 64  # rows a step
    lr: float = 5e-4  # peak learning rate of AdamW
    warmup: int = 100  # steps of linear warm-up
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"  # decay after the warm-up
    floor: float = 0.0  # share of the peak rate that the decay ends at
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    micro_tokens: int = (
        8192  # tokens of a micro-batch, padding counted: memory and speed; the result only through dropout
    )
    max_response_tokens: int | None = None  # longer responses are cut

    def __post_init__(self) -> None:
        need(self, "batch_size >= 1", "micro_tokens >= 1", "steps >= 1", "epochs > 0")
        need_adamw(self)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        return losses.nll(policy.forward(batch), batch.mask)

    def state(self) -> dict[str, object]:
        return {}

    def load_state(self, state: dict[str, object]) -> None:
        pass
