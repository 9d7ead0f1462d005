"""An instruction on a list of digits, and its exact checker: what a critique of an answer can be held against.

A prompt is ``sort up: 5 3 9 1 4``, its answer ``1 3 4 5 9``. An answer is judged digit by digit: which are missing, and which
are too much. A small model cannot find "item 3" of its own list, but it can see that there is no 5.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import UserError, suggest

NONE = "none"  # the answer where no item is left
OPERATIONS: dict[str, Callable[[list[int]], list[int]]] = {
    "sort up": sorted,
    "sort down": lambda items: sorted(items, reverse=True),
    "reverse": lambda items: items[::-1],
    "no repeats": lambda items: list(dict.fromkeys(items)),
    "keep even": lambda items: [item for item in items if item % 2 == 0],
}


_EDIT = re.compile(r"(?:write (\d) as|drop) item (\d+)", re.ASCII)


def solve(prompt: str) -> str:
    """The right answer to ``OPERATION: d d d …``; an operation is one of ``OPERATIONS``, or ``edits`` such as
    ``write 5 as item 3; drop item 6`` (items are counted as they stand in the prompt).

    Raises:
        UserError: the prompt is not of that form.
    """
    operation, colon, rest = prompt.partition(":")
    items = parse(rest)
    if not colon or items is None:
        raise UserError(
            f"the prompt {prompt!r} is not of the form 'sort up: 5 3 9': an operation and a list of digits."
        )
    edits = [_EDIT.fullmatch(part.strip()) for part in operation.split(";")]
    if all(edits):
        return written(_edited(items, {int(e[2]): e[1] for e in edits if e}))
    if operation.strip() not in OPERATIONS:
        raise UserError(f"the prompt {prompt!r}: no operation {operation!r}.{suggest(operation, OPERATIONS)}")
    return written(OPERATIONS[operation.strip()](items))


def _edited(items: list[int], edits: dict[int, str | None]) -> list[int]:
    """The digits with others in some slots, counted from 1, or none; a slot behind the last item adds one."""
    slots: dict[int, int | str | None] = {**dict(enumerate(items, 1)), **edits}
    return [int(item) for _, item in sorted(slots.items()) if item is not None]


def parse(text: str) -> list[int] | None:
    """The digits of ``5 3 9``; None where the text is anything else."""
    if text.strip() == NONE:
        return []
    items = text.split()
    return [int(item) for item in items] if items and all(len(i) == 1 and i in "0123456789" for i in items) else None


def written(items: list[int]) -> str:
    return " ".join(map(str, items)) or NONE


def edits(prompt: str, response: str) -> list[str]:
    """What would mend a list of digits slot by slot: ``write 5 as item 3``, ``drop item 6``."""
    return [
        f"drop item {i}" if should is None else f"write {should} as item {i}" for i, should in _slots(prompt, response)
    ]


def _slots(prompt: str, response: str) -> list[tuple[int, int | None]]:
    """(slot, counted from 1; the digit that belongs there, None for none) of every slot that is wrong."""
    right, given = parse(solve(prompt)), parse(response)
    assert right is not None and given is not None
    pairs = enumerate(zip_longest(right, given), 1)
    return [(i, should) for i, (should, is_) in pairs if is_ != should]


def differences(prompt: str, response: str) -> list[tuple[int, int]] | None:
    """(digit, how many of it are missing; below 0: too many), of every digit that does not occur as often as it should.

    None where the response is not a list of digits.
    """
    right, given = parse(solve(prompt)), parse(response)
    assert right is not None
    if given is None:
        return None
    wanted, there = Counter(right), Counter(given)
    return [(digit, wanted[digit] - there[digit]) for digit in range(10) if wanted[digit] != there[digit]]


def score(prompt: str, response: str) -> int:
    """10 less one for each item that is missing or too much, or, of the right items, for each that stands at a wrong place; not
    below 1, which is also for what is no list of digits."""
    wrong = differences(prompt, response)
    if wrong is None:
        return 1
    return max(1, 10 - (sum(abs(n) for _, n in wrong) or len(_slots(prompt, response))))


def late(prompt: str, response: str) -> int | None:
    """The digit that should stand at the first slot that is wrong; None where none is."""
    slots = _slots(prompt, response)
    return slots[0][1] if slots else None


def faults(prompt: str, response: str) -> list[str]:
    """What is wrong, a phrase for each digit: ``6 is missing``, ``7 is too much 2 times``; of the right digits in a wrong order
    ``5 is too late``."""
    wrong = differences(prompt, response)
    if wrong is None:
        return ["this is no list of digits"]
    found = [f"{digit} is {'missing' if n > 0 else 'too much'}{_times(n)}" for digit, n in wrong]
    return found or ([f"{late(prompt, response)} is too late"] if late(prompt, response) is not None else [])


def repairs(prompt: str, response: str) -> list[str]:
    """What would mend it, a phrase for each of ``faults``: ``add 6``, ``drop 7 2 times``, ``write 5 earlier``."""
    wrong = differences(prompt, response)
    if wrong is None:
        return ["write digits with spaces between them"]
    found = [f"{'add' if n > 0 else 'drop'} {digit}{_times(n)}" for digit, n in wrong]
    return found or ([f"write {late(prompt, response)} earlier"] if late(prompt, response) is not None else [])


def _times(n: int) -> str:
    return f" {abs(n)} times" if abs(n) > 1 else ""


def prompt_of(row: Row) -> str:
    """A row's prompt; of a chat, the text of its last turn."""
    prompt = row["prompt"]
    return str(prompt[-1]["content"]) if isinstance(prompt, list) else str(prompt)


def corrupted(text: str, rng: random.Random) -> str:
    """A list with one fault in it: an item changed, left out, said twice, or exchanged with another."""
    items = parse(text) or []
    kinds = ["twice", "left out", "changed"] if len(items) > 1 else ["twice", "changed"] if items else ["added"]
    if len(set(items)) > 1:
        kinds.append("exchanged")
    kind, i = rng.choice(kinds), rng.randrange(len(items) or 1)
    if kind == "added":
        return str(rng.randrange(10))
    if kind == "twice":
        items.insert(i, items[i])
    elif kind == "left out":
        del items[i]
    elif kind == "changed":
        items[i] = rng.choice([d for d in range(10) if d != items[i]])
    else:
        j = rng.choice([j for j, item in enumerate(items) if item != items[i]])
        items[i], items[j] = items[j], items[i]
    return written(items)


def distance(prompt: str, response: str) -> int | None:
    """How many items have to be put in, left out or replaced until the answer is right (Levenshtein); None for what is no list
    of digits."""
    right, given = parse(solve(prompt)), parse(response)
    assert right is not None
    return None if given is None else edit_distance(given, right)


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Least number of insertions, deletions and replacements between two sequences."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


@dataclass(kw_only=True)
class Lists:
    """How near the answer to an instruction on a list of digits is to the right one: 1 less the items that have to be put in, left
    out or replaced over those of the right list, at least 0.

    It reads the row's ``prompt`` alone, such as ``sort up: 5 3 9``. This is not the score of `critic=oracle`, which goes by what
    its critique names, so that a model is not judged by the score that it has learned.
    """

    def __call__(self, batch: Batch) -> Tensor:
        scores = [_nearness(prompt_of(row), y) for row, y in zip(batch.rows, batch.responses, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=batch.response_ids.device)


def _nearness(prompt: str, response: str) -> float:
    wrong = distance(prompt, response)
    return 0.0 if wrong is None else max(0.0, 1 - wrong / max(1, len(parse(solve(prompt)) or [])))
