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


TOKENS = (
    "response_ids",
    "mask",
    "logprobs",
    "ref_logprobs",
    "values",
    "returns",
    "advantages",
)  # fields of shape (B, T)


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
    logprobs: Tensor | None = None  # (B, T) of the tokens under the policy that sampled, at the loss's temperature
    ref_logprobs: Tensor | None = None  # (B, T) of the same tokens under the reference model
    values: Tensor | None = None  # (B, T) what the critic expects before each token
    returns: Tensor | None = None  # (B, T) what the critic is trained towards
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

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device)
            elif isinstance(value, dict):
                moved[f.name] = {k: v.to(device) for k, v in value.items()}
        return replace(self, **moved)

    def drawn(self) -> Batch:
        """Without the rows that are no samples: ``extra["given"]`` (B,) bool, where a method adds references or greedy ones."""
        given = self.extra.get("given")
        return self if given is None else self.take((~given).nonzero()[:, 0])

    @staticmethod
    def stack(parts: list[Batch], left: bool) -> Batch:
        """The rows of all parts, one below the other, groups kept apart; what not every part has is dropped.

        ``left``: prompts are padded on that side, as a causal model has them.
        """
        groups, offset = [], 0
        for part in parts:
            index = torch.unique_consecutive(part.group, return_inverse=True)[1]
            groups.append(index + offset)
            offset += int(index.max()) + 1
        joined: dict[str, Any] = {"group": torch.cat(groups)}
        for f in fields(Batch):
            values = [getattr(part, f.name) for part in parts]
            if f.name == "group" or any(v is None for v in values):
                continue
            if isinstance(values[0], Tensor):
                joined[f.name] = _padded(values, left and f.name in ("prompt_ids", "prompt_mask"))
            elif isinstance(values[0], dict):
                common = [k for k in values[0] if all(k in v for v in values)]
                joined[f.name] = {k: _padded([v[k] for v in values]) for k in common}
            else:
                joined[f.name] = sum(values[1:], values[0])
        return Batch(**joined)

    def merge(self, other: Batch) -> Batch:
        """The rows of both, those of ``other`` behind the rows of the same prompt; both hold the same prompts in order."""
        joined = Batch.stack([self, other], left=True)  # equal prompts need no padding on either side
        group = joined.group % (int(joined.group.max() + 1) // 2)
        return joined.with_(group=group).take(torch.sort(group, stable=True).indices)

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
        for name in TOKENS:
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
        """Micro-batches of at most ``budget`` tokens, each prompt counted once, from groups sorted by length.

        A group is never cut, so one larger than the budget makes a part of its own. The sum of a loss over
        the parts is its sum over the batch: this changes memory and speed, never the result.
        """
        starts, sizes = self._group_starts()
        spans = [range(int(s), int(s + n)) for s, n in zip(starts, sizes, strict=True)]
        prompt, response = self.prompt_mask.sum(1).tolist(), self.lengths.tolist()
        cost = [prompt[span[0]] + sum(response[i] for i in span) for span in spans]
        parts: list[list[int]] = []
        filled = 0
        for g in sorted(range(len(spans)), key=lambda g: (cost[g], g)):
            if not parts or filled + cost[g] > budget:
                parts.append([])
                filled = 0
            parts[-1].extend(spans[g])
            filled += cost[g]
        return [self.take(torch.tensor(part)) for part in parts]


def _padded(tensors: list[Tensor], left: bool = False) -> Tensor:
    """Concatenated along the rows, the second axis padded with zeros to the widest."""
    width = max((t.shape[1] for t in tensors if t.dim() > 1), default=0)
    wide = []
    for t in tensors:
        if t.dim() > 1:
            more = t.new_zeros(t.shape[0], width - t.shape[1], *t.shape[2:])
            t = torch.cat([more, t] if left else [t, more], dim=1)
        wide.append(t)
    return torch.cat(wide)
