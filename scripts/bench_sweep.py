"""Twelve toy runs as one sweep in one warm process, and as twelve commands: seconds on the clock and of the processor.

    python scripts/bench_sweep.py --repeats 3

Each repetition does both, in turn first, in new folders; medians over repetitions, and their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOY = [
    "model=tiny_seq2seq", "model.vocab_size=300", "model.config.d_model=16", "model.config.encoder_layers=1",
    "model.config.decoder_layers=1", "model.config.encoder_ffn_dim=32", "model.config.decoder_ffn_dim=32",
    "model.config.encoder_attention_heads=2", "model.config.decoder_attention_heads=2", "data.limit=40", "evaluate.rows=12",
    "evaluate.max_new_tokens=8", "evaluate.bootstrap=50", "algo.k=2", "algo.prompts_per_step=4", "algo.max_new_tokens=8",
    "algo.steps=6", "algo.warmup=0", "run.threads=1", "run.wandb=disabled",
]  # fmt: skip
AXES = {"+algo": ["reinforce", "rloo"], "seed": ["1", "2", "3"], "algo.lr": ["1e-4", "3e-4"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[tuple[float, float]]] = {"sweep": [], "apart": []}
    for i in range(repeats):
        for way in ("sweep", "apart") if i % 2 == 0 else ("apart", "sweep"):
            with tempfile.TemporaryDirectory() as root:
                seconds[way].append(measure(way, Path(root)))
                print(f"{way}: {seconds[way][-1][0]:.1f} s, processor {seconds[way][-1][1]:.1f} s", flush=True)
    for k, what in enumerate(("clock", "processor")):
        warm, cold = (statistics.median(pair[k] for pair in seconds[way]) for way in ("sweep", "apart"))
        ratios = [a[k] / b[k] for a, b in zip(seconds["sweep"], seconds["apart"], strict=True)]
        print(
            f"{what}: 12 runs in one sweep {warm:.1f} s, in 12 processes {cold:.1f} s; ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {repeats} repetitions)"
        )


def measure(way: str, root: Path) -> tuple[float, float]:
    """(seconds on the clock, of the processor) of all twelve runs; each must have left its result."""
    if way == "sweep":
        commands = [["-m", *(f"{key}={','.join(values)}" for key, values in AXES.items())]]
    else:
        commands = [[f"{k}={v}" for k, v in zip(AXES, row, strict=True)] for row in itertools.product(*AXES.values())]
    clock, processor = time.perf_counter(), children()
    for words in commands:
        subprocess.run(
            [sys.executable, "-m", "alignkit", "train", *words, *TOY, f"run.root={root}"], check=True, capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    found = time.perf_counter() - clock, children() - processor
    assert len(list(root.glob("*/result.json"))) == 12
    return found


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
