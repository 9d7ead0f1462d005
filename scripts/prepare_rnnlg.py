"""Cut the bundled data-to-text sets out of the RNNLG restaurant and hotel data (Apache-2.0).

    python scripts/prepare_rnnlg.py rnnlg_rest_hotel.train.jsonl rnnlg_rest_hotel.unseen_da_test.jsonl OUT_DIR

Train and dev share no dialogue act: a tenth of the acts, drawn with seed 13, becomes dev with all its sentences as
references. Test holds acts that are in neither. The first training row of an act also lists all its sentences
(``refs``).
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def main(train: Path, test: Path, out: Path) -> None:
    pairs = [json.loads(line) for line in train.read_text(encoding="utf-8").split("\n") if line]
    acts: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        if pair["ref"] not in acts[pair["da"]]:
            acts[pair["da"]].append(pair["ref"])
    dev = set(random.Random(13).sample(sorted(acts), len(acts) // 10))
    seen = set(dev)
    kept = []
    for pair in pairs:
        first = {} if pair["da"] in seen else {"refs": acts[pair["da"]]}
        if pair["da"] not in dev:
            kept.append({"da": pair["da"], "ref": pair["ref"], **first})
        seen.add(pair["da"])
    write(out / "rnnlg.train.jsonl", kept)
    write(out / "rnnlg.dev.jsonl", [{"da": da, "refs": acts[da]} for da in sorted(dev)])
    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").split("\n") if line]
    write(out / "rnnlg.test.jsonl", [{"da": r["da"], "refs": r["refs"]} for r in rows if r["da"] not in acts])


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:4]))
