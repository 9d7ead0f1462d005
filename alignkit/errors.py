"""The one exception for a user's mistake: its text is the whole message, no traceback is shown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
