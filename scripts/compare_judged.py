"""Pipelines of several seeds that end in a judge, side by side: win rates and metrics as means with 95 % intervals over seeds.

for s in 0 1 2 3 4; do alignkit train +preset=srt_tiny seed=$s; done
python scripts/compare_judged.py runs/srt_tiny-s*
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compare_rm import interval

METRICS = ("exact_match", "first_exact_match", "reward", "first_reward", "parse_failed", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", type=Path)
    runs = [steps_of(place) for place in parser.parse_args().pipelines]
    for step, first in runs[0].items():
        if first["stage"] != "judge":
            continue
        print(
            f"\n| {step}: {first['candidate']} against | judge | win rate %, {len(runs)} seeds | above 50 | below 50 |"
        )
        print("|---|---|---|---|---|")
        for opponent, judges in first["comparisons"].items():
            for judge in judges:
                rates = [run[step]["comparisons"][opponent][judge]["win_rate"] for run in runs]
                above, below = (sum(one) for one in ([r["low"] > 50 for r in rates], [r["high"] < 50 for r in rates]))
                print(f"| {opponent} | {judge} | {interval([r['value'] for r in rates])} | {above} | {below} |")
    print("\n| step | " + " | ".join(METRICS) + " |")
    print("|---" * (len(METRICS) + 1) + "|")
    for step in runs[0]:
        tables = [after(run[step]) for run in runs]
        if all("exact_match" in table for table in tables):
            cells = [interval([t[m]["value"] for t in tables]) if m in tables[0] else "" for m in METRICS]
            print(f"| {step} | " + " | ".join(cells) + " |")


def steps_of(pipeline: Path) -> dict[str, dict[str, Any]]:
    """Step → its result, in the order in which they were run."""
    done = json.loads((pipeline / "result.json").read_text(encoding="utf-8"))["steps_done"]
    return {step: json.loads((pipeline / step / "result.json").read_text(encoding="utf-8")) for step in done}


def after(result: dict[str, Any]) -> dict[str, Any]:
    found = result.get("evaluation", {})
    found = found.get("after", found) or {}
    return found.get("test", {}) if result["stage"] != "judge" else {}


if __name__ == "__main__":
    main()
