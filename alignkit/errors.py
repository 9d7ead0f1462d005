"""The one exception for a user's mistake: its text is the whole message, no traceback is shown."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Bad input: says which file, row, key or flag is wrong and what to do about it."""


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); its state is on disk and the command resumes it."""


def suggest(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for a near miss, else the list of what there is."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" There is: {', '.join(known)}." if known else ""


BOUNDS = {
    ">=": (operator.ge, "at least"), ">": (operator.gt, "above"), "<=": (operator.le, "at most"), "<": (operator.lt, "below"),
}  # fmt: skip


def need(settings: Any, *conditions: str, where: str = "") -> None:
    """Check ranges of an object's settings, written as ``"k >= 2"``; of a schedule, both of its ends. None is let through.

    Raises:
        ValueError: one does not hold, or is not a finite number; says which, its bound and its value.
    """
    for condition in conditions:
        name, sign, bound = condition.split()
        holds, words = BOUNDS[sign]
        value = getattr(settings, "_schedules", {}).get(name, getattr(settings, name))
        for one in (value["start"], value["end"]) if isinstance(value, dict) else (value,):
            if one is not None and not (math.isfinite(one) and holds(one, float(bound))):
                raise ValueError(f"{where}{name} must be {words} {bound}, is {one}")


def need_adamw(settings: Any) -> None:
    """``need`` of what every method has for its optimizer."""
    need(settings, "lr >= 0", "warmup >= 0", "floor >= 0", "floor <= 1", "weight_decay >= 0", "max_grad_norm >= 0")
    if len(settings.betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in settings.betas):
        raise ValueError(f"betas must be two numbers in [0, 1), is {list(settings.betas)}")
