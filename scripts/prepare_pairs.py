"""Preference data of others as files that ``data=pairs`` reads: train, dev and test, split by prompt.

    python scripts/prepare_pairs.py hh harmless_base_test.jsonl OUT          # Anthropic's HH format: two whole dialogues
    python scripts/prepare_pairs.py alpaca_eval annotations.jsonl OUT        # AlpacaEval: instruction, two outputs, preference
    python scripts/prepare_pairs.py oasst trees.jsonl OUT                    # Open Assistant: ranked replies to the first prompt
    python scripts/prepare_pairs.py persona behaviour.jsonl OUT              # Anthropic's persona sets: a statement, yes or no

Open Assistant's become lists: data.candidates=candidates data.golden=golden data.chosen=null data.rejected=null. Prints what is left out and how often the longer response is the chosen one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def hh(row: Row) -> Row | None:
    """Two dialogues that share all but the last turn of the assistant."""
    mark = "\n\nAssistant:"
    if not all(isinstance(row.get(side), str) and mark in row[side] for side in ("chosen", "rejected")):
        return None
    (one, chosen), (other, rejected) = (row[side].rsplit(mark, 1) for side in ("chosen", "rejected"))
    if one != other or not chosen.strip() or not rejected.strip() or chosen == rejected:
        return None
    return {"prompt": one + mark, "chosen": chosen.strip(), "rejected": rejected.strip()}


def alpaca_eval(row: Row) -> Row | None:
    """Preference 1 or 2; ties and fractions are left out."""
    if row["preference"] not in (1, 2):
        return None
    outputs = [row["output_1"], row["output_2"]]
    if not all(isinstance(x, str) and x.strip() for x in outputs) or outputs[0] == outputs[1]:
        return None
    chosen, rejected = outputs if row["preference"] == 1 else outputs[::-1]
    return {"prompt": row["instruction"], "chosen": chosen, "rejected": rejected, "section": row["dataset"]}


def oasst(row: Row) -> Row | None:
    """The ranked replies of a tree's first prompt; rank 0 is the best."""
    replies = [r for r in row["prompt"].get("replies", []) if r.get("rank") is not None and r["text"].strip()]
    if len(replies) < 2:
        return None
    return {
        "prompt": row["prompt"]["text"],
        "candidates": [r["text"] for r in replies],
        "golden": [-r["rank"] for r in replies],
    }


def persona(row: Row) -> Row | None:
    """What the persona would answer is chosen."""
    return {
        "prompt": row["question"],
        "chosen": row["answer_matching_behavior"],
        "rejected": row["answer_not_matching_behavior"],
    }


FORMATS: dict[str, Callable[[Row], Row | None]] = {
    "hh": hh,
    "alpaca_eval": alpaca_eval,
    "oasst": oasst,
    "persona": persona,
}


def split_of(prompt: str) -> str:
    """70 % of the prompts train, 10 % dev, 20 % test, whatever else is in the file; a dialogue goes by its first turn."""
    share = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) / 16**8
    return "train" if share < 0.7 else "dev" if share < 0.8 else "test"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.file.read_text(encoding="utf-8").split("\n") if line.strip()]
    pairs = [pair for row in rows if (pair := FORMATS[args.format](row))]
    print(f"{len(pairs)} of {len(rows)} rows are kept")
    if pairs and "chosen" in pairs[0]:
        longer = sum(len(p["chosen"]) > len(p["rejected"]) for p in pairs)
        print(f"the longer response is the chosen one in {longer / len(pairs):.1%}")
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        part = [p for p in pairs if split_of(p["prompt"].split("\n\nAssistant:")[0]) == split]
        (args.out / f"{split}.jsonl").write_text(
            "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in part), encoding="utf-8"
        )
        print(f"{split}: {len(part)} rows")


if __name__ == "__main__":
    main()
