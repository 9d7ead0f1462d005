"""TRL's ``RLOOTrainer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alignkit.algos._trl import Online


@dataclass(kw_only=True)
class TrlRLOO(Online):
    """TRL's own RLOOTrainer on alignkit's model, prompts and reward: a baseline for ``rloo``.

    One action a response, its ratio clipped (``algo.trl.epsilon``), the KL in the reward.
    """

    k: int = 4  # responses an input
    kl: float = 0.05  # coefficient of KL(policy || start model); TRL's beta
    trainer: ClassVar[str] = "RLOO"
