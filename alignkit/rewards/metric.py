"""Rewards that compare a response with its references: sentence BLEU, chrF, exact match."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor

from alignkit.batch import Batch
from alignkit.errors import UserError


@dataclass(kw_only=True)
class SentenceBLEU:
    """Sentence BLEU of sacrebleu against all references, 0 to 1, effective order."""

    smooth: Literal["exp", "floor", "add-k", "none"] = "exp"  # sacrebleu's smoothing of zero counts
    smooth_value: float | None = None  # of floor (0.1) and add-k (1)

    def __post_init__(self) -> None:
        self._bleu = BLEU(effective_order=True, smooth_method=self.smooth, smooth_value=self.smooth_value)

    def __call__(self, batch: Batch) -> Tensor:
        return _score(batch, lambda y, refs: self._bleu.sentence_score(y, refs).score / 100)


@dataclass(kw_only=True)
class ChrF:
    """Sentence chrF of sacrebleu against the best reference, 0 to 1."""

    word_order: int = 0  # 2 makes it chrF++

    def __post_init__(self) -> None:
        self._chrf = CHRF(word_order=self.word_order)

    def __call__(self, batch: Batch) -> Tensor:
        return _score(batch, lambda y, refs: self._chrf.sentence_score(y, refs).score / 100)


@dataclass(kw_only=True)
class ExactMatch:
    """1 where the response is word for word one of the references, else 0."""

    def __call__(self, batch: Batch) -> Tensor:
        return _score(batch, lambda y, refs: float(y in refs))


def _score(batch: Batch, one: object) -> Tensor:
    """Score each response once: within a step many samples of a prompt are the same text."""
    assert callable(one)
    known: dict[tuple[int, str], float] = {}
    scores = []
    for row, response in zip(batch.rows, batch.responses, strict=True):
        if not row["references"]:
            raise UserError(f"row {row['id']} has no references, which this reward compares with. Set data.references.")
        key = (id(row), response)
        if key not in known:
            known[key] = one(response, row["references"])
        scores.append(known[key])
    return torch.tensor(scores, device=batch.response_ids.device)
