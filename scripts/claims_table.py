"""The verdicts of `alignkit claim` in docs/papers.md: kept in docs/claims, written between two marks.

    alignkit claim pcrm && python scripts/claims_table.py runs/claims/pcrm/claim.json    # keeps it, writes the table anew
    python scripts/claims_table.py                                                       # writes the table anew

Of each file what it holds is kept, without the directories of the runs. A quick look is refused: it has no verdict to quote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from alignkit.catalog import options
from alignkit.claim import HEAD, Found, load, notes, rows
from alignkit.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PAPERS, KEPT = ROOT / "docs" / "papers.md", ROOT / "docs" / "claims"
BEGIN, END = "<!-- claims: written by scripts/claims_table.py -->\n", "<!-- end of claims -->\n"


def keep(file: Path) -> None:
    """Take the verdict of a claim into docs/claims."""
    record = json.loads(file.read_text(encoding="utf-8"))
    claim = load(record["claim"])
    if record["quick"] or record["words"] or record["seeds"] != claim.seeds:
        raise SystemExit(f"{file}: a quick look is not kept. Measure it in full: alignkit claim {record['claim']}")
    del record["runs"]
    KEPT.mkdir(exist_ok=True)
    write_atomically(KEPT / f"{record['claim']}.json", json.dumps(record, indent=1) + "\n")


def block() -> str:
    """Every claim with its verdict and its checks, as Markdown."""
    parts = []
    for name in options("claim"):
        claim, file = load(name), KEPT / f"{name}.json"
        if not file.exists():
            parts += [f"### {name}: not measured in full yet", "", f"{claim.paper}.", ""]
            continue
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = {key: Found(**one) for key, one in record["checks"].items()}
        if (
            record["definition"] != {key: vars(one) for key, one in claim.checks.items()}
            or record["arms"] != claim.arms
        ):
            raise SystemExit(f"{file}: its checks or arms are not those of conf/claim/{name}.yaml. Measure it anew.")
        seeds = ", ".join(map(str, record["seeds"]))
        by = f"`alignkit claim {name}`, seeds {seeds}, commit {', '.join(record['commits'])}."
        parts += [f"### {name}: {record['verdict']}", "", f"{claim.paper}. {by}", ""]
        parts += ["| " + " | ".join(cells) + " |" for cells in (list(HEAD), ["---"] * len(HEAD), *rows(claim, found))]
        parts += ["", *(line for note in notes(claim) for line in (note, ""))]
    return "\n".join(parts)


def written(text: str) -> str:
    """docs/papers.md with the block as it is now."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + block() + "\n" + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="claim.json of claims that were measured in full")
    for file in parser.parse_args().files:
        keep(file)
    write_atomically(PAPERS, written(PAPERS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
