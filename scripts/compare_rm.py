"""Reward models side by side on one set of pairs: every arm with every seed, means and 95 % intervals as a Markdown table.

    python scripts/compare_rm.py DATA --seeds 0 1 2 3 4 --epochs 6 --root runs/compare

DATA is a folder of ``scripts/prepare_pairs.py``. The random encoder is the control of a cosine that knows no meanings; for a real one add
``algo.constraint.encoder=…``. Runs that are finished are not repeated. Further words go to every run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ARMS = {
    "bt": ["+algo=bt"],
    "length (10, .001, -5)": ["+algo=pcrm"],
    "length (20, .001, -15)": ["+algo=pcrm", "algo.constraint.beta1=20", "algo.constraint.beta3=-15"],
    "random encoder (20, .001, -15)": ["+algo=pcrm", "algo.constraint.kind=cosine", "algo.constraint.beta1=20", "algo.constraint.beta3=-15"],
    "fixed 4.5": ["+algo=pcrm", "algo.constraint.kind=fixed"],
    "random U(4, 5)": ["+algo=pcrm", "algo.constraint.kind=random"],
}  # fmt: skip
SMALL = ["model.config.hidden_size=64", "model.config.intermediate_size=192", "model.config.num_hidden_layers=2"]
METRICS = ("preference_accuracy", "nll", "ece", "margin", "margin_max", "score_sd", "length_spearman", "longer_wins")
T95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # two-sided, by number of seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--root", default="runs/compare_rm")
    args, words = parser.parse_known_args()
    common = [
        "data=pairs", *(f"data.{split}={args.data}/{split}.jsonl" for split in ("train", "dev", "test")),
        f"algo.epochs={args.epochs}", "algo.max_tokens=128", "evaluate.every=0", "evaluate.final=last", "run.threads=1",
        "run.wandb=disabled", f"run.root={args.root}", "run.save_every=1000000", *SMALL, *words,
    ]  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for arm in args.arms:
            found.setdefault(arm, []).append(one([*ARMS[arm], *common, f"seed={seed}"]))
            print(f"seed {seed}, {arm}: {found[arm][-1]['preference_accuracy']:.1f} %", file=sys.stderr, flush=True)
    print("| arm | " + " | ".join(METRICS) + " | train margin | past target |")
    print("|---" * (len(METRICS) + 3) + "|")
    for arm, runs in found.items():
        cells = [interval([run[name] for run in runs]) for name in (*METRICS, "train_margin", "past_target")]
        print(f"| {arm} | " + " | ".join(cells) + " |")


def one(words: list[str]) -> dict[str, Any]:
    """Metrics of a run on the test pairs, and of training over its last steps."""
    quiet = subprocess.run(
        [sys.executable, "-m", "alignkit", "train", *words], capture_output=True, text=True, check=False
    )
    if quiet.returncode:
        sys.exit(f"{' '.join(words)}\n{quiet.stderr}")
    lines = quiet.stdout.split("\n")
    directory = (
        next(x.removeprefix("files: ") for x in lines if x.startswith("files: "))
        if "files: " in quiet.stdout
        else (next(x.split(" is finished")[0] for x in lines if " is finished" in x))
    )
    result = json.loads((Path(directory) / "result.json").read_text(encoding="utf-8"))
    table = {name: cell["value"] for name, cell in result["evaluation"]["after"]["test"].items()}
    steps = [json.loads(x) for x in (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if x]
    last = [step for step in steps if "margin" in step][-10:]
    table["train_margin"] = statistics.mean(step["margin"] for step in last)
    table["past_target"] = statistics.mean(step.get("past_target", math.nan) for step in last)
    return table


def interval(values: list[float]) -> str:
    known = [x for x in values if not math.isnan(x)]
    if not known:
        return ""
    mean, few = statistics.mean(known), f" (of {len(known)})" if len(known) < len(values) else ""
    if len(known) < 2:
        return f"{mean:.3f}{few}"
    half = T95.get(len(known), 1.96) * statistics.stdev(known) / math.sqrt(len(known))
    return f"{mean:.3f} ± {half:.3f}{few}"


if __name__ == "__main__":
    main()
