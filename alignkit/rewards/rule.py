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
        return torch.full((len(batch),), float(self.value), device=batch.response_ids.device)


UNSPOKEN = {"yes", "no", "true", "false", "none", "dont_care", "dontcare", "hotel", "restaurant", ""}


@lru_cache(maxsize=100_000)
def values(act: str) -> tuple[str, ...]:
    """The distinct slot values that a sentence for this act has to say word for word, longest first."""
    inside = act.partition("(")[2].rpartition(")")[0]
    found = {part.partition("=")[2].strip().strip("'").strip() for part in inside.split(";")}
    return tuple(sorted(found - UNSPOKEN, key=lambda v: (-len(v), v)))


def _slots(act: str, response: str) -> float:
    wanted = values(act)
    if not wanted:
        return 1.0
    invented = sum(number not in act for number in re.findall(r"\d{5,}", response))
    wrong = invented
    for value in wanted:  # the longest first, blanked once counted: "alamo square" may also stand inside a name
        response, count = re.subn(rf"(?<!\w){re.escape(value)}(?!\w)", " \x00 ", response)
        wrong += abs(count - 1)
    return max(0.0, 1 - wrong / len(wanted))
