"""Judges: which of two responses to a row is better. One class each, named in the YAML by ``_target_``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from alignkit.data import Row
from alignkit.errors import need
from alignkit.feedback import Answer, Critic, Question
from alignkit.prompt import Prompt
from alignkit.rewards import Reward, of_texts, scores_of

Array = np.ndarray
TOGETHER = 256  # rows that a reward scores at a time


@dataclass
class Verdicts:
    """What a judge says of N rows."""

    preference: Array  # (N,) in [0, 1]: 1 the first text is better, 0 the second, 1/2 a tie; not a number: no verdict
    details: list[dict[str, Any]]  # N entries: how it came to it, for the record
    scores: Array | None = None  # (2, N) each text's own score, first and second, of a judge that gives them
    figures: dict[str, float | None] = field(
        default_factory=dict
    )  # of the judge itself; None: nothing to measure it on


class Judge(Protocol):
    """``account`` pays where a chat model is asked."""

    def prefer(self, rows: list[Row], first: list[str], second: list[str], account: Any) -> Verdicts: ...


@dataclass(kw_only=True)
class ByReward:
    """A reward as a judge: of two texts the one with the higher score wins."""

    reward: Any  # any reward that goes by texts
    tie: float = 0.0  # a difference of at most this is a tie

    def __post_init__(self) -> None:
        need(self, "tie >= 0")

    def prefer(self, rows: list[Row], first: list[str], second: list[str], account: Any = None) -> Verdicts:
        scores = np.stack([self._scores(rows, first), self._scores(rows, second)])
        gap = scores[0] - scores[1]
        preference = np.where(np.abs(gap) <= self.tie, 0.5, (np.sign(gap) + 1) / 2)
        return Verdicts(preference, [{"scores": list(pair)} for pair in scores.T.tolist()], scores)

    def _scores(self, rows: list[Row], texts: list[str]) -> Array:
        """(N,) float64."""
        each = [{**row, "response": text} for row, text in zip(rows, texts, strict=True)]
        reward: Reward = self.reward
        parts = [scores_of(reward, of_texts(each[i : i + TOGETHER])) for i in range(0, len(each), TOGETHER)]
        return np.concatenate([part.double().cpu().numpy() for part in parts])


VERDICT = re.compile(r"\[\[([ABC])\]\]")
FIRST = {"A": 1.0, "B": 0.0, "C": 0.5}  # verdict → preference for the text that was shown first


@dataclass(kw_only=True)
class ByChat:
    """A chat model as a judge, which sees each pair in both orders (arXiv 2306.05685).

    The preference is the mean over the orders, so verdicts that contradict each other are a tie. The last ``[[A]]``, ``[[B]]``
    or ``[[C]]`` (tie) of an answer counts; without one it is asked again once, and then the row has no verdict.

    Figures: ``consistency``, the share of rows to which both orders give the same verdict; ``first_wins``, of the verdicts that
    are no tie the share for the text shown first (1/2: no bias of position); ``asked_again``, questions.
    """

    critic: Any  # what is asked, as the critics of `alignkit list`
    prompt: Any  # template over `instruction`, `first` and `second`

    def prefer(self, rows: list[Row], first: list[str], second: list[str], account: Any) -> Verdicts:
        prompt: Prompt = self.prompt
        questions = [
            Question(prompt.messages(instruction=_text(row["prompt"]), first=a, second=b), row, a)
            for left, right in ((first, second), (second, first))
            for row, a, b in zip(rows, left, right, strict=True)
        ]
        found, again = self._asked(questions, account)
        orders = [found[: len(rows)], found[len(rows) :]]  # the texts as given, and swapped
        shown = np.array([[np.nan if verdict is None else FIRST[verdict] for verdict in order] for order in orders])
        preference = (shown[0] + 1 - shown[1]) / 2
        known = ~np.isnan(preference)
        decided = shown[:, known][shown[:, known] != 0.5]
        figures: dict[str, float | None] = {
            "consistency": float((shown[0] == 1 - shown[1])[known].mean()) if known.any() else None,
            "first_wins": float(decided.mean()) if len(decided) else None,
            "asked_again": again,
        }
        return Verdicts(preference, [{"orders": list(pair)} for pair in zip(*orders, strict=True)], None, figures)

    def _asked(self, questions: list[Question], account: Any) -> tuple[list[str | None], int]:
        """(verdict of every question, how many were asked a second time)."""
        critic: Critic = self.critic
        found = [_verdict(answer) for answer in critic.ask(questions, account)]
        failed = [i for i, verdict in enumerate(found) if verdict is None]
        if failed:
            more = [Question(q.messages, q.row, q.response, attempt=1) for q in (questions[i] for i in failed)]
            for i, answer in zip(failed, critic.ask(more, account), strict=True):
                found[i] = _verdict(answer)
        return found, len(failed)


def _verdict(answer: Answer) -> str | None:
    found = VERDICT.findall(answer.text or "")
    return found[-1] if found else None


def _text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one text; a conversation of several turns says who speaks."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
