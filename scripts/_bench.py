"""What the benchmarks share: memory of a process, workers that are driven line by line, tables in README.md."""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def status_mb(key: str) -> float:
    """``VmRSS``, or its highest value since ``reset_peak``: ``VmHWM``."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def idle_mb() -> float:
    """Resident memory once what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status_mb("VmRSS")


class Worker:
    """The script itself, started with ``words``: a process that answers each line with one line of JSON."""

    def __init__(self, name: str, words: list[str], threads: int, log: Path) -> None:
        self.name, self.log = name, log
        # nothing may look for a GPU, a hub or a tracker
        quiet = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        quiet |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
        quiet["TMPDIR"] = str(log.parent)  # some libraries leave temporary folders behind
        command = [sys.executable, sys.argv[0], "--worker", name, "--threads", str(threads), *words]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **quiet},
            )  # fmt: skip

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; the last of {self.log}:\n{self.log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        """A worker that waits for a word ends when none can come."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def pipe() -> tuple[Callable[..., None], Callable[[], str]]:
    """The worker's side: ``say(key=value)`` and ``wait()`` for a word. What libraries print goes to the log."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=out, flush=True)

    def wait() -> str:
        word = sys.stdin.readline().strip()
        if not word:
            raise SystemExit
        return word

    return say, wait


def markdown(header: str, lines: list[list[str]]) -> str:
    """A table; the header is written as it stands, ``a | b``."""
    rule = "|".join(["---"] * (header.count(" | ") + 1))
    return "\n".join([f"| {header} |", f"|{rule}|", *("| " + " | ".join(cells) + " |" for cells in lines)])


def report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, help="write every measurement, one a line")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")


def report(block: str, text: str, records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the tables, and write what was asked for; in README.md they stand between two comments."""
    print(text)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, max(records, key=len).keys(), restval="")
            writer.writeheader()
            writer.writerows(records)
    if args.readme:
        path = Path(__file__).parent.parent / "README.md"
        old = path.read_text(encoding="utf-8")
        pattern = rf"(<!-- {block} -->\n).*?(<!-- /{block} -->)"
        new, found = re.subn(pattern, lambda m: m[1] + text + "\n" + m[2], old, flags=re.S)
        if not found:
            raise SystemExit(f"README.md has no block <!-- {block} -->")
        path.write_text(new, encoding="utf-8")
