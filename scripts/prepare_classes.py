"""Classification data of others as files that ``data=custom`` reads: train, dev and test with columns text and label.

    python scripts/prepare_classes.py clinc data_full.json OUT --per-class 10 --seed 0     # CLINC150: 150 intents
    python scripts/prepare_classes.py tsv FOLDER OUT                                       # SST-2, or files of your own

``tsv`` reads ``train.tsv``, ``dev.tsv`` and ``test.tsv`` of a folder: a text, a tab, its label, a line each; a first line
``sentence<TAB>label`` or ``text<TAB>label`` is left out. Of CLINC150 the queries out of scope are left out. A text that
occurs again, in one split or in two, is kept once: in test rather than dev, in dev rather than train. Rows are shuffled,
so that the first ones (data.limit) are a fair draw.

``--per-class N`` also writes ``train.N.jsonl``: N rows of each label of train, drawn with the seed, for experiments with
few labels. Then:

    alignkit train +algo=METHOD data=custom data.train=OUT/train.10.jsonl data.dev=OUT/dev.jsonl data.test=OUT/test.jsonl \\
        'data.prompt="{text}"' 'data.response="{label}"'
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

Pairs = list[tuple[str, str]]  # (text, label)
SPLITS = ("test", "dev", "train")  # in the order in which a text that occurs again is kept


def clinc(file: Path) -> dict[str, Pairs]:
    """The JSON of CLINC150 (Larson et al. 2019): lists of [query, intent] under train, val and test; ``oos_…`` are out of scope."""
    found = json.loads(file.read_text(encoding="utf-8"))
    names = {"train": "train", "dev": "val", "test": "test"}
    if not isinstance(found, dict) or not set(names.values()) <= set(found):
        sys.exit(f"{file}: must hold lists named train, val and test.")
    return {split: [(text, label) for text, label in found[name]] for split, name in names.items()}


def tsv(folder: Path) -> dict[str, Pairs]:
    """``train.tsv``, ``dev.tsv`` and ``test.tsv`` of a folder."""
    splits: dict[str, Pairs] = {}
    for split in SPLITS:
        file = folder / f"{split}.tsv"
        if not file.is_file():
            sys.exit(f"{file}: is not there; the folder must hold train.tsv, dev.tsv and test.tsv.")
        rows = splits[split] = []
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            text, tab, label = line.strip("\r").partition("\t")
            if not line.strip() or (number == 1 and (text, label) in (("sentence", "label"), ("text", "label"))):
                continue
            if not tab or not text.strip() or not label.strip() or "\t" in label:
                sys.exit(f"{file}, line {number}: must be a text, a tab and a label.")
            rows.append((text, label))
    return splits


FORMATS: dict[str, Callable[[Path], dict[str, Pairs]]] = {"clinc": clinc, "tsv": tsv}


def each_once(splits: dict[str, Pairs]) -> dict[str, Pairs]:
    """Texts without spaces around them, each in one place alone, shuffled: always in the same way."""
    seen: set[str] = set()
    kept: dict[str, Pairs] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for text, label in splits[split]:
            if text.strip() not in seen:
                seen.add(text.strip())
                kept[split].append((text.strip(), label.strip()))
        random.Random(0).shuffle(kept[split])
    return kept


def few(rows: Pairs, per_class: int, seed: int) -> Pairs:
    """So many rows of each label, in the order that they have."""
    places: dict[str, list[int]] = {}
    for i, (_, label) in enumerate(rows):
        places.setdefault(label, []).append(i)
    short = [f"{label} ({len(found)})" for label, found in sorted(places.items()) if len(found) < per_class]
    if short:
        sys.exit(f"--per-class {per_class}: train has fewer rows of {', '.join(short[:5])}.")
    rng = random.Random(seed)
    return [rows[i] for i in sorted(i for label in sorted(places) for i in rng.sample(places[label], per_class))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", type=Path, help="the file, or the folder of tsv")
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-class", type=int, metavar="N", help="also write train.N.jsonl, N rows of each label")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are drawn")
    args = parser.parse_args()
    if args.per_class is not None and args.per_class < 1:
        parser.error("--per-class must be at least 1.")
    if not args.source.exists():
        parser.error(f"{args.source}: no such file or folder.")
    read = FORMATS[args.format](args.source)
    splits = each_once(read)
    found = dict(splits)
    if args.per_class:
        found[f"train.{args.per_class}"] = few(splits["train"], args.per_class, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        again = f", {len(read[name]) - len(rows)} texts that occur again left out" if name in read else ""
        print(f"{name}: {len(rows)} rows, {len({label for _, label in rows})} labels{again}")


if __name__ == "__main__":
    main()
