"""TRL's ``GRPOTrainer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alignkit.algos._trl import Online


@dataclass(kw_only=True)
class TrlGRPO(Online):
    """TRL's own GRPOTrainer on alignkit's model, prompts and reward: a baseline for ``grpo`` and its kin.

    TRL's default loss is DAPO's mean over tokens without a KL; ``algo.trl.loss_type=grpo`` is the paper's mean over responses.
    Clips are ``algo.trl.epsilon`` and ``algo.trl.epsilon_high``, epochs ``algo.trl.num_iterations``.
    """

    trainer: ClassVar[str] = "GRPO"
