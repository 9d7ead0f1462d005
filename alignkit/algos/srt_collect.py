"""SRT's data for stage 1: a critic says what is wrong with drafts, scores them and rewrites them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alignkit.algos._refine import Improve, column, drafts_of, instruction
from alignkit.critique import Critique, parse
from alignkit.data import Row
from alignkit.errors import need
from alignkit.feedback import Account, Critic, Question
from alignkit.policy import Policy
from alignkit.prompt import Prompt


@dataclass(kw_only=True)
class SRTCollect(Improve):
    """SRT (arXiv 2406.07168), data of stage 1: draft at temperature 0.7, one prompt for critique, score and rewrite, and the
    rewrite scored by a fresh critique that sees neither the draft nor what was said of it.

    A row stays where the feedback has its parts and the rewrite's score is not below the draft's (min_gain 0), and with
    several rounds the best-scored rewrite stays with the first round's feedback. An answer of the critic that cannot be read is
    asked for again, as another attempt, `reasks` times; then the row is dropped and counted.
    """

    critic: Critic  # who criticises: critic=endpoint, critic=local, or a program
    prompt: Prompt  # critique, score and rewrite in one prompt
    drafts: str | None = None  # column of drafts that are there already; null: the policy writes them
    reasks: int = 1  # how often an answer that cannot be read is asked for again

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "reasks >= 0")

    def prepare(self, rows: list[Row]) -> list[Row]:
        if self.drafts is not None:
            column(rows, self.drafts)
        return rows

    @property
    def needs_policy(self) -> bool:  # type: ignore[override]
        return self.drafts is None

    def refine(
        self, policy: Policy, reward: Any, rows: list[Row], account: Account, generator: torch.Generator
    ) -> list[Row]:
        if self.drafts is None:
            drafts = drafts_of(self.sampled(policy, rows, 1, generator))
        else:
            drafts = column(rows, self.drafts)
        return self.improved(
            rows, drafts, lambda part, texts, fields: self._asked(part, texts, fields, account), "critic"
        )

    def _asked(self, rows: list[Row], responses: list[str], fields: bool, account: Account) -> list[Critique]:
        """What the critic says of each response; asked again where its answer lacks a part."""
        found = [parse("") for _ in rows]
        open_ = list(range(len(rows)))
        for attempt in range(self.reasks + 1):
            questions = [
                Question(
                    self.prompt.messages(instruction=instruction(rows[i]), response=responses[i]),
                    rows[i], responses[i], attempt,
                )
                for i in open_
            ]  # fmt: skip
            for i, answer in zip(open_, self.critic.ask(questions, account), strict=True):
                said = parse(answer.text or "")
                if said.score is not None or found[i].score is None:  # a score that was given once stays
                    found[i] = said
            open_ = [i for i in open_ if found[i].missing(fields)]
            if not open_:
                break
        return found
