"""Patient knowledge distillation: the teacher's layers too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from alignkit.algos._distill import Distill


@dataclass(kw_only=True)
class PKD(Distill):
    """Patient KD (arXiv 1908.09355): KD plus the squared distance of the [CLS] states of each student layer and its teacher
    layer, both made of length 1 (released code). ``features=tokens``: of every token, as they are.

    Weights of 1 each, and the last layers are compared too (ours; the paper tunes the weights and leaves the last one out).
    """

    features: Literal["tokens", "summary"] = "summary"
    fixed: ClassVar[tuple[float, float, float, float]] = (1.0, 1.0, 1.0, 0.0)
