"""Write ``tests/golden/NAME.json``: the first steps of a few small runs, which a refactoring must not change.

    python scripts/golden.py

``tests/test_golden.py`` repeats the runs and compares. Write them anew only after a change that is meant to alter
numbers, and say so in the commit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_golden import GOLDEN, RUNS, curve  # noqa: E402


def main() -> None:
    for name in RUNS:
        with tempfile.TemporaryDirectory() as root:
            (GOLDEN / f"{name}.json").write_text(json.dumps(curve(Path(root), name), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
