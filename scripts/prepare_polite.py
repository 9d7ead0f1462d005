"""Split the politeness pairs of S. Raschka's LLMs-from-scratch (Apache-2.0) for the bundled data.

    python scripts/prepare_polite.py TRAIN.jsonl TEST.jsonl OUT_DIR

Keeps instruction, input, chosen and rejected. Training rows whose instruction and input stand in the test rows, whatever
their case and punctuation, are left out; a hundred of the others become the dev rows.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

COLUMNS = ("instruction", "input", "chosen", "rejected")


def plain(row: dict[str, str]) -> str:
    return re.sub(r"[^\w ]", "", f"{row['instruction']} {row['input']}".lower()).strip()


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def main(train: Path, test: Path, out: Path) -> None:
    held_out = read(test)
    seen = {plain(row) for row in held_out}
    rows = [row for row in read(train) if plain(row) not in seen]
    prompts = sorted({plain(row) for row in rows})
    random.Random(13).shuffle(prompts)
    dev = set(prompts[:100])
    splits = {
        "train": [r for r in rows if plain(r) not in dev],
        "dev": [r for r in rows if plain(r) in dev],
        "test": held_out,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, found in splits.items():
        with open(out / f"polite_preference.{name}.jsonl", "w", encoding="utf-8") as f:
            for row in found:
                f.write(json.dumps({c: row[c] for c in COLUMNS}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
