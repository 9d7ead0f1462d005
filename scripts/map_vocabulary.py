"""Write the map from one model's vocabulary to another's, for ``model.steer.map``.

    python scripts/map_vocabulary.py BASE VALUE --data texts.jsonl --out map.safetensors

BASE and VALUE are folders, hub ids, run directories or bundled:NAME; the value model's logits are led to the base's tokens. Of a
.jsonl file every text in a row is read, of another one every line. A text costs the product of its lengths in tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from alignkit.errors import UserError
from alignkit.loading import read_tokenizer, resolve
from alignkit.vocabulary import count, weigh


def texts_of(path: Path, limit: int | None) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()][:limit]
    if path.suffix != ".jsonl":
        return lines
    return [value for line in lines for value in json.loads(line).values() if isinstance(value, str) and value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("value")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="read at most so many lines")
    args = parser.parse_args()
    try:
        base, value = (
            read_tokenizer(path if (Path(path) / "tokenizer.json").exists() else resolve(path))
            for path in (args.base, args.value)
        )
    except UserError as e:
        sys.exit(f"error: {e}")
    texts = texts_of(args.data, args.limit)
    found = weigh(count(base, value, texts), len(base), len(value))
    found.save(args.out)
    mapped = int((found.weight > 0).sum())
    print(f"{args.out}: {mapped} of {len(base)} tokens lead to one of {len(value)}, by {len(texts)} texts")


if __name__ == "__main__":
    main()
