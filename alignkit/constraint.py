"""PCRM's prior constraint (arXiv 2404.00978): a soft ceiling on each pair's margin, the lower the more alike its responses are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor

from alignkit import losses, ops, reward_model
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.data import Row
from alignkit.errors import UserError, need
from alignkit.run import Run

KEY = "constraint.similarity"  # under which a row of the data carries the similarity of its responses


@dataclass(kw_only=True)
class Constraint:
    """The ceiling delta* = beta1 / (s + beta2) + beta3 of a pair whose responses have similarity s, and its loss.

    Formulas and constants are the authors' released code (of ``cosine`` it has 20, .001, -15; the defaults here are of
    ``length_ratio``); the paper's text was not at hand. Its ``cosine`` reads prompt and response together
    (``scope=prompt_response``), by the first state of a frozen BERT. Ours: an encoder is optional (else the start model is
    taken, its mean states, of an encoder its first), similarity is of the responses alone, a raw cosine is not below 0, and
    responses that are equal to the model (after a cut) are as alike as can be.
    """

    kind: Literal["length_ratio", "cosine", "fixed", "random"] = "length_ratio"
    beta1: float = 10.0  # how fast the ceiling rises as the responses differ
    beta2: float = 0.001
    beta3: float = -5.0
    weight: float = 1.0  # of the ceiling's term; 0: none
    fixed: float = 4.5  # kind=fixed: the ceiling of every pair
    low: float = 4.0  # kind=random: drawn anew between low and high for each pair and step
    high: float = 5.0
    angular: bool = True  # kind=cosine: (pi - arccos c) / pi of the cosine c, in [1/2, 1]; false: c itself
    encoder: str | None = None  # kind=cosine: id or folder of a frozen encoder, of which the first state is taken
    scope: Literal["response", "prompt_response"] = "response"  # kind=cosine: what is compared

    def __post_init__(self) -> None:
        need(self, "beta1 > 0", "beta2 > 0", "weight >= 0", "fixed > 0", "low > 0", where="constraint.")
        if self.low > self.high:
            raise ValueError(f"constraint.low ({self.low}) must not be above constraint.high ({self.high})")
        lowest = self.beta1 / (1 + self.beta2) + self.beta3
        if self.kind in ("length_ratio", "cosine") and lowest <= 0:
            raise ValueError(
                f"constraint.beta1 / (1 + beta2) + beta3 is {lowest:.4g}: the ceiling of responses that are quite alike must "
                f"be above 0, or preferences are reversed"
            )

    def loss(self, margins: Tensor, ceilings: Tensor, smoothing: float = 0.0) -> Tensor:
        """(N,) -log sigmoid(d) - weight log sigmoid(delta* - d) of margins d; the least is at delta* / 2 (weight 1)."""
        over = losses.logistic(ceilings.to(margins.dtype) - margins, smoothing)
        return losses.logistic(margins, smoothing) + self.weight * over

    def whole(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The pairs of a step with ``extra["ceiling"]``: (2N,) delta* on both rows of a pair, no gradient."""
        return batch.with_(extra={**batch.extra, "ceiling": self._ceilings(batch, generator).repeat_interleave(2)})

    def survey(self, pairs: Callable[[list[Row]], Batch], rows: list[Row], run: Run, texts: list[str]) -> None:
        """Before the first step: similarities, where an encoder gives them, and the distribution of the ceilings.

        Args:
            pairs: what makes a batch of rows, the chosen response of each before the rejected one.
        """
        if self.kind == "cosine":
            if self.encoder is None and run.cfg.model.path is None:
                run.progress.say(
                    "warning: constraint.kind=cosine compares by the start model, which is built from scratch and knows no "
                    "meanings. Set algo.constraint.encoder, or model.path."
                )
            found = run.keep("similarity", lambda: self._cosines(rows, run, texts))
            for row, s in zip(rows, found.tolist(), strict=True):
                row[KEY] = s
        ceilings = torch.cat(
            [self._ceilings(pairs(rows[i : i + 512]), run.generator(i, "ceiling")) for i in range(0, len(rows), 512)]
        )
        at = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
        quantiles = torch.quantile(ceilings.double().cpu(), torch.tensor(at, dtype=torch.float64)).tolist()
        run.write_json(
            "constraint.json", {"pairs": len(rows), "quantiles": dict(zip(map(str, at), quantiles, strict=True))}
        )
        run.progress.say(
            f"ceilings of {len(rows)} pairs: least {quantiles[0]:.3g}, median {quantiles[3]:.3g}, greatest {quantiles[-1]:.3g}"
        )

    def _ceilings(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """(N,) delta* of a batch of pairs."""
        n, device = len(batch) // 2, batch.mask.device
        if self.kind == "fixed":
            return torch.full((n,), self.fixed, device=device)
        if self.kind == "random":
            return (self.low + (self.high - self.low) * torch.rand(n, generator=generator)).to(device)
        if self.kind == "length_ratio":
            wide = (n, 2, -1)
            s = ops.length_ratio(batch.response_ids.view(wide), batch.mask.view(wide))
        else:
            s = torch.tensor([row[KEY] for row in batch.rows[0::2]], device=device)
        return ops.ceiling(s, self.beta1, self.beta2, self.beta3)

    def _cosines(self, rows: list[Row], run: Run, texts: list[str]) -> Tensor:
        """(N,) similarity of both responses of each pair, by the encoder or the start model."""
        cfg = (
            Model(path=self.encoder, device=run.cfg.model.device)
            if self.encoder
            else OmegaConf.to_object(run.cfg.model)
        )
        try:
            reader = reward_model.build(cfg, reward_model.Reading(), run.seed, texts)  # type: ignore[arg-type]
        except UserError as e:
            raise UserError(
                str(e).replace("model.path", "algo.constraint.encoder") if self.encoder else str(e)
            ) from None
        found = reader.embed(rows if self.scope == "prompt_response" else [{**row, "prompt": ""} for row in rows])
        cosine = torch.nn.functional.cosine_similarity(found[0::2], found[1::2])
        return ops.angular(cosine) if self.angular else cosine.clamp(min=0)
