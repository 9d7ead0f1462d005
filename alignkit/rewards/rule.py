"""Rewards that look at the response alone or at a column of the row: length, slots of a dialogue act, a constant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from alignkit.batch import Batch


@dataclass(kw_only=True)
class Length:
    """How near the response's length is to a target: 1 at the target, falling by 1/target a unit, never below 0."""

    target: int = 20
    unit: Literal["tokens", "words", "characters"] = "tokens"

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"target must be at least 1, is {self.target}")

    def __call__(self, batch: Batch) -> Tensor:
        if self.unit == "tokens":
            lengths = batch.lengths.float()
        else:
            sizes = [len(y.split()) if self.unit == "words" else len(y) for y in batch.responses]
            lengths = torch.tensor(sizes, dtype=torch.float32, device=batch.response_ids.device)
        return (1 - (lengths - self.target).abs() / self.target).clamp(min=0)


@dataclass(kw_only=True)
class Slots:
    """1 − (missing + repeated + invented) / slots, not below 0, of a dialogue act such as ``inform(name='x';area=y)``.

    A value is there when it stands in the response word for word; ``invented`` counts phone numbers and postcodes
    that the act does not give. An act without checkable values scores 1.
    """

    column: str = "da"  # column of the act

    def __call__(self, batch: Batch) -> Tensor:
        scores = [_slots(row[self.column], y) for row, y in zip(batch.rows, batch.responses, strict=True)]
        return torch.tensor(scores, device=batch.response_ids.device)


@dataclass(kw_only=True)
class Constant:
    """The same reward for everything: the control that shows what a method does without a signal (arXiv 2106.08942)."""

    value: float = 1.0

    def __call__(self, batch: Batch) -> Tensor:
        return torch.full((len(batch),), self.value, device=batch.response_ids.device)


UNSPOKEN = {"yes", "no", "true", "false", "none", "dontcare", "do not care", "hotel", "restaurant", "'none'", ""}


@lru_cache(maxsize=100_000)
def values(act: str) -> tuple[str, ...]:
    """The slot values that a sentence for this act has to say word for word."""
    inside = act.partition("(")[2].rpartition(")")[0]
    found = []
    for part in inside.split(";"):
        value = part.partition("=")[2].strip().strip("'").strip()
        if value and value not in UNSPOKEN:
            found.append(value)
    return tuple(found)


def _slots(act: str, response: str) -> float:
    wanted = values(act)
    if not wanted:
        return 1.0
    counts = [len(re.findall(rf"(?<!\w){re.escape(v)}(?!\w)", response)) for v in wanted]
    missing = sum(c == 0 for c in counts)
    repeated = sum(max(0, c - 1) for c in counts)
    invented = sum(number not in act for number in re.findall(r"\d{5,}", response))
    return max(0.0, 1 - (missing + repeated + invented) / len(wanted))
