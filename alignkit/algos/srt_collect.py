"""SRT's data for stage 1: a critic says what is wrong with drafts, scores them and rewrites them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from alignkit.algos._refine import Improve, column, drafts_of, instruction
from alignkit.critique import Critique, parse
from alignkit.data import Row
from alignkit.errors import need
from alignkit.feedback import Account, Answer, Critic, Question
from alignkit.policy import Policy
from alignkit.prompt import Prompt

FINAL = ("refused", "filtered", "too long")  # who gives no text for such a reason will give none


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
        for name in ("instruction", "response"):
            if name not in self.prompt.names:
                raise ValueError(
                    f"prompt.template: does not show the {name} to the critic; put {{{{ {name} }}}} into it"
                )

    def prepare(self, rows: list[Row]) -> list[Row]:
        if self.drafts is not None:
            column(rows, self.drafts)
        return super().prepare(rows)

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
            rows, drafts, lambda part, texts, needed: self._asked(part, texts, needed, account), "critic"
        )

    def _asked(
        self, rows: list[Row], responses: list[str], needed: tuple[str, ...], account: Account
    ) -> list[Critique]:
        """What the critic says of each response; asked again where its answer lacks a part; the attempt with most parts counts."""
        found: dict[int, Critique] = {}
        again = list(range(len(rows)))
        for attempt in range(self.reasks + 1):
            questions = [
                Question(
                    self.prompt.messages(instruction=instruction(rows[i]), response=responses[i]),
                    rows[i], responses[i], attempt,
                )
                for i in again
            ]  # fmt: skip
            answers = dict(zip(again, self.critic.ask(questions, account), strict=True))
            for i, answer in answers.items():
                said = parse(answer.text or "", answer.cut)
                said = said if answer.text else replace(said, why=_kind(answer) or "no answer")
                if i not in found or _parts(said, needed) > _parts(found[i], needed):
                    found[i] = said
            again = [i for i, said in answers.items() if found[i].missing(needed) and _kind(said) not in FINAL]
            if not again:
                break
        return [found[i] for i in range(len(rows))]


def _kind(answer: Answer) -> str:
    """Why there is no text, without what the server says of it."""
    return answer.why.partition(":")[0]


def _parts(critique: Critique, needed: tuple[str, ...]) -> int:
    return sum(bool(getattr(critique, name)) for name in needed)
