"""Each kind of knowledge is used or not, at random, anew at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.algos._distill import Distill
from alignkit.batch import Batch
from alignkit.selector import or_first


@dataclass(kw_only=True)
class RandomHard(Distill):
    """Random-Hard of arXiv 2302.00444: each of the four kinds of knowledge with probability 1/2 at every step.

    Where none is drawn, the labels teach (ours).
    """

    def weigh(self, student: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        return or_first((torch.rand(4, generator=generator) < 0.5).float())
