"""Rejection sampling: the samples that a reward accepts, as demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from alignkit.algos._refine import Refine, told
from alignkit.data import Row
from alignkit.errors import need
from alignkit.feedback import Account
from alignkit.policy import Policy
from alignkit.rewards import scores_of


@dataclass(kw_only=True)
class Rejection(Refine):
    """Rejection sampling: of n samples a prompt those whose reward reaches the threshold, each text once, at most so many.

    The filter of self-training by a checker (Re-ReST, arXiv 2406.01495, step 1). A prompt without one is dropped and counted.
    """

    n: int = 8  # samples a prompt
    threshold: float = 1.0  # least reward of a sample that is kept
    max_per_prompt: int = 1  # rows of one prompt, those with the highest reward
    needs_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "n >= 1", "max_per_prompt >= 1")

    def refine(
        self, policy: Policy, reward: Any, rows: list[Row], account: Account, generator: torch.Generator
    ) -> list[Row]:
        batch = self.sampled(policy, rows, self.n, generator)
        scores, found = scores_of(reward, batch), []
        for i, row in enumerate(rows):
            mine = (batch.group == i).nonzero().flatten().tolist()
            best: dict[str, float] = {}
            for j in mine:
                if float(scores[j]) >= self.threshold:
                    text = batch.responses[j]
                    best[text] = max(best.get(text, self.threshold), float(scores[j]))
            made = {**told(row), "accepted": len(best)}
            kept = sorted(best.items(), key=lambda pair: -pair[1])[: self.max_per_prompt]
            found += [made | {"response": text, "score": score} for text, score in kept]
            if not kept:
                found.append(made | {"dropped": "none accepted"})
        return found
