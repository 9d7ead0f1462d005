"""Make the bundled lists of digits: instructions such as ``sort up: 5 3 9 1 4``, and the vocabulary of their model.

    python scripts/prepare_lists.py OUT_DIR [TOKENIZER_DIR]

A prompt is one of five operations (alignkit/rewards/lists.py) on 4 to 6 digits; the response is its answer. No prompt occurs
twice, in one split or in two.

- ``train``: demonstrations. 30 % of the responses have one to three faults: the model that learns from them has to be imperfect.
  The last 3,000 are no operations but edits, ``write 5 as item 3: 1 3 4``: the model has to understand advice before it
  can learn to give and take it.
- ``first``, ``second``: instructions for the two stages of SRT (arXiv 2406.07168), whose answers are right.
- ``dev``, ``test``: held out. ``draft`` of dev is the right answer, or, of 70 %, one with one to three faults.

The vocabulary is trained on demonstrations and on critiques of them, so that the words of a critique are few tokens.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

from alignkit import critique
from alignkit.critics import Oracle
from alignkit.feedback import Question
from alignkit.loading import train_tokenizer
from alignkit.rewards.lists import OPERATIONS, corrupted, edits, solve, written

ITEMS = (4, 6)
SIZES = {"test": 800, "dev": 300, "first": 4_000, "second": 4_000, "train": 11_000}
EDITS = 3_000  # of the demonstrations
FAULTY = 0.3
DRAFTS = 0.7  # of dev that are faulty; of what the model writes at temperature 0.7 it is 60 %
VOCABULARY = 400


def make(seed: int = 17) -> dict[str, list[dict[str, Any]]]:
    """Split → rows; operations take turns: each has a fifth of every split (of train, of the rows that are no edits)."""
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, size in SIZES.items():
        rows = splits[split] = []
        while len(rows) < size:
            operation = list(OPERATIONS)[len(rows) % len(OPERATIONS)]
            prompt = f"{operation}: {_items(rng)}"
            if split == "train" and len(rows) >= size - EDITS:
                wrong = _faulty(solve(prompt), rng)
                prompt = f"{'; '.join(edits(prompt, wrong)[: Oracle.most]) or operation}: {wrong}"
            if prompt in seen or len(solve(prompt)) < 3:  # at least two items are left
                continue
            seen.add(prompt)
            rows.append({"prompt": prompt, "response": solve(prompt)})
    for row in splits["train"]:
        if rng.random() < FAULTY:
            row["response"] = _faulty(row["response"], rng)
    for row in splits["dev"]:
        row["draft"] = _faulty(row["response"], rng) if rng.random() < DRAFTS else row["response"]
    return splits


def _items(rng: random.Random) -> str:
    return written([rng.randrange(10) for _ in range(rng.randint(*ITEMS))])


def _faulty(response: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 3)):
        response = corrupted(response, rng)
    return response


def vocabulary(splits: dict[str, list[dict[str, Any]]]) -> Any:
    """A BPE of demonstrations and of the oracle's critiques of what is wrong with them."""
    rows = splits["train"]
    texts = [row[key] for row in rows for key in ("prompt", "response")]
    answers = Oracle().ask([Question([], row, row["response"]) for row in rows], None)
    for row, said in zip(rows, answers, strict=True):
        texts.append(f"{row['response']}\n\n{critique.FEEDBACK}\n{said.text}")
    return train_tokenizer(texts, VOCABULARY)


def main(out: Path, tokenizer: Path | None = None) -> None:
    splits = make()
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if split in ("dev", "test"):
            (out / f"lists.{split}.jsonl").write_bytes(text)
        else:  # packed, without the time in the header: the same rows give the same file
            (out / f"lists.{split}.jsonl.gz").write_bytes(gzip.compress(text, mtime=0))
    if tokenizer:
        vocabulary(splits).save_pretrained(tokenizer)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
