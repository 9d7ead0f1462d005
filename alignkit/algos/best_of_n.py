"""Best of n: the sample that a reward likes best, as a demonstration or as a pair with the worst."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from alignkit.algos._refine import Refine, ranked
from alignkit.data import Row
from alignkit.errors import need
from alignkit.feedback import Account
from alignkit.policy import Policy
from alignkit.rewards import scores_of


@dataclass(kw_only=True)
class BestOfN(Refine):
    """Best of n: n samples a prompt, the best by the reward; the earliest of equals.

    ``write=pairs`` puts the worst beside it (columns chosen and rejected); a prompt whose samples are all alike is dropped.
    """

    n: int = 8  # samples a prompt
    write: Literal["best", "pairs"] = "best"
    needs_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "n >= 2")

    def refine(
        self, policy: Policy, reward: Any, rows: list[Row], account: Account, generator: torch.Generator
    ) -> list[Row]:
        batch = self.sampled(policy, rows, self.n, generator)
        return ranked(rows, batch, scores_of(reward, batch), self.write)
