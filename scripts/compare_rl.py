"""All RL methods on the bundled translation task under one budget of sampled tokens, several seeds, with two controls.

    python scripts/compare_rl.py --out comparison                    # hours on one core; repeat to go on
    python scripts/compare_rl.py --out comparison --table            # the table of what is there

Every run starts from the bundled model, samples until the budget is spent (greedy probes and dropped responses included)
and is tested with its last weights. ``fixed_k`` is REINFORCE with as many samples an input as ESRL draws on average;
``constant`` is ESRL with a reward that says nothing, without a baseline. Runs go through the command line, finished ones
are skipped. The table gives means over seeds of the change against the start model, with 95 % t-intervals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMMON = [
    "model=tiny_translation", "data=tatoeba_en_de", "reward=bleu_chrf", "algo.steps=100000", "algo.lr=3.0e-5",
    "algo.warmup=10", "algo.schedule=constant", "algo.micro_tokens=2048", "algo.max_new_tokens=48", "evaluate.every=0", "evaluate.final=last",
    "evaluate.max_new_tokens=48", "run.threads=1", "run.wandb=disabled", "run.save_every=1000", "run.keep=1",
]  # fmt: skip
# about 256 samples a step and one learning rate for each, not tuned one by one
FEW, MANY = "algo.prompts_per_step=32", "algo.prompts_per_step=128"
ARMS = {
    "reinforce": ["+algo=reinforce", FEW, "algo.k=8"],
    "esrl": ["+algo=esrl", "algo.prompts_per_step=48"],
    "fixed_k": ["+algo=reinforce", "algo.prompts_per_step=48", "algo.k={k}"],
    "constant": ["+algo=esrl", "algo.prompts_per_step=48", "reward=constant", "algo.baseline=none"],
    "esrl_released": ["+algo=esrl_released", "algo.prompts_per_step=256"],
    "mrt": ["+algo=mrt", FEW, "algo.k=8"],
    "mrt_two_stage": ["+algo=mrt_two_stage", "algo.prompts_per_step=48", "algo.k=5"],
    "ppo": ["+algo=ppo", MANY, "algo.k=2"],
    "ma_ppo": ["+algo=ma_ppo", MANY, "algo.k=2"],
    "rloo": ["+algo=rloo", "algo.prompts_per_step=64", "algo.k=4"],
    "grpo": ["+algo=grpo", FEW, "algo.k=8"],
    "dr_grpo": ["+algo=dr_grpo", FEW, "algo.k=8"],
    "dapo": ["+algo=dapo", FEW, "algo.k=8"],
    "remax": ["+algo=remax", "algo.prompts_per_step=64", "algo.k=4"],
    "rebel": ["+algo=rebel", MANY],
    "online_dpo": ["+algo=online_dpo", MANY],
}
METRICS = ("bleu", "chrf", "length_ratio", "reward")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}  # of n - 1 degrees of freedom, by n


def finished(out: Path, arm: str, seed: int) -> dict | None:
    path = out / f"{arm}-s{seed}" / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def run(args: argparse.Namespace, arm: str, seed: int, k: int) -> None:
    """One run, unless it is there; what it says goes into a file beside it."""
    if finished(args.out, arm, seed):
        return
    words = [word.format(k=k) if "{k}" in word else word for word in ARMS[arm]]
    words += [word for word in COMMON if not any(w.split("=")[0] == word.split("=")[0] for w in words)]
    words += [f"seed={seed}", f"algo.token_budget={args.tokens}", f"evaluate.rows={args.rows}"]
    words += [f"run.dir={args.out / f'{arm}-s{seed}'}"]
    with open(args.out / f"{arm}-s{seed}.log", "w") as log:
        code = subprocess.run([sys.executable, "-m", "alignkit", "train", *words], stdout=log, stderr=log).returncode
    print(f"{arm} seed {seed}: {'done' if code == 0 else f'failed ({code}), see {log.name}'}", flush=True)


def mean_k(out: Path, seeds: list[int]) -> int | None:
    """Samples an input that ESRL drew on average in its finished runs."""
    drawn = []
    for seed in seeds:
        path = out / f"esrl-s{seed}" / "metrics.jsonl"
        if finished(out, "esrl", seed):
            drawn += [json.loads(line)["k"] for line in path.read_text(encoding="utf-8").splitlines()]
    return round(statistics.mean(drawn)) if drawn else None


def table(out: Path, seeds: list[int]) -> str:
    """Markdown, one line an arm."""
    head = ["arm", "seeds", "samples", "tokens", "seconds", *(f"{m} change" for m in METRICS)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in ARMS:
        found = [one for seed in seeds if (one := finished(out, arm, seed))]
        if not found:
            continue
        n = len(found)
        middle = [
            statistics.mean(f[key] if key == "samples" else f["tokens"]["sampled"] for f in found)
            for key in ("samples", "tokens")
        ]
        seconds = statistics.median(sum(v for p, v in f["seconds"].items() if p != "evaluate") for f in found)
        cells = []
        for metric in METRICS:
            test = [(f["evaluation"]["before"]["test"], f["evaluation"]["after"]["test"]) for f in found]
            change = [after[metric]["value"] - before[metric]["value"] for before, after in test]
            digits = 3 if metric in ("length_ratio", "reward") else 2
            width = T95[n] * statistics.stdev(change) / n**0.5 if n in T95 else None
            cells.append(f"{statistics.mean(change):+.{digits}f}" + ("" if width is None else f" ± {width:.{digits}f}"))
        lines.append(f"| {arm} | {n} | {middle[0]:,.0f} | {middle[1]:,.0f} | {seconds:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder of the runs")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--tokens", type=int, default=100_000, help="sampled tokens of a run")
    parser.add_argument("--rows", type=int, default=1000, help="test rows")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    if not args.table:
        args.out.mkdir(parents=True, exist_ok=True)
        wanted = args.arms.split(",")
        for seed in seeds:  # a seed of every arm before the next seed
            if "fixed_k" in wanted and mean_k(args.out, seeds) is None:
                run(args, "esrl", seeds[0], 0)
            k = mean_k(args.out, seeds) or 4
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda arm: run(args, arm, seed, k), wanted))  # noqa: B023
    print(table(args.out, seeds))


if __name__ == "__main__":
    main()
