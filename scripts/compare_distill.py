"""Every way to distil a classifier side by side, paired by seed, with what each costs: the claim of arXiv 2302.00444 and its controls.

    for s in 0 1 2 3 4; do python scripts/prepare_classes.py clinc data_full.json OUT/s$s --per-class 5 --seed $s; done
    alignkit train +algo=finetune data=custom data.train=OUT/s0/train.jsonl … run.name=teacher
    python scripts/compare_distill.py --teacher runs/teacher --runs 12 data=custom data.train=OUT/s{seed}/train.5.jsonl …

Words behind the options go to every run; ``{seed}`` in them is the seed. The selection methods (KSM in its variants, and the
constant grid, its fair opponent) train ``--runs`` students to select and one more to report; the others train one. What is
finished is not run again. Beside the table it writes trajectories.svg, the mean weights over training, and envelope.svg,
the grid's held-out losses and those of KSM's episodes.
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

from compare_rm import T95

from alignkit import plots
from alignkit.algos._distill import KNOWLEDGE
from alignkit.algos.constant_grid import ConstantGrid

SCALED = ["algo.loss_scale=init_mean"]
PLAIN = {
    "finetune": ["+algo=finetune"],
    "kd": ["+algo=kd"],
    "pkd": ["+algo=pkd"],
    "dynamic_kd": ["+algo=dynamic_kd"],
    "all_equal": ["+algo=all_equal", *SCALED],
    "random_hard": ["+algo=random_hard", *SCALED],
    "random_soft": ["+algo=random_soft", *SCALED],
}
SELECTING = {
    "constant_grid": ["+algo=constant_grid"],
    "ksm, soft": ["+algo=ksm"],
    "ksm, hard": ["+algo=ksm", "algo.action=hard"],
    "ksm, no bonus": ["+algo=ksm", "algo.exploration=0"],
    "ksm, reward at every step": ["+algo=ksm", "algo.phases={steps}", "algo.updates=3"],
}
ONLY_SELECT = ("algo.phases", "algo.reward_rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=[*PLAIN, *SELECTING], choices=[*PLAIN, *SELECTING])
    parser.add_argument("--runs", type=int, default=12, help="student trainings that a selection method may spend")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of a student training")
    parser.add_argument(
        "--offset", type=int, default=100, help="added to the seed of what is reported: selection saw the others"
    )
    parser.add_argument("--root", default="runs/compare_distill")
    parser.add_argument("--metric", default="accuracy")
    args, words = parser.parse_known_args()
    common = [
        f"algo.teacher={args.teacher}", f"algo.steps={args.steps}", f"run.root={args.root}", "run.threads=1",
        "run.wandb=disabled", "run.save_every=1000000", *words,
    ]  # fmt: skip
    if args.runs > len(ConstantGrid().grid):
        parser.error(f"--runs {args.runs}: the grid has {len(ConstantGrid().grid)} points, so others would train more")
    grid = json.dumps(ConstantGrid().grid[: args.runs]).replace(" ", "")
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for arm in args.arms:
            found.setdefault(arm, []).append(one(arm, seed, common, args, grid))
            now = found[arm][-1]["metrics"][args.metric]
            print(f"seed {seed}, {arm}: {args.metric} {now:.2f}", file=sys.stderr, flush=True)
    print(table(found, args.metric))
    plot(found, Path(args.root))


def one(arm: str, seed: int, common: list[str], args: argparse.Namespace, grid: str) -> dict[str, Any]:
    """Metrics of the student on test, what it cost, and how the weights went."""
    common = [w.replace("{seed}", str(seed)) for w in common] + [f"seed={seed}"]
    report = [*(w for w in common if not w.startswith((*ONLY_SELECT, "seed="))), f"seed={seed + args.offset}"]
    report += ["evaluate.every=0", "evaluate.final=last"]
    cost: dict[str, Any] = {"trainings": 1, "seconds": 0.0, "evaluations": 0}
    if arm in PLAIN:
        directory = run([*PLAIN[arm], *report])
    else:
        budget = [f"algo.grid={grid}"] if arm == "constant_grid" else [f"algo.episodes={args.runs}"]
        own = [w.replace("{steps}", str(args.steps)) for w in SELECTING[arm]]
        chosen = run(
            [*own, *(w for w in common if w.partition("=")[0] not in {o.partition("=")[0] for o in own}), *budget]
        )
        selection = json.loads((chosen / "result.json").read_text(encoding="utf-8"))
        cost = {
            "trainings": 1 + selection["student_runs"],
            "seconds": sum(selection["seconds"].values()),
            "evaluations": selection["evaluations"],
            "episodes": selection["episodes"],
            "best": selection["best_episode"],
        }
        directory = run(["+algo=selected", f"algo.selector={chosen}", *report])
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    steps = [json.loads(x) for x in (directory / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if x]
    return {
        "metrics": {name: cell["value"] for name, cell in result["evaluation"]["after"]["test"].items()},
        **cost,
        "seconds": cost["seconds"] + result["seconds"]["update"] + result["seconds"].get("teacher", 0.0),
        "weights": [[s[f"weight/{k}"] for k in KNOWLEDGE] for s in steps if "weight/finetune" in s],
    }


def run(words: list[str]) -> Path:
    """The directory of a run that is finished now."""
    quiet = subprocess.run(
        [sys.executable, "-m", "alignkit", "train", *words], capture_output=True, text=True, check=False
    )
    if quiet.returncode:
        sys.exit(f"{' '.join(words)}\n{quiet.stderr}")
    for line in reversed(quiet.stdout.split("\n")):
        if line.startswith("files: "):
            return Path(line.removeprefix("files: ").partition(" (final/")[0])
        if " is finished; nothing to do" in line:
            return Path(line.partition(" is finished")[0])
    sys.exit(f"{' '.join(words)}: no directory in\n{quiet.stdout}")


def table(found: dict[str, list[dict[str, Any]]], metric: str) -> str:
    """A line an arm: means and 95 % t intervals over seeds, differences paired by seed, equal compute columns."""
    base = [arm for arm in ("kd", "constant_grid") if arm in found]
    names = list(next(iter(found.values()))[0]["metrics"])
    head = [
        *names[:1],
        *(f"{metric} − {b}" for b in base),
        *names[1:],
        "student trainings",
        "steps",
        "held-out evaluations",
        "seconds",
    ]
    lines = [
        f"| arm, {len(next(iter(found.values())))} seeds | " + " | ".join(head) + " |",
        "|---" * (len(head) + 1) + "|",
    ]
    for arm, runs in found.items():
        cells = [interval([r["metrics"][names[0]] for r in runs])]
        for b in base:
            apart = [r["metrics"][metric] - o["metrics"][metric] for r, o in zip(runs, found[b], strict=True)]
            cells.append("" if b == arm else interval(apart) + ("" if decided(apart) else " (tie)"))
        several = names[1:] if all(set(names) <= set(r["metrics"]) for r in runs) else []
        cells += [interval([r["metrics"][n] for r in runs]) if n in several else "" for n in names[1:]]
        steps = len(runs[0]["weights"])
        cells += [str(runs[0]["trainings"]), f"{runs[0]['trainings'] * steps:,}", str(runs[0]["evaluations"])]
        cells.append(f"{statistics.mean(r['seconds'] for r in runs):.0f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {half(values):.2f}" if len(values) > 1 else "")


def half(values: list[float]) -> float:
    """Half of the 95 % t interval of the mean."""
    return T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))


def decided(values: list[float]) -> bool:
    return len(values) > 1 and abs(statistics.mean(values)) > half(values)


def plot(found: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """trajectories.svg and envelope.svg: means over seeds."""
    selecting = {arm: runs for arm, runs in found.items() if arm in SELECTING}
    panels = {}
    for arm, runs in selecting.items():
        steps = zip(*(r["weights"] for r in runs), strict=True)
        panels[arm] = [[statistics.mean(w) for w in zip(*step, strict=True)] for step in steps]
    if panels:
        plots.trajectories(panels, KNOWLEDGE, out / "trajectories.svg")
    if "constant_grid" not in found:
        return
    grid = found["constant_grid"]
    points = [_mean([r["episodes"][i]["losses"] for r in grid]) for i in range(len(grid[0]["episodes"]))]
    lines = {
        f"{arm}, last 3 episodes": _mean([one["losses"] for r in runs for one in r["episodes"][-3:]])
        for arm, runs in selecting.items()
        if arm != "constant_grid" and len(runs[0]["episodes"][0]["losses"]) == len(points[0])
    }
    plots.losses(points, lines, out / "envelope.svg")


def _mean(curves: list[list[float]]) -> list[float]:
    return [statistics.mean(x) for x in zip(*curves, strict=True)]


if __name__ == "__main__":
    main()
