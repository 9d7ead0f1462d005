"""SRT's data for stage 2: the model criticises and rewrites its own answers, and what it rates higher becomes a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alignkit.algos._refine import Improve, drafts_of, instruction
from alignkit.critique import FEEDBACK
from alignkit.data import Row, read
from alignkit.errors import UserError, need
from alignkit.feedback import Account
from alignkit.policy import Policy
from alignkit.protocols import criticised


@dataclass(kw_only=True)
class SRTSelf(Improve):
    """SRT (arXiv 2406.07168), data of stage 2: a model trained by `+algo=srt` answers at temperature 0.7, criticises and
    rewrites greedily, and scores the rewrite in a fresh context; pairs (rewrite, answer) whose score rises, for DPO.

    The paper asks for a strict gain here (min_gain 1). Prompts must not be those of stage 1: not_in names its data. The paper
    does not say how a pair ends; a model that is to criticise itself afterwards needs algo.terminator=feedback in DPO (ours).
    """

    min_gain: int = 1
    max_feedback_tokens: int = 256  # of a critique and a rewrite together
    not_in: str | None = None  # run or file of stage 1, whose instructions are left out

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "max_feedback_tokens >= 1")

    def prepare(self, rows: list[Row]) -> list[Row]:
        rows = super().prepare(rows)
        if self.not_in is None:
            return rows
        known = {_instruction(where, columns) for where, columns in read(self.not_in)}
        kept = [row for row in rows if instruction(row) not in known]
        if not kept:
            raise UserError(f"algo.not_in={self.not_in}: all instructions are there. Give stage 2 others: data.train.")
        return kept

    def check(self, policy: Policy) -> None:
        if policy.is_encoder_decoder:
            raise UserError("srt_self: a model that goes on from its own answer must be causal.")

    def refine(
        self, policy: Policy, reward: Any, rows: list[Row], account: Account, generator: torch.Generator
    ) -> list[Row]:
        drafts = drafts_of(self.sampled(policy, rows, 1, generator, stop=policy.tokens_of(FEEDBACK)))
        found = self.improved(
            rows, drafts, lambda part, texts, _: criticised(policy, part, texts, self.max_feedback_tokens), "self"
        )
        return [self._pair(row) for row in found]

    def _pair(self, row: Row) -> Row:
        if "dropped" in row:
            return row
        if row["refinement"] == row["response"]:
            return row | {"dropped": "alike"}
        return row | {
            "chosen": row["refinement"], "rejected": row["response"],
            "score_chosen": row["score_refinement"], "score_rejected": row["score_response"],
        }  # fmt: skip


def _instruction(where: str, columns: Row) -> str:
    """The instruction of a row as it stands in a file, where it is called that, or prompt."""
    found = columns.get("instruction", columns.get("prompt"))
    if found is None:
        raise UserError(
            f"{where}: neither 'instruction' nor 'prompt', by which algo.not_in compares. Name a run of +algo=srt_collect, or a "
            "file with one of these columns."
        )
    return instruction({"prompt": found})
