"""The critic of an actor–critic method: a value before each response token."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import losses, ops
from alignkit.batch import Batch
from alignkit.errors import UserError, need


@dataclass(kw_only=True)
class Critic:
    """How values are predicted and trained.

    ``mse`` regresses a scalar; ``hl_gauss`` (arXiv 2403.03950) predicts a histogram over ``[low, high]`` and is trained by
    cross-entropy on a Gaussian around the return. The support must cover all returns, KL penalty included, with some
    room: truncation at its ends pulls values inward.
    """

    trunk: Literal["separate", "shared"] = "separate"  # a copy of the start model, or the policy's own hidden states
    loss: Literal["mse", "hl_gauss"] = "mse"
    lr: float = 1e-4  # peak learning rate of the critic's own weights; the schedule is the policy's
    weight: float = 0.1  # of the value loss beside the policy's
    clip: float | None = 0.2  # mse: values move at most this far from the sampling pass's; null: not clipped
    bins: int = 51  # hl_gauss: bins between low and high
    low: float = -0.5
    high: float = 1.5
    ratio: float = 0.75  # hl_gauss: deviation of the Gaussian, in bins
    path: str | None = (
        None  # reward model of the policy's own architecture that the critic begins as; null: begins at 0
    )

    def __post_init__(self) -> None:
        need(self, "lr >= 0", "weight >= 0", "clip > 0", "bins >= 2", "ratio > 0", where="critic.")
        if self.low >= self.high:
            raise ValueError(f"critic.low ({self.low}) must be below critic.high ({self.high})")
        if self.path is not None and (self.trunk, self.loss) != ("separate", "mse"):
            raise ValueError("critic.path needs critic.trunk=separate and critic.loss=mse: a reward model is both")

    @property
    def edges(self) -> Tensor:
        return torch.linspace(self.low, self.high, self.bins + 1)

    def build(self, model: Any) -> ValueModel:
        """The value model beside a policy's ``model``.

        Raises:
            UserError: ``path`` is no reward model of the same architecture with one score.
        """
        value = ValueModel(
            model.get_output_embeddings().weight.shape[1],
            1 if self.loss == "mse" else self.bins,
            copy.deepcopy(model) if self.trunk == "separate" else None,
        )
        if self.path is not None:
            value.begin_as(self.path)
        return value.to(model.device)

    def values(self, raw: Tensor) -> Tensor:
        """Outputs (B, T, m) → values (B, T)."""
        return raw.squeeze(-1) if self.loss == "mse" else ops.hl_gauss_value(raw, self.edges.to(raw.device))

    def token_losses(self, raw: Tensor, batch: Batch) -> Tensor:
        """Value loss (B, T) of outputs (B, T, m) against ``batch.returns``."""
        assert batch.values is not None and batch.returns is not None
        if self.loss == "mse":
            return losses.clipped_value(raw.squeeze(-1), batch.values, batch.returns, self.clip)
        edges = self.edges.to(raw.device)
        return losses.hl_gauss(raw, batch.returns, edges, self.ratio * float(edges[1] - edges[0]))


class ValueModel(torch.nn.Module):
    """A linear head, 0 at the start, on the hidden states of its own ``trunk``, or of the policy's where that is None."""

    def __init__(self, width: int, outputs: int, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = torch.nn.Linear(width, outputs)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def begin_as(self, path: str) -> None:
        """Take over a reward model: before each token, the normalised score that the response so far would have."""
        from alignkit import reward_model  # which imports policies, and these critics

        found = reward_model.load(path, "cpu")
        if hasattr(self.trunk, "peft_config"):
            raise UserError(
                "critic.path needs a policy whose weights are all trained: set model.lora.r=0, or leave it out."
            )
        own = self.trunk.base_model
        theirs: dict[str, Tensor] = found.model.backbone.state_dict() if found.scalar else {}
        shapes = {name: x.shape for name, x in own.state_dict().items()}
        tokens = found.model.backbone.get_input_embeddings().weight.shape[0]
        theirs = {  # without the padding token that a reward model gets where the policy has none of its own
            name: x[: shapes[name][0]] if name in shapes and x.dim() > 1 and x.shape[0] == tokens else x
            for name, x in theirs.items()
        }
        if shapes != {name: x.shape for name, x in theirs.items()} or found.model.head.weight.shape[0] != 1:
            raise UserError(
                f"critic.path={path}: not a reward model with one score on the policy's own architecture. Train one from the "
                f"policy's weights: alignkit train +algo=bt model.path=POLICY …"
            )
        own.load_state_dict(theirs)
        with torch.no_grad():
            self.head.weight.copy_(found.model.head.weight / found.std)
            self.head.bias.fill_(-found.mean / found.std)
