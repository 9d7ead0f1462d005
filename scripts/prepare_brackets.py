"""Make the bundled brackets: a classification task whose classes follow from nested structure.

    python scripts/prepare_brackets.py OUT_DIR

A text is 8 to 40 words: brackets of four kinds, well nested but not all of them closed, among 24 letters that mean
nothing: ``a ( b [ ] ( c``. Its label is the kind of the innermost bracket that is open at its end, the one that would
have to be closed first (here ``round``). The last opening bracket is the answer in 74 % of the texts, the last of a kind
that is opened more often than closed in 90 %; to know more, brackets have to be matched. The four labels have a quarter
of every split; no text occurs twice, in one split or in two.

Of ``train`` 10 % of the labels, drawn one by one, are wrong, each of the other three as often; ``clean`` is the right
one, for analysis. ``dev`` and ``test`` are right.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

KINDS = {"round": "()", "square": "[]", "curly": "{}", "angle": "<>"}
LETTERS = "abcdefghijklmnopqrstuvwx"
WORDS = (8, 40)
BRACKETS = (0.3, 0.7)  # share of a text's words that are brackets, drawn for each text
NOISE = 0.1
SIZES = {"test": 2_000, "dev": 1_500, "train": 16_000}


def text(rng: random.Random) -> tuple[list[str], list[str]]:
    """(words, kinds that are open at the end, the innermost last)."""
    words: list[str] = []
    opened: list[str] = []
    share = rng.uniform(*BRACKETS)
    for _ in range(rng.randint(*WORDS)):
        if rng.random() >= share:
            words.append(rng.choice(LETTERS))
        elif opened and rng.random() < 0.5:
            words.append(KINDS[opened.pop()][1])
        else:
            opened.append(rng.choice(list(KINDS)))
            words.append(KINDS[opened[-1]][0])
    return words, opened


def make(seed: int = 19) -> dict[str, list[dict[str, Any]]]:
    """Split → rows; labels take turns."""
    rng = random.Random(seed)
    labels = list(KINDS)
    seen: set[str] = set()
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, size in SIZES.items():
        rows = splits[split] = []
        while len(rows) < size:
            words, opened = text(rng)
            joined = " ".join(words)
            if joined in seen or opened[-1:] != [labels[len(rows) % len(labels)]]:
                continue
            seen.add(joined)
            rows.append({"text": joined, "label": opened[-1]})
        rng.shuffle(rows)  # any first rows, data.limit, are a fair draw
    for row in splits["train"]:
        row["clean"] = row["label"]
        if rng.random() < NOISE:
            row["label"] = rng.choice([label for label in labels if label != row["clean"]])
    return splits


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in make().items():
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        # packed, without the time in the header: the same rows give the same file
        (out / f"brackets.{split}.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
