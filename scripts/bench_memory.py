"""The memory behind ESRL's claim: sampling with the graph kept against sampling in two stages, over response lengths.

    python scripts/bench_memory.py                             # table on the screen
    python scripts/bench_memory.py --lengths 16,64 --csv m.csv # a quick look
    python scripts/bench_memory.py --readme                    # also rewrites the block in README.md

Three ways to the gradient of the same policy loss on the same responses (random weights, no end before T tokens):

single stage   token by token with a KV cache and gradients on; the loss uses the log-probs of those very logits
two stages     ``policy.generate`` without a graph, then one teacher-forced ``policy.forward`` over all rows
micro-batches  the same, in micro-batches of ``--micro-tokens`` tokens, as ``Run.update`` does it

Saved: bytes that autograd keeps for the backward pass at the worst moment, each storage counted once, parameters left
out. Peak: resident memory over the idle process, which is why each cell is a process of its own. The gradients of all
ways are compared with those of the two stages: the norm of the difference over the norm.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bench import Worker, idle_mb, markdown, pipe, report, report_options, reset_peak, status_mb

from alignkit.algos.sampling_memory import KINDS, backward, bench_policy, sampled, single_stage
from alignkit.batch import Batch

WAYS = ("two stages", "micro-batches", "single stage")
PROMPTS, SAMPLES = 8, 2


def cell(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """One model, length and way: bytes saved, peak over idle, seconds, gradient against that of the two stages."""
    policy, rows = bench_policy(args.kind, PROMPTS, 0)
    backward(policy, sampled(policy, rows, SAMPLES, 2, 0), policy.forward)  # the libraries' own memory is not counted
    policy.model.zero_grad(set_to_none=True)
    uniform = torch.rand(PROMPTS * SAMPLES, args.length, generator=torch.Generator().manual_seed(2))
    saved, gradient = 0, torch.zeros(())
    given = None
    if args.worker == "single-stage":
        given = Batch(**torch.load(args.folder / "batch.pt", weights_only=True))
    idle = idle_mb()
    reset_peak()
    start = time.perf_counter()
    if given is not None:
        saved, gradient = backward(policy, given, lambda batch: single_stage(policy, batch, uniform))
    else:
        given = sampled(policy, rows, SAMPLES, args.length, 0)
        for part in given.split(args.micro_tokens) if args.worker == "micro-batches" else [given]:
            kept, gradient = backward(policy, part, policy.forward)
            saved = max(saved, kept)
    seconds, peak = time.perf_counter() - start, status_mb("VmHWM") - idle
    if args.worker == "two-stages":  # comes first and leaves what the others compare with
        torch.save(vars(given), args.folder / "batch.pt")
        torch.save(gradient, args.folder / "gradient.pt")
    reference = torch.load(args.folder / "gradient.pt", weights_only=True)
    difference = float((gradient - reference).norm() / reference.norm())
    say(saved_mb=saved / 2**20, peak_mb=peak, seconds=seconds, gradient_difference=difference)


def measure(args: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """One record a length and way; a single stage is left out where it would need too much."""
    records, last, before = [], 0.0, 1
    for length in map(int, args.lengths.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            for way in WAYS:
                # the cache is copied with each token, so what is kept grows up to the square of the length
                needed = last * (length / before) ** 2
                if way == "single stage" and needed > args.limit_gb * 1024:
                    print(
                        f"{kind}, {length} tokens: a single stage might need {needed / 1024:.0f} GB, left out",
                        file=sys.stderr,
                    )
                    last, before = needed, length
                    continue
                words = ["--kind", kind, "--length", str(length), "--folder", folder]
                words += ["--micro-tokens", str(args.micro_tokens)]
                worker = Worker(way.replace(" ", "-"), words, args.threads, Path(folder) / "log")
                one = worker.hear()
                worker.close()
                print(f"{kind}, {length} tokens, {way}: {one['seconds']:.2f} s", file=sys.stderr, flush=True)
                records.append({"model": kind, "length": length, "way": way} | one)
                if way == "single stage":
                    last, before = one["peak_mb"], length
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16,32,64,128,256,512", help="response lengths T, ascending")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="default 2048")
    parser.add_argument("--limit-gb", type=float, default=6.0, help="leave out what would need more; default 6")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    report_options(parser)
    for name, kind in (("worker", str), ("kind", str), ("length", int), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # what a worker is told
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(args.threads)
        return cell(args, pipe()[0])
    records: list[dict[str, Any]] = []
    for kind in args.kinds.split(","):
        records += measure(args, kind)
    lines = []
    for kind, length in dict.fromkeys((r["model"], r["length"]) for r in records):
        found = {r["way"]: r for r in records if (r["model"], r["length"]) == (kind, length)}
        row = [kind, str(length)]
        for key, digits, missing in (
            ("saved_mb", 0, f"> {args.limit_gb:g} GB"),
            ("peak_mb", 0, "–"),
            ("seconds", 2, "–"),
        ):
            row += [f"{found[way][key]:,.{digits}f}" if way in found else missing for way in (WAYS[2], *WAYS[:2])]
        lines.append([*row, f"{max(one['gradient_difference'] for one in found.values()):.0e}"])
    three = [f"{what}: {way}" for what in ("saved MB", "peak MB", "s") for way in ("single", "two", "micro")]
    text = (
        f"{PROMPTS} prompts × {SAMPLES} samples, {args.threads} thread(s); micro: micro-batches of {args.micro_tokens} tokens.\n\n"
        + markdown(" | ".join(["model", "T", *three, "gradients differ by"]), lines)
    )
    report("bench_memory", text, records, args)


if __name__ == "__main__":
    main()
