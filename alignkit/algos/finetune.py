"""Fine-tuning on the labels alone: what a distilled student is compared with, and how a teacher is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alignkit.algos._distill import Distill


@dataclass(kw_only=True)
class Finetune(Distill):
    """Fine-tuning on the labels (FinK of arXiv 2302.00444): cross-entropy, no teacher. It makes teachers too."""

    fixed: ClassVar[tuple[float, float, float, float]] = (1.0, 0.0, 0.0, 0.0)
