"""Make the bundled arithmetic task: chains of additions and subtractions, worked out step by step.

    python scripts/prepare_arithmetic.py OUT_DIR

A prompt is an expression with 3 to 5 operations (its ``level``) on the numbers from 1 to 9, such as ``8+7-9+2=``. The
response does the leftmost operation again and again until a number is left: ``15-9+2=6+2=8``. That number is the
``answer``. No number on the way is negative; no prompt occurs twice, in one split or in two.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

LEVELS = (3, 4, 5)
LARGEST = 9
SIZES = {"train": 14_000, "dev": 500, "test": 1_000}


def solve(first: int, rest: list[tuple[str, int]]) -> list[int]:
    """``8, [("+", 7), ("-", 9)]`` → ``[15, 6]``: the number after each operation."""
    totals = []
    for sign, number in rest:
        first += number if sign == "+" else -number
        totals.append(first)
    return totals


def expression(first: int, rest: list[tuple[str, int]]) -> str:
    return str(first) + "".join(f"{sign}{number}" for sign, number in rest)


def make(seed: int = 13) -> dict[str, list[dict[str, Any]]]:
    """Split → rows; levels take turns: each has a third of every split."""
    rng = random.Random(seed)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    while len(rows) < sum(SIZES.values()):
        level = LEVELS[len(rows) % len(LEVELS)]
        first = rng.randint(1, LARGEST)
        rest = [(rng.choice("+-"), rng.randint(1, LARGEST)) for _ in range(level)]
        prompt, totals = expression(first, rest) + "=", solve(first, rest)
        if prompt in seen or min(totals) < 0:
            continue
        seen.add(prompt)
        response = "=".join(expression(total, rest[i + 1 :]) for i, total in enumerate(totals))
        rows.append({"prompt": prompt, "response": response, "answer": str(totals[-1]), "level": level})
    ends = [0, SIZES["test"], SIZES["test"] + SIZES["dev"], len(rows)]
    return {split: rows[a:b] for split, a, b in zip(("test", "dev", "train"), ends, ends[1:], strict=False)}


def main(out: Path) -> None:
    for split, rows in make().items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if split == "train":  # packed, without the time in the header: the same rows give the same file
            (out / "arithmetic.train.jsonl.gz").write_bytes(gzip.compress(text, mtime=0))
        else:
            (out / f"arithmetic.{split}.jsonl").write_bytes(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
