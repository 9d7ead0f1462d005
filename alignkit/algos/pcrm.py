"""Prior-constrained reward model: Bradley–Terry with a soft ceiling on each pair's margin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.algos._pref import right
from alignkit.algos._rm import RM
from alignkit.batch import Batch, Loss
from alignkit.constraint import Constraint
from alignkit.data import Row
from alignkit.run import Run


@dataclass(kw_only=True)
class PCRM(RM):
    """PCRM (arXiv 2404.00978): -log sigmoid(d) - log sigmoid(delta* - d), d the difference of scores.

    The more alike both responses are, the lower delta*; the least loss is at d = delta* / 2, so margins and the scale of
    scores are bounded. Known from the authors' released code, the paper's text was not at hand. ``readout=token_mean`` is that
    code's: both terms are means over the tokens from where the responses part, of differences of scores token by token;
    ``last`` is ours. What it does for RL is for an experiment to show: see docs/log.md.
    """

    constraint: Constraint = field(default_factory=Constraint)  # the ceiling
    readout: Literal["last", "token_mean"] = "last"  # what the loss reads: the response's score, or each token's
    smoothing: float = 0.0  # share of labels taken for flipped, in both terms

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.readout == "token_mean" and self.pooling not in ("last", "eos"):
            raise ValueError("readout=token_mean needs pooling=last or eos, of which each token has a score")

    def survey(self, model: Any, rows: list[Row], run: Run, texts: list[str]) -> None:
        self.constraint.survey(model.pairs, rows, run, texts)

    def whole(self, model: Any, batch: Batch, generator: torch.Generator) -> Batch:
        return self.constraint.whole(batch, generator)

    def loss(self, model: Any, batch: Batch) -> Loss:
        z, tokens = model.outputs(batch, tokens=self.readout == "token_mean")
        ceilings = batch.extra["ceiling"][0::2]
        margins = model.margins(z)
        if self.readout == "last":
            pair = self.constraint.loss(margins, ceilings, self.smoothing)
        else:
            pair = self.token_mean(model.head.scores(tokens.float()), batch, ceilings)
        with torch.no_grad():
            metrics = {
                "preference_accuracy": float(right(margins).mean()),
                "margin": float(margins.mean()),
                "ceiling": float(ceilings.mean()),
                "past_target": float((margins > ceilings / 2).float().mean()),
            }
        return Loss(pair.sum(), float(len(pair)), metrics)

    def token_mean(self, scores: Tensor, batch: Batch, ceilings: Tensor) -> Tensor:
        """(N,) the loss of token scores (2N, T), from the first differing token to the longer end.

        Past its own end the shorter response has its last score (the released code reads scores of padding there).
        """
        last = scores.gather(1, (batch.lengths - 1)[:, None])
        held = torch.where(batch.mask, scores, last)
        ids = torch.where(batch.mask, batch.response_ids, -1)
        parted = ((ids[0::2] != ids[1::2]).long().cumsum(1) > 0) & (batch.mask[0::2] | batch.mask[1::2])
        each = self.constraint.loss(held[0::2] - held[1::2], ceilings[:, None].expand_as(parted), self.smoothing)
        return (each * parted).sum(1) / parted.sum(1).clamp(min=1)
