"""From the vocabulary of one model to that of another, by how both cut the same texts (inverse value learning, arXiv 2410.21027,
after its released code).

Two token sequences of a text are aligned by dynamic time warping; how often a token of the base stands beside one of the value
model's is counted, and each of the base's tokens keeps the one that is most its own.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignkit.errors import UserError

SPACES = "Ġ▁"  # how byte-level BPE and SentencePiece write the space before a word


@dataclass
class VocabularyMap:
    """A matrix M (V_base, V_value) with at most one number other than 0 in a row: M v = weight * v[column]."""

    column: Tensor  # (V_base,) int64
    weight: Tensor  # (V_base,) float32 in [0, 1]; 0: a token that stood beside none
    width: int  # V_value

    def __call__(self, v: Tensor) -> Tensor:
        """Logits (..., V_value) over the value model's tokens → (..., V_base) over the base's."""
        return v[..., self.column] * self.weight

    def save(self, path: Path) -> None:
        tensors = {"column": self.column.contiguous(), "weight": self.weight.contiguous()}
        save_file(tensors, path, {"width": json.dumps(self.width)})

    @staticmethod
    def load(path: str) -> VocabularyMap:
        """Raises: UserError: no such file, or no such map in it."""
        try:
            with safe_open(path, framework="pt") as f:
                found = (f.get_tensor("column"), f.get_tensor("weight"), int((f.metadata() or {})["width"]))
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise UserError(
                f"model.steer.map={path}: is no vocabulary map ({str(e).splitlines()[0]}). scripts/map_vocabulary.py makes one."
            ) from None
        return VocabularyMap(*found)


def align(a: list[str], b: list[str]) -> list[tuple[int, int]]:
    """The cheapest path of dynamic time warping through two token sequences: pairs of positions, from (0, 0) to the ends.

    A pair costs the edit distance of its tokens without their space markers, a tenth of that where one contains the other. Of
    equally cheap ways the one that moves in both sequences comes first, then in ``a`` alone, then in ``b`` alone.
    """
    if not a or not b:
        return []
    inf = float("inf")
    above = [0.0] + [inf] * len(b)
    steps = []
    for x in a:
        row, moves = [inf], []
        for j, y in enumerate(b):
            move, least = min(
                enumerate((above[j], above[j + 1], row[j])), key=lambda one: one[1]
            )  # of equals the first
            row.append(least + _cost(x.strip(SPACES), y.strip(SPACES)))
            moves.append(move)
        above = row
        steps.append(moves)
    i, j = len(a) - 1, len(b) - 1
    path = [(i, j)]
    while i or j:
        move = steps[i][j]
        i, j = i - (move != 2), j - (move != 1)
        path.append((i, j))
    return path[::-1]


@lru_cache(maxsize=2**18)
def _cost(a: str, b: str) -> float:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            last, row[j + 1] = row[j + 1], min(last + (x != y), row[j] + 1, row[j + 1] + 1)
    return row[-1] * (0.1 if a in b or b in a else 1.0)


def count(base: Any, value: Any, texts: Iterable[str]) -> Counter[tuple[int, int]]:
    """How often a token of the tokenizer ``base`` is aligned with one of ``value``: (base id, value id) → count.

    Texts are closed with each tokenizer's end-of-sequence token, so that these are found to belong together.
    """
    found: Counter[tuple[int, int]] = Counter()
    for text in texts:
        a, b = (_closed(tokenizer, text) for tokenizer in (base, value))
        path = align(base.convert_ids_to_tokens(a), value.convert_ids_to_tokens(b))
        found.update((a[i], b[j]) for i, j in path)
    return found


def _closed(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def weigh(counts: dict[tuple[int, int], int], rows: int, columns: int) -> VocabularyMap:
    """The map of counts C (rows, columns).

    C less the mean of its row, where C is not 0, else 0; of each column the least is taken to 0 and the greatest to 1, where
    they differ (else the least to 0); of each row the greatest that is left where C is not 0, the first of equals.
    """
    sums: dict[int, int] = defaultdict(int)
    inside: dict[int, list[int]] = defaultdict(list)
    for (i, j), n in counts.items():
        sums[i] += n
        inside[j].append(i)
    column, weight = torch.zeros(rows, dtype=torch.long), torch.zeros(rows)
    best: dict[int, float] = defaultdict(float)
    for j in sorted(inside):
        centred = {i: counts[i, j] - sums[i] / columns for i in inside[j]}
        others = [0.0] if len(centred) < rows else []  # entries where C is 0
        low, high = min([*centred.values(), *others]), max([*centred.values(), *others])
        for i, d in centred.items():
            share = (d - low) / ((high - low) or 1.0)
            if share > best[i]:
                best[i] = share
                column[i], weight[i] = j, share
    return VocabularyMap(column, weight, columns)
