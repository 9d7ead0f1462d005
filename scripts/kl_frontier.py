"""Reward against KL for several RL runs: what each gains at an equal distance from its start model.

    python scripts/kl_frontier.py RUN [RUN ...] [--metric dev/reward] [--at 1 2 4 8]

Reads ``metrics.jsonl``: at every evaluation on dev the metric, beside the KL (nats a response) of that step's samples, which were
drawn one update earlier. Runs that
differ only in the scale of their rewards look different at an equal KL weight and alike on this table.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from alignkit.claim import reached, trace


def points_of(run: Path, metric: str) -> list[tuple[float, float]]:
    """(KL, metric) at every dev evaluation, in order; the start is at KL 0."""
    if not (run / "metrics.jsonl").is_file():
        raise SystemExit(f"{run}: no run (no metrics.jsonl). Of a pipeline, name the RL step's folder.")
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if x]
    if not any("kl" in line for line in lines):
        raise SystemExit(f"{run}: no KL was logged; the run has no reference model (algo.kl, or algo.kl_limit).")
    found = trace(run, metric)
    if not found:
        raise SystemExit(f"{run}: no metric {metric}. There is: {', '.join(k for line in lines[:1] for k in line)}.")
    return found


def at_kl(points: list[tuple[float, float]], kl: float) -> float:
    """The metric where the trace first reaches a KL; not a number where it never does."""
    found = reached(points, kl)
    return math.nan if found is None else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--metric", default="dev/reward")
    parser.add_argument("--at", type=float, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    traces = {run: points_of(run, args.metric) for run in args.runs}
    print(f"{args.metric} at a KL of …, and at the end\n")
    print("| run | 0 | " + " | ".join(f"{kl:g}" for kl in args.at) + " | end (its KL) |")
    print("|---" * (len(args.at) + 3) + "|")
    for run, points in traces.items():
        cells = [points[0][1], *(at_kl(points, kl) for kl in args.at)]
        shown = ["" if math.isnan(x) else f"{x:.3f}" for x in cells]
        print(f"| {run} | " + " | ".join(shown) + f" | {points[-1][1]:.3f} ({points[-1][0]:.2f}) |")


if __name__ == "__main__":
    main()
