"""Self-ranking: the sample that the model itself rates best, as a demonstration or as a pair with the worst."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.algos._refine import Refine, drafts_of, ranked
from alignkit.batch import Batch
from alignkit.critique import FEEDBACK
from alignkit.data import Row
from alignkit.errors import UserError, need
from alignkit.feedback import Account
from alignkit.policy import Policy
from alignkit.protocols import own_scores


@dataclass(kw_only=True)
class SelfRank(Refine):
    """n samples a prompt, ranked by the model itself: no reward is asked.

    ``critique``: the score that a model trained by `+algo=srt` gives in its feedback (re-ranking in arXiv 2406.07168, Figure 4).
    ``loglik``, ``loglik_norm``, ``majority``: sharpening (arXiv 2412.01951): log-probability at temperature 1, a token's on
    average, or how many samples say the same (the paper: N = 50, T = 1). The sum favours short answers.
    """

    n: int = 16  # samples a prompt (arXiv 2406.07168: 16)
    score: Literal["critique", "loglik", "loglik_norm", "majority"] = "critique"
    write: Literal["best", "pairs"] = "best"
    max_feedback_tokens: int = 256  # of a critique

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "n >= 2", "max_feedback_tokens >= 1")

    def check(self, policy: Policy) -> None:
        if self.score == "critique" and policy.is_encoder_decoder:
            raise UserError("self_rank: algo.score=critique needs a causal model; take algo.score=loglik_norm.")

    def refine(
        self, policy: Policy, reward: Any, rows: list[Row], account: Account, generator: torch.Generator
    ) -> list[Row]:
        batch = self.sampled(policy, rows, self.n, generator, stop=policy.tokens_of(FEEDBACK))
        batch = batch.with_(responses=drafts_of(batch))
        return ranked(rows, batch, self._scores(policy, batch), self.write)

    def _scores(self, policy: Policy, batch: Batch) -> Tensor:
        if self.score == "critique":
            return own_scores(policy, batch.rows, batch.responses, self.max_feedback_tokens)
        if self.score == "majority":
            counts = Counter(zip(batch.group.tolist(), batch.responses, strict=True))
            return torch.tensor([float(counts[key]) for key in zip(batch.group.tolist(), batch.responses, strict=True)])
        assert batch.logprobs is not None
        summed = (batch.logprobs * batch.mask).sum(1).cpu()
        return summed if self.score == "loglik" else summed / batch.lengths.cpu()
