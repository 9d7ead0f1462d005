"""Cut the English→German training sets out of the Tatoeba export of manythings.org/anki (CC BY 2.0).

    python scripts/prepare_tatoeba.py deu.txt OUT_DIR

Writes ``sft.jsonl`` (every pair, what the bundled model was trained on) and ``train.jsonl`` (15,000 English
sentences with all their translations, what RL trains on; bundled). English sentences that are in the bundled dev
or test set, whatever their case and punctuation, are left out of both.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

BUNDLED = Path(__file__).parent.parent / "alignkit" / "assets" / "data"


def plain(text: str) -> str:
    return re.sub(r"[^\w ]", "", text.lower()).strip()


def main(export: Path, out: Path) -> None:
    held_out = set()
    for split in ("dev", "test"):
        with open(BUNDLED / f"tatoeba_en_de.{split}.jsonl", encoding="utf-8") as f:
            held_out |= {plain(json.loads(line)["src"]) for line in f}
    answers: dict[str, list[str]] = defaultdict(list)
    for line in export.read_text(encoding="utf-8").split("\n"):
        english, _, german = line.partition("\t")
        german = german.split("\t")[0]
        if plain(english) in held_out or not 3 <= len(english.split()) <= 10 or not 1 <= len(german.split()) <= 12:
            continue
        if german not in answers[english]:
            answers[english].append(german)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "sft.jsonl", "w", encoding="utf-8") as f:
        for english, german in answers.items():
            for one in german:
                f.write(json.dumps({"src": english, "tgt": one}, ensure_ascii=False) + "\n")
    chosen = sorted(answers)
    random.Random(13).shuffle(chosen)
    with open(out / "train.jsonl", "w", encoding="utf-8") as f:
        for english in chosen[:15000]:
            row = {"src": english, "tgt": answers[english][0], "refs": answers[english]}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
