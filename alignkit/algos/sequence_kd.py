"""Sequence-level distillation: the student learns what the teacher would have written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from alignkit.algos._refine import Refine, own
from alignkit.data import Row
from alignkit.errors import need
from alignkit.feedback import Account
from alignkit.policy import Policy


@dataclass(kw_only=True)
class SequenceKD(Refine):
    """Sequence-level knowledge distillation (arXiv 1606.07947): the best of the teacher's beam search takes the place of each
    training row's response; ``model.path`` is the teacher. The student then learns the new rows with +algo=sft.

    The references of a row stay. What is cut off before its end, or empty, is dropped (ours). The paper's interpolation (the
    beam's most similar to the reference) is near +algo=best_of_n with reward=bleu.
    """

    beams: int = 5  # 1: greedy
    needs_reward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beams >= 1")

    def refine(
        self, policy: Policy, reward: Any, rows: list[Row], account: Account, generator: torch.Generator
    ) -> list[Row]:
        batch = policy.beam(rows, self.beams, self.max_new_tokens)
        ended = policy.ended(batch.response_ids, batch.mask).tolist()
        found = []
        for row, text, whole in zip(rows, batch.responses, ended, strict=True):
            new = {**own(row), "response": text}
            if not whole or not text:
                new["dropped"] = "cut off" if text else "empty"
            found.append(new)
        return found
