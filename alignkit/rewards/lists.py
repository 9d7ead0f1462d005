"""An instruction on a list of digits, and its exact checker: what a critique of an answer can be held against.

A prompt is ``sort up: 5 3 9 1 4``, its answer ``1 3 4 5 9``. An answer is judged slot by slot, as the simulated critic of
SRT (arXiv 2406.07168) needs it: which item is wrong, and what should stand there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

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
    """The right answer to ``OPERATION: d d d …``; an operation is one of ``OPERATIONS``, or ``repairs`` such as
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


def violated(prompt: str, response: str) -> list[tuple[int, int | None, int | None]] | None:
    """(slot, counted from 1; the item there; the item that belongs there) of every slot that is wrong, None for no item.

    None where the response is not a list of digits.
    """
    right, given = parse(solve(prompt)), parse(response)
    assert right is not None
    if given is None:
        return None
    slots = range(max(len(right), len(given)))
    pairs = [(given[i] if i < len(given) else None, right[i] if i < len(right) else None) for i in slots]
    return [(i + 1, is_, should) for i, (is_, should) in enumerate(pairs) if is_ != should]


def score(prompt: str, response: str) -> int:
    """10 less one for each slot with a wrong, missing or surplus item, not below 1; 1 for what is no list of digits."""
    wrong = violated(prompt, response)
    return 1 if wrong is None else max(1, 10 - len(wrong))


def faults(prompt: str, response: str) -> list[str]:
    """What is wrong, a phrase for each slot: ``item 3 is 4, not 5``."""
    wrong = violated(prompt, response)
    if wrong is None:
        return ["this is no list of digits"]
    return [
        f"item {i} is missing" if is_ is None else f"item {i} is too much" if should is None else f"item {i} is {is_}, not {should}"
        for i, is_, should in wrong
    ]  # fmt: skip


def repairs(prompt: str, response: str) -> list[str]:
    """What would mend it, a phrase for each of ``faults``: ``write 5 as item 3``."""
    wrong = violated(prompt, response)
    if wrong is None:
        return ["write digits with spaces between them"]
    return [f"drop item {i}" if should is None else f"write {should} as item {i}" for i, _, should in wrong]


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


@dataclass(kw_only=True)
class Lists:
    """How right the answer to an instruction on a list of digits is: 1 where all items are, 1/9 less a wrong slot, 0 at least.

    It reads the row's ``prompt`` alone, such as ``sort up: 5 3 9``; of an answer that is no list of digits the score is 0.
    """

    def __call__(self, batch: Batch) -> Tensor:
        pairs = zip(batch.rows, batch.responses, strict=True)
        scores = [(score(prompt_of(row), y) - 1) / 9 for row, y in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=batch.response_ids.device)
