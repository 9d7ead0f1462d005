"""Asking a model for text: what is asked, what is answered, and the account that remembers, counts and stops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from alignkit.data import Row

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Question:
    """What a chat model is asked; ``row`` and ``response`` say what about, for critics that are programs."""

    messages: Messages
    row: Row = field(default_factory=dict)
    response: str = ""
    attempt: int = 0  # above 0: asked again, because the answer to the attempt before could not be used


@dataclass(frozen=True)
class Answer:
    """What comes back: a text, or the reason why there is none."""

    text: str | None
    why: str = ""  # why there is no text: refused, empty, malformed
    cut: bool = False  # the text ended at the limit of tokens
    prompt_tokens: int = 0
    tokens: int = 0  # written


class Critic(Protocol):
    """A model behind an endpoint, one in this process, or a program: the answers to all questions, in their order."""

    def ask(self, questions: list[Question], account: Any) -> list[Answer]: ...


class Account:
    def totals(self):
        return {}

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass


def account(run):
    return Account()
