"""The progress bar: stage, step, the numbers that matter, rate, ETA. One line now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

QUIET_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    def __init__(self, title: str) -> None:
        self.title = title
        self.steps = 0
        self._bar: Any = None
        self._last = 0.0
        self._sticky: dict[str, float] = {}  # what is not measured every step, such as dev BLEU

    def start(self, first: int, steps: int) -> None:
        """Show the bar for steps ``first`` … ``steps``."""
        self.steps = steps
        self._last = time.monotonic()
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=steps, completed=first, numbers="")

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Update the bar; keys that hold ``dev/`` values stay until the next ones."""
        self._sticky.update({k: v for k, v in metrics.items() if k.startswith("dev/")})
        shown = {k: v for k, v in metrics.items() if k in SHOWN} | {k: v for k, v in self._sticky.items() if k in SHOWN}
        numbers = " ".join(f"{SHOWN[k]} {_short(k, v)}" for k, v in shown.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step and (time.monotonic() - self._last > QUIET_EVERY or step == self.steps):
            self._last = time.monotonic()
            print(f"{self.title} {step}/{self.steps} {numbers}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


SHOWN = {  # metric → its short name on the bar
    "loss": "loss",
    "reward": "reward",
    "k": "k",
    "dev/bleu": "dev BLEU",
    "dev/exact_match": "dev EM",
    "dev/nll": "dev nll",
    "preference_accuracy": "ranked right",
    "dev/preference_accuracy": "dev ranked right %",
    "tokens_per_second": "tok/s",
    "share/sample": "sampling",
    "share/update": "updating",
}


def _short(name: str, value: float) -> str:
    if name.startswith("share/"):
        return f"{value:.0%}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
