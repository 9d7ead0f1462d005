"""The one data type: rows of (prompt, response) and what has been learned about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Loss:
    """A sum, what to divide it by, and means to log. A loss never divides; ``Run.update`` does, once."""

    total: Tensor  # scalar, summed over the rows of this micro-batch
    count: float  # what the total is divided by, once summed over all micro-batches
    metrics: dict[str, float] = field(default_factory=dict)  # means over this micro-batch


@dataclass
class Batch:
    """B rows, P prompt tokens, T response tokens.

    Prompts are padded on the side that the architecture wants (left for causal models, right for
    encoders), responses on the right. Rows with one ``group`` id answer the same prompt and are adjacent;
    groups may differ in size.
    """

    prompt_ids: Tensor  # (B, P) int64
    prompt_mask: Tensor  # (B, P) bool
    response_ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool: tokens that count, end-of-sequence included
    group: Tensor  # (B,) int64
    rows: list[dict[str, Any]]  # B data rows; the rows of one group are the same object
    responses: list[str]  # B texts
    logprobs: Tensor | None = None  # (B, T) of the sampled tokens, at temperature 1
    ref_logprobs: Tensor | None = None  # (B, T)
    rewards: Tensor | None = None  # (B, T) per-token rewards
    advantages: Tensor | None = None  # (B, T)
    scores: Tensor | None = None  # (B,) one reward a response
    extra: dict[str, Tensor] = field(default_factory=dict)  # (B, ...) what one method alone needs
    probe_tokens: int = 0  # tokens decoded only to decide how to sample, counted as sampled

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @property
    def prompts(self) -> list[Any]:
        return [row["prompt"] for row in self.rows]

    @property
    def lengths(self) -> Tensor:
        """(B,) response tokens that count."""
        return self.mask.sum(1)

    def with_(self, **changes: Any) -> Batch:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def take(self, index: Tensor) -> Batch:
        """The rows of ``index`` (int64), their padding trimmed to the longest row kept."""
        picked: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                picked[f.name] = value[index]
            elif isinstance(value, list):
                picked[f.name] = [value[i] for i in index.tolist()]
            elif isinstance(value, dict):
                picked[f.name] = {k: v[index] for k, v in value.items()}
            else:
                picked[f.name] = value
        return Batch(**picked)._trim()

    def _trim(self) -> Batch:
        """Cut columns that are padding in every row; the prompt keeps its padding side."""
        if not len(self):
            return self
        columns = torch.nonzero(self.prompt_mask.any(0)).flatten()
        first, last = int(columns[0]), int(columns[-1]) + 1
        width = int(self.mask.any(0).nonzero().max()) + 1 if self.mask.any() else 1
        cut: dict[str, Any] = {
            "prompt_ids": self.prompt_ids[:, first:last],
            "prompt_mask": self.prompt_mask[:, first:last],
        }
        for name in ("response_ids", "mask", "logprobs", "ref_logprobs", "rewards", "advantages"):
            value = getattr(self, name)
            cut[name] = None if value is None else value[:, :width]
        return replace(self, **cut)

    def _group_starts(self) -> tuple[Tensor, Tensor]:
        """(G,) first row and (G,) size of each group."""
        _, sizes = torch.unique_consecutive(self.group, return_counts=True)
        return sizes.cumsum(0) - sizes, sizes

    def group_starts(self) -> Tensor:
        """(G,) index of the first row of each group."""
        return self._group_starts()[0]

    def group_sizes(self) -> Tensor:
        """(B,) how many rows answer the prompt of each row."""
        _, sizes = self._group_starts()
        return sizes.repeat_interleave(sizes)

    def minibatches(self, count: int) -> Iterator[Batch]:
        """``count`` parts of whole groups, as even as can be, in order. A count, so that ranks agree."""
        starts, sizes = self._group_starts()
        if count == 1:
            yield self
            return
        for part in torch.tensor_split(torch.arange(len(starts)), count):
            if len(part):
                first, last = int(starts[part[0]]), int(starts[part[-1]] + sizes[part[-1]])
                yield self.take(torch.arange(first, last))

    def split(self, budget: int) -> list[Batch]:
        """Micro-batches of at most ``budget`` tokens, padding counted, from groups sorted by length.

        A group is never cut, so one larger than the budget makes a part of its own. The sum of a loss over
        the parts is its sum over the batch: this changes memory and speed, never the result.
        """
        starts, sizes = self._group_starts()
        spans = [range(int(s), int(s + n)) for s, n in zip(starts, sizes, strict=True)]
        prompt, response = self.prompt_mask.sum(1).tolist(), self.lengths.tolist()
        longest = [(max(prompt[i] for i in span), max(response[i] for i in span)) for span in spans]
        parts: list[list[int]] = []
        width = (0, 0)
        for g in sorted(range(len(spans)), key=lambda g: (sum(longest[g]), g)):
            grown = (max(width[0], longest[g][0]), max(width[1], longest[g][1]))
            if not parts or (len(parts[-1]) + len(spans[g])) * sum(grown) > budget:
                parts.append([])
                grown = longest[g]
            parts[-1].extend(spans[g])
            width = grown
        return [self.take(torch.tensor(part)) for part in parts]
