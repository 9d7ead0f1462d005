"""Each kind of knowledge has a random weight, anew at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.algos._distill import Distill
from alignkit.batch import Batch


@dataclass(kw_only=True)
class RandomSoft(Distill):
    """Random-Soft of arXiv 2302.00444: weights of the four kinds of knowledge uniform in [0, 1] at every step."""

    def weigh(self, student: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        return torch.rand(4, generator=generator)
