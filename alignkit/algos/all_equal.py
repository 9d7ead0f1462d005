"""All four kinds of knowledge, equally."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alignkit.algos._distill import Distill


@dataclass(kw_only=True)
class AllEqual(Distill):
    """All four kinds of knowledge of arXiv 2302.00444 with a weight of 1 each: a baseline of its selection (ours)."""

    fixed: ClassVar[tuple[float, float, float, float]] = (1.0, 1.0, 1.0, 1.0)
