"""PCRM against Bradley–Terry as rewards of PPO, where the true reward is known: another reward model, trained on human pairs.

    python scripts/pcrm_ppo.py --seeds 0 1 2 3 4 --root runs/pcrm_ppo

Once: a policy that answers plainly or rudely (as in ``+preset=rlhf_tiny``) and the true reward, Bradley–Terry on the politeness
pairs. For each seed: pairs of the policy's samples, labelled by the true reward with Bradley–Terry noise; a reward model for each
arm, from the same pairs; PPO against each of them under three controls (scores as they are and cut at ±5; as they are, not cut;
standardised), all with the same KL weight; every run's trace of true reward and KL on dev, from which the true reward at a matched
KL is read. Runs that are finished are not repeated. The last lines are Markdown tables with 95 % t-intervals over seeds.
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

from compare_rm import interval
from kl_frontier import at_kl, points_of

RMS = {
    "bt": ["+algo=bt"],
    "length ratio": ["+algo=pcrm"],
    "fixed 4.5": ["+algo=pcrm", "algo.constraint.kind=fixed"],
}
CONTROLS = {
    "raw, cut at 5": ["reward.standardise=false", "algo.reward_clip=5"],
    "raw, not cut": ["reward.standardise=false"],
    "standardised": [],
}
MATCHED = 4.0  # nats a response at which arms are compared


def make_pairs(out: Path, sft: Path, gold: Path, seed: int, noise: float) -> None:
    """Four samples to each training prompt, in two pairs; the better one by the true reward is chosen with probability
    sigmoid(gap / noise)."""
    if (out / "test.jsonl").exists():
        return
    import torch

    from alignkit.config import Model
    from alignkit.data import Data
    from alignkit.decode import Decode
    from alignkit.policy import load
    from alignkit.rewards import scores_of
    from alignkit.rewards.learned import Learned

    policy = load(Model(path=str(sft)), 0)
    reward = Learned(model=str(gold))
    data = Data(train="bundled:polite_preference.train.jsonl", prompt="{instruction} {input}")
    generator = torch.Generator().manual_seed(seed)
    rows = data.rows("train")
    found = []
    for first in range(0, len(rows), 64):
        batch = policy.generate(rows[first : first + 64], 4, Decode(max_new_tokens=32), generator=generator)
        scores = scores_of(reward, batch)
        for i in range(0, len(batch), 2):
            one, other = batch.responses[i : i + 2]
            if one == other or not one or not other:
                continue
            gap = float(scores[i] - scores[i + 1])
            first_wins = float(torch.rand(1, generator=generator)) < 1 / (1 + math.exp(-gap / noise))
            chosen, rejected = (one, other) if first_wins else (other, one)
            found.append({"prompt": batch.rows[i]["prompt"], "chosen": chosen, "rejected": rejected, "gold": abs(gap),
                          "flipped": first_wins != (gap > 0)})  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    held = len(found) // 8
    for split, part in (
        ("train", found[2 * held :]),
        ("dev", found[:held]),
        ("test", found[held : 2 * held]),
    ):  # test last
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in part)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    print(
        f"seed {seed}: {len(found)} pairs, {statistics.mean(p['flipped'] for p in found):.1%} against the true reward"
    )


def train(words: list[str], directory: Path) -> dict[str, Any]:
    """Run to the end, in its own directory, or take what is there."""
    words = [*words, f"run.dir={directory}", "run.wandb=disabled", "run.threads=1", "run.keep=1"]
    done = subprocess.run(
        [sys.executable, "-m", "alignkit", "train", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr}")
    result: dict[str, Any] = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--noise", type=float, default=0.5, help="scale of the label noise, in deviations of the true reward"
    )
    parser.add_argument("--rm-epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--root", type=Path, default=Path("runs/pcrm_ppo"))
    args = parser.parse_args()
    sft, gold = args.root / "sft", args.root / "gold"
    train(
        ["+algo=sft", "model=tiny_causal", "data=polite", 'data.response="{rejected}"', "algo.epochs=16", "algo.lr=2e-3",
         "algo.warmup=20", "evaluate.every=0", "evaluate.final=last", "seed=100"], sft,
    )  # fmt: skip
    train(["+algo=bt", "evaluate.final=last", "seed=100"], gold)
    rms: dict[str, list[dict[str, float]]] = {name: [] for name in RMS}
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in args.seeds:
        pairs = args.root / f"pairs-{seed}"
        make_pairs(pairs, sft, gold, seed, args.noise)
        data = ["data=pairs", *(f"data.{split}={pairs / split}.jsonl" for split in ("train", "dev", "test"))]
        for arm, words in RMS.items():
            folder = args.root / f"rm-{arm.replace(' ', '_')}-{seed}"
            result = train(
                [
                    *words,
                    *data,
                    f"algo.epochs={args.rm_epochs}",
                    "evaluate.every=0",
                    "evaluate.final=last",
                    f"seed={seed}",
                ],
                folder,
            )
            table = result["evaluation"]["after"]["test"]
            rms[arm].append(
                {
                    k: table[k]["value"]
                    for k in ("preference_accuracy", "nll", "ece", "margin", "margin_max", "score_sd")
                }
            )
            for control, more in CONTROLS.items():
                run = args.root / f"ppo-{arm}-{control}-{seed}".replace(" ", "_").replace(",", "")
                result = train(
                    ["+algo=ppo", f"model.path={sft}", "data=polite", "reward=learned", f"reward.model={folder}", *more,
                     f"algo.steps={args.steps}", "algo.k=2", "algo.prompts_per_step=32", "algo.max_new_tokens=32",
                     "algo.epochs=2", "algo.lr=2e-4", "evaluate.every=5", "evaluate.max_new_tokens=32",
                     "evaluate.select=reward", "evaluate.final=last", "evaluate.test=false", "run.save_every=1000000",
                     f"seed={seed}", "+reward@audit.reward=learned", f"audit.reward.model={gold}"], run,
                )  # fmt: skip
                points = points_of(run, "dev/second")
                rows.setdefault((arm, control), []).append(
                    {
                        "KL": points[-1][0],
                        "gold": points[-1][1] - points[0][1],
                        "gold at KL": at_kl(points, MATCHED) - points[0][1],
                    }
                )
                print(f"seed {seed}, {arm}, {control}: {rows[arm, control][-1]}", file=sys.stderr, flush=True)
    print("\n| reward model | " + " | ".join(rms["bt"][0]) + " |\n" + "|---" * (len(rms["bt"][0]) + 1) + "|")
    for arm, found in rms.items():
        print(f"| {arm} | " + " | ".join(interval([one[k] for one in found]) for k in found[0]) + " |")
    keys = ("KL", "gold", "gold at KL")
    print(f"\n| reward model | scores | KL | gain in true reward | gain at KL {MATCHED:g} |\n" + "|---" * 5 + "|")
    for (arm, control), found in rows.items():
        print(f"| {arm} | {control} | " + " | ".join(interval([one[k] for one in found]) for k in keys) + " |")


if __name__ == "__main__":
    main()
