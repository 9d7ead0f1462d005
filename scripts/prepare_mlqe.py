"""Split the English–German post-edits of MLQE-PE (CC0, arXiv 2010.04480) for the bundled data.

    python scripts/prepare_mlqe.py TRAIN.jsonl TEST.jsonl OUT_DIR

Keeps src, mt, pe and hter. 350 sentences of the training rows, none of which stands in the others, become the dev rows.
Rows that hold no English source (a file of another language pair has the same form) are refused.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

COLUMNS = ("src", "mt", "pe", "hter")
GERMAN = {"der", "die", "das", "und", "in", "den", "von", "zu", "mit", "ist"}


def read(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    german = sum(bool(GERMAN & set(row["pe"].lower().split())) for row in rows)
    if german < len(rows) / 2:
        sys.exit(f"{path}: only {german} of {len(rows)} post-edits look German. Is this the English–German file?")
    return rows


def main(train: Path, test: Path, out: Path) -> None:
    held_out = read(test)
    seen = {row["src"] for row in held_out}
    rows = [row for row in read(train) if row["src"] not in seen]
    sources = sorted({row["src"] for row in rows})
    random.Random(13).shuffle(sources)
    dev = set(sources[:350])
    splits = {
        "train": [r for r in rows if r["src"] not in dev],
        "dev": [r for r in rows if r["src"] in dev],
        "test": held_out,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, found in splits.items():
        with open(out / f"mlqe_pe.{name}.jsonl", "w", encoding="utf-8") as f:
            for row in found:
                f.write(json.dumps({c: row[c] for c in COLUMNS}, ensure_ascii=False) + "\n")
        print(f"{name}: {len(found)} rows, {sum(r['mt'] == r['pe'] for r in found)} of them left as they were")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
