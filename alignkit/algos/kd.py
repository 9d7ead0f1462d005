"""Knowledge distillation: the labels, and what the teacher says instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alignkit.algos._distill import Distill


@dataclass(kw_only=True)
class KD(Distill):
    """Knowledge distillation (arXiv 1503.02531): cross-entropy with the labels plus T² KL(p_T ‖ p_S) over the temperature T.

    Weights of 1 each, as FinK + ResK of arXiv 2302.00444's comparison.
    """

    fixed: ClassVar[tuple[float, float, float, float]] = (1.0, 1.0, 0.0, 0.0)
