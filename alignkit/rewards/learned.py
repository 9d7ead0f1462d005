"""The score of a trained reward model, or of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import reward_model
from alignkit.batch import Batch
from alignkit.errors import UserError, need


@dataclass(kw_only=True)
class Learned:
    """What trained reward models give to a response's text: of several the mean, the least, or mean - lam * deviation.

    A model reads with its own tokenizer and template, and a text ends with its end token. ``per=token`` spreads the score over
    the policy's own tokens, which must be the model's too (they add up to it; of a response that was cut off, to the score
    without an end).
    """

    model: str | list[str]  # runs of stage rm, folders or hub ids
    reduce: Literal["mean", "min", "lcb"] = "mean"  # of several models; lcb: mean - lam * deviation
    lam: float = 1.0
    per: Literal["response", "token"] = "response"
    standardise: bool = True  # by the mean and deviation of scores that were saved with each model
    clip: float | None = None  # each model's score is cut to ± this; with per=token, each token's share
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    compute: Literal["same", "bfloat16"] = "same"
    micro_tokens: int = 8192  # tokens of a forward pass

    def __post_init__(self) -> None:
        need(self, "lam >= 0", "clip > 0", "micro_tokens >= 1")
        paths = [self.model] if isinstance(self.model, str) else list(self.model)
        if not paths:
            raise ValueError("reward.model: name at least one")
        if self.per == "token" and len(paths) > 1 and self.reduce != "mean":
            raise ValueError("per=token needs reduce=mean: tokens of several models can only be averaged")
        self._models = [self._load(path) for path in paths]

    def __call__(self, batch: Batch) -> Tensor:
        """(B,), or (B, T) with ``per=token``."""
        if self.per == "token":
            found = torch.stack([self._cut(model.token_scores(batch, self.micro_tokens)) for model in self._models])
            return found.mean(0)
        keys = [(id(row), text) for row, text in zip(batch.rows, batch.responses, strict=True)]
        unique = {
            key: {**row, "response": text} for key, row, text in zip(keys, batch.rows, batch.responses, strict=True)
        }
        place = {key: i for i, key in enumerate(unique)}  # many samples of a step are the same text
        rows = list(unique.values())
        scores = torch.stack([self._cut(model.score(rows, self.micro_tokens)) for model in self._models])
        return self.reduced(scores)[[place[key] for key in keys]]

    def reduced(self, scores: Tensor) -> Tensor:
        """(M, N) scores of M models → (N,); the deviation is the population's."""
        if self.reduce == "min":
            return scores.amin(0)
        mean = scores.mean(0)
        return mean - self.lam * scores.std(0, correction=0) if self.reduce == "lcb" else mean

    def _cut(self, scores: Tensor) -> Tensor:
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)

    def _load(self, path: str) -> Any:
        try:
            model = reward_model.load(path, self.device, self.compute, self.dtype)
        except UserError as e:
            raise UserError(str(e).replace("model.path", "reward.model")) from None
        model.check()
        if not self.standardise:
            model.mean, model.std = 0.0, 1.0
        return model
