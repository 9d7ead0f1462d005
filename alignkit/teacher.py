"""The model that is distilled: frozen, asked at every step, or once of every training row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import UserError
from alignkit.scoring import Seen

CHUNK = 256  # rows that are asked at a time


class Teacher:
    """A frozen classifier or policy, and what it makes of rows."""

    def __init__(self, reader: Any, layers: Sequence[int]) -> None:
        """``layers``: whose states are wanted."""
        self.reader, self.layers = reader, list(layers)
        reader.model.requires_grad_(False)
        reader.model.eval()
        self._known: dict[int, list[Tensor]] = {}  # row id → logits (T, V), states of each layer (W, d)

    @torch.no_grad()
    def seen(self, batch: Batch) -> Seen:
        """What the teacher makes of a batch, without a graph; from memory where it was asked before."""
        if not self._known:
            return self.reader.seen(batch, self.layers)  # type: ignore[no-any-return]
        found = [self._known[row["id"]] for row in batch.rows]
        device = batch.mask.device
        where = batch.prompt_mask if self._reads_prompts else batch.mask
        width = where.shape[1]
        states = {}
        for i, layer in enumerate(self.layers):
            parts = [one[1 + i] for one in found]
            states[layer] = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, width - len(x))) for x in parts]).to(
                device
            )
        return Seen(torch.cat([one[0] for one in found]).to(device), states, where, self._first)

    @torch.no_grad()
    def ask(self, rows: list[Row], collate: Callable[[list[Row]], Batch], budget: int, limit_gb: float) -> None:
        """Read every training row once, in order, and keep what is seen in memory.

        Raises:
            UserError: it would be more than ``limit_gb``.
        """
        known: dict[int, list[Tensor]] = {}
        for start in range(0, len(rows), CHUNK):
            batch = collate(rows[start : start + CHUNK])
            batch = batch.with_(extra={"row": torch.arange(len(batch), device=batch.mask.device)})
            for part in batch.split(budget):
                seen = self.reader.seen(part, self.layers)
                self._first, self._reads_prompts = seen.first, seen.where is part.prompt_mask
                logits = seen.logits.split(part.mask.sum(1).tolist())
                lengths = seen.where.sum(1).tolist()
                for i, row in enumerate(part.rows):
                    states = [seen.states[layer][i, : lengths[i]] for layer in self.layers]
                    known[row["id"]] = [x.cpu().clone() for x in (logits[i], *states)]
            if not start:
                size = sum(x.numel() * x.element_size() for one in known.values() for x in one)
                whole = size / len(known) * len(rows) / 1e9
                if whole > limit_gb:
                    raise UserError(
                        f"algo.cache_gb={limit_gb:g}: what the teacher says of {len(rows):,} rows would take about {whole:.1f} "
                        f"GB. Raise it, or set it to 0: the teacher is then asked at every step."
                    )
        self._known = known
