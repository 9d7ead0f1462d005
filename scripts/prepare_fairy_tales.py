"""Cut the bundled passages out of four books of fairy tales (Grimm, Andersen, Baum, Carroll; public domain in the US).

    python scripts/prepare_fairy_tales.py fairy_tales.txt OUT_DIR

A passage is a run of sentences of one story or chapter, 500 characters at most; its first eight words are the
``prompt``, the rest is the ``response``. Whole stories, drawn with seed 13, make dev and test. Contents, title pages
and notes are left out, and so are passages of 16 words or fewer.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
import textwrap
from pathlib import Path

LONGEST = 500  # characters of a passage
WORDS = 8  # of a prompt
HEADING = re.compile(r"(CHAPTER [IVX]+|\d+)\. .+|[A-Z][^a-z\n]{4,}")  # one line, not indented
MATTER = re.compile(r"\*{5}|Contents|CONTENTS:?|PREPARER’S NOTE|The Wonderful Wizard of Oz")  # no story follows


def stories(text: str) -> dict[str, str]:
    """Title → text on one line, for what is long enough to be a story."""
    found: dict[str, list[str]] = {}
    title = ""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if MATTER.fullmatch(line):
            title = ""
        elif HEADING.fullmatch(block):
            title = line
        elif title:
            found.setdefault(title, []).append(line)
    return {name: " ".join(parts) for name, parts in found.items() if sum(map(len, parts)) > 2 * LONGEST}


def passages(story: str) -> list[str]:
    """Whole sentences, packed; a sentence that is too long by itself is cut between words."""
    packed = [""]
    for sentence in re.split(r"(?<=[.!?]) |(?<=[.!?]['\"’”]) ", story):
        for piece in textwrap.wrap(sentence, LONGEST, break_on_hyphens=False):
            if len(packed[-1]) + 1 + len(piece) > LONGEST:
                packed.append("")
            packed[-1] = f"{packed[-1]} {piece}".strip()
    return [p for p in packed if len(p.split()) > 2 * WORDS]


def main(source: Path, out: Path) -> None:
    told = stories(source.read_text(encoding="utf-8"))
    drawn = random.Random(13).sample(sorted(told), len(told) // 5)
    split_of = {title: ("dev", "test")[i % 2] for i, title in enumerate(drawn)}
    lines: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for title, story in told.items():
        for passage in passages(story):
            words = passage.split(" ")
            row = {"prompt": " ".join(words[:WORDS]), "response": " ".join(words[WORDS:]), "story": title}
            lines[split_of.get(title, "train")].append(json.dumps(row, ensure_ascii=False) + "\n")
    for split, rows in lines.items():
        packed = gzip.compress("".join(rows).encode(), mtime=0)  # no time in the header: the same rows, the same file
        (out / f"fairy_tales.{split}.jsonl.gz").write_bytes(packed)


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:3]))
