"""Rewards: callables from a batch to scores. One class each, named in the YAML by ``_target_``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from alignkit.batch import Batch


class Reward(Protocol):
    """``(B,)`` float32, one score a response. The data row, with all its columns, is in ``batch.rows``."""

    def __call__(self, batch: Batch) -> Tensor: ...
