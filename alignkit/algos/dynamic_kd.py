"""Distillation that listens to the teacher where the student is unsure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from alignkit import ops
from alignkit.algos._distill import Distill
from alignkit.batch import Batch
from alignkit.scoring import Seen, scatter


@dataclass(kw_only=True)
class DynamicKD(Distill):
    """Dynamic KD by uncertainty (arXiv 2109.11295, released code): each row's KL is weighted by the student's entropy,
    H(p_S) / log C, of its C classes; no gradient through the weight (ours)."""

    fixed: ClassVar[tuple[float, float, float, float]] = (1.0, 1.0, 0.0, 0.0)

    def by_position(self, weights: Tensor, student: Seen, batch: Batch) -> Tensor:
        logits = student.logits.detach().float()
        share = ops.entropy(logits) / math.log(logits.shape[-1])
        unsure = scatter(share, batch.mask.flatten().nonzero().squeeze(1), batch.mask)
        wide = weights[:, None].expand(*batch.mask.shape, 4).clone()
        wide[..., 1] *= unsure
        return wide
