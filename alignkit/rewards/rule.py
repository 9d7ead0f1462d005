"""Rewards that look at the response alone or at a column of the row: length, answer, slots of a dialogue act, a constant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import UserError
from alignkit.rewards import column_of


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
class Answer:
    """1 where the last number of the response is the last number of a column of the row, else 0.

    Working before it and text after it do not count. ``1,024`` and ``1024.0`` are the same number; the minus of
    ``9-4`` is an operation, that of ``=-4`` a sign.
    """

    column: str = "answer"  # column of the answer, a number or text that ends with one, such as ``#### 42``

    def __call__(self, batch: Batch) -> Tensor:
        rows = {id(row): row for row in batch.rows}  # one row stands for all samples of its prompt
        answers = {key: self._answer(row) for key, row in rows.items()}
        scores = [last_number(y) == answers[id(row)] for row, y in zip(batch.rows, batch.responses, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=batch.response_ids.device)

    def _answer(self, row: Row) -> Decimal:
        answer = last_number(str(column_of(row, self.column)))
        if answer is None:
            raise UserError(
                f"row {row['id']}: column '{self.column}' holds no number for the answer reward: {row[self.column]!r}."
            )
        return answer


@dataclass(kw_only=True)
class Slots:
    """1 − (missing + repeated + invented) / slots, not below 0, of a dialogue act such as ``inform(name='x';area=y)``.

    A value is there when it stands in the response word for word; ``invented`` counts phone numbers and postcodes
    that the act does not give. An act without checkable values scores 1.
    """

    column: str = "da"  # column of the act

    def __call__(self, batch: Batch) -> Tensor:
        scores = [
            _slots(str(column_of(row, self.column)), y) for row, y in zip(batch.rows, batch.responses, strict=True)
        ]
        return torch.tensor(scores, device=batch.response_ids.device)


@dataclass(kw_only=True)
class Constant:
    """The same reward for everything: the control that shows what a method does without a signal (arXiv 2106.08942)."""

    value: float = 1.0

    def __call__(self, batch: Batch) -> Tensor:
        return torch.full((len(batch),), float(self.value), device=batch.response_ids.device)


NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", re.ASCII)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, None where there is none."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


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
