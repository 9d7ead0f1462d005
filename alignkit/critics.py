"""Critics that are programs: they know the right answer, or nothing at all, and write what a chat model would.

They stand in for the critic of SRT (arXiv 2406.07168): an oracle for lists of digits, a human post-editor for translations,
and two controls. What is drawn is drawn from the seed, the prompt and the response, so an answer depends neither on the
order of the questions nor on how many are asked at once.
"""

from __future__ import annotations

import difflib
import random
from dataclasses import dataclass
from math import ceil
from typing import Any

from alignkit import critique, data
from alignkit.data import Row
from alignkit.errors import UserError, need, suggest
from alignkit.feedback import Answer, Critic, Question
from alignkit.rewards import lists

# how often the paper's critic gave a first draft each of the scores 1 to 10: Figure 3, recovered from its vector graphics
DRAFTS = (366, 2418, 4042, 3175, 1013, 4066, 6399, 2637, 684, 159)
NOTHING = ("nothing", "keep it")  # weaknesses of a perfect response, and the advice


@dataclass(kw_only=True)
class Oracle:
    """Names the missing and the surplus items of a list of digits and their repair, scores and rewrites it: the perfect
    critic, made fallible by two settings.

    With probability ``noise`` the score is not the checker's but drawn from the scores that GPT-4 gave to 25,000 first drafts
    (Figure 3 of arXiv 2406.07168), whatever the response; with probability ``corruption`` the rewrite has one new fault.
    """

    noise: float = 0.1  # probability that the score is drawn from the paper's histogram instead
    corruption: float = 0.05  # probability that the rewrite is given a fault
    most: int = 3  # name at most this many faults, the first ones
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        need(self, "noise >= 0", "noise <= 1", "corruption >= 0", "corruption <= 1", "most >= 1")

    def ask(self, questions: list[Question], account: Any = None) -> list[Answer]:
        return [self._answer(q) for q in questions]

    def _answer(self, question: Question) -> Answer:
        prompt, response = lists.prompt_of(question.row), question.response
        rng = drawn(self.seed, prompt, response)
        score, refinement = lists.score(prompt, response), lists.solve(prompt)
        if rng.random() < self.noise:
            score = rng.choices(range(1, 11), DRAFTS)[0]
        if rng.random() < self.corruption:
            refinement = lists.corrupted(refinement, rng)
        weaknesses, suggestions = NOTHING
        if faults := lists.faults(prompt, response):
            weaknesses = "; ".join(faults[: self.most])
            suggestions = "; ".join(lists.repairs(prompt, response)[: self.most])
        return Answer(said(f"{weaknesses}.", f"{suggestions}.", score, refinement))


@dataclass(kw_only=True)
class PostEdit:
    """Takes the human post-edit of a machine translation for the rewrite, and the words in which both differ for the critique.

    The post-edit itself scores 10, all else ``10 - ceil(10 * HTER)``, from 1 to 9: 9 says that at most a tenth of the words
    had to be changed. HTER is the row's own for its translation, else the word edits to the post-edit over its length.
    """

    translation: str = "mt"  # column of the machine translation
    edited: str = "pe"  # column of its post-edit
    hter: str = "hter"  # column of the share of words that the post-editor changed
    most: int = 4  # name at most this many differences, the first ones

    def __post_init__(self) -> None:
        need(self, "most >= 1")

    def ask(self, questions: list[Question], account: Any = None) -> list[Answer]:
        return [self._answer(q) for q in questions]

    def _answer(self, question: Question) -> Answer:
        row, response = question.row, question.response
        edited = str(_column(row, self.edited))
        there, wanted = response.split(), edited.split()
        if there == wanted:
            return Answer(said(f"{NOTHING[0]}.", f"{NOTHING[1]}.", 10, edited))
        parts = difflib.SequenceMatcher(None, there, wanted, autojunk=False).get_opcodes()
        changes = [(" ".join(there[a:b]), " ".join(wanted[c:d]), a) for tag, a, b, c, d in parts if tag != "equal"]
        weaknesses, suggestions = [], []
        for old, new, at in changes[: self.most]:
            place = f'after "{there[at - 1]}"' if at else "at the beginning"
            weaknesses.append(f'"{old}" is {"wrong" if new else "too much"}' if old else f"words are missing {place}")
            suggestions.append(
                f'write "{new}" for "{old}"' if old and new else f'drop "{old}"' if old else f'add "{new}" {place}'
            )
        if response == _column(row, self.translation):
            hter = _number(row, self.hter)
        else:
            hter = lists.edit_distance(there, wanted) / max(1, len(wanted))
        score = max(1, min(9, 10 - ceil(round(10 * hter, 6))))
        return Answer(said("; ".join(weaknesses) + ".", "; ".join(suggestions) + ".", score, edited))


@dataclass(kw_only=True)
class Fixed:
    """Says the same of every response and hands it back as it is: the control without any information.

    The score of a response and of its "rewrite" are the same, so every row passes a filter that asks for no loss
    (``s(x, r) >= s(x, y)``) and none passes one that asks for a gain. What a model then learns is the form alone: to answer
    as it did, to say the formula, and to copy.
    """

    weaknesses: str = "an item is missing or too much"  # said of every response
    suggestions: str = "write it again"  # likewise
    score: int = 6  # 1 to 10; the paper's critic gave a first draft 5.3 on average

    def __post_init__(self) -> None:
        need(self, "score >= 1", "score <= 10")

    def ask(self, questions: list[Question], account: Any = None) -> list[Answer]:
        return [Answer(said(f"{self.weaknesses}.", f"{self.suggestions}.", self.score, q.response)) for q in questions]


@dataclass(kw_only=True)
class Shuffled:
    """Another critic's score and rewrite, with the weaknesses and advice that it has for another row: the control that asks
    whether the content of the feedback matters.

    Score and rewrite stay, so that a filter keeps the very rows that it keeps of the other critic, and rows, lengths and
    rewrites can be compared. The other row is one of a fixed list, drawn from the seed, the prompt and the response; where the
    other critic says the same of both, the next of the list that tells them apart is taken, and without one the feedback stays.
    """

    critic: Critic  # the critic whose feedback is exchanged: one that is a program
    donors: str  # source of the other rows, with their columns
    response: str = "draft"  # column of their responses
    prompt: str = "prompt"  # column of their prompts
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        self._said: list[tuple[str, str]] | None = None  # of the donors

    def ask(self, questions: list[Question], account: Any = None) -> list[Answer]:
        donated, answers = self._donated(account), self.critic.ask(questions, account)
        return [self._exchanged(q, answer, donated) for q, answer in zip(questions, answers, strict=True)]

    def _exchanged(self, question: Question, answer: Answer, donated: list[tuple[str, str]]) -> Answer:
        own = critique.parse(answer.text or "")
        if own.missing(critique.KEYWORDS):
            return answer
        assert own.score is not None
        start = drawn(self.seed, lists.prompt_of(question.row), question.response).randrange(len(donated))
        others = [*donated[start:], *donated[:start]]
        mine = (own.weaknesses, own.suggestions)
        weaknesses, suggestions = next((other for other in others if other != mine), mine)
        return Answer(said(weaknesses, suggestions, own.score, own.refinement))

    def _donated(self, account: Any) -> list[tuple[str, str]]:
        """(weaknesses, suggestions) that the other critic has for each of the donors, asked once."""
        if self._said is not None:
            return self._said
        questions = []
        for i, (where, columns) in enumerate(data.read(self.donors)):
            for name in (self.prompt, self.response):
                if not isinstance(columns.get(name), str):
                    raise UserError(
                        f"{where}: no text in column '{name}', which critic.donors needs.{suggest(name, columns)}"
                    )
            row = {**columns, "prompt": columns[self.prompt], "id": i}
            questions.append(Question([], row, columns[self.response]))
        said = [critique.parse(a.text or "") for a in self.critic.ask(questions, account)]
        if not said:
            raise UserError(f"critic.donors={self.donors}: no rows.")
        self._said = [(one.weaknesses, one.suggestions) for one in said]
        return self._said


def said(weaknesses: str, suggestions: str, score: int, refinement: str) -> str:
    """What a critic writes behind ``### Feedback``."""
    return f"{critique.feedback(weaknesses, suggestions, score)}\n\n{critique.IMPROVED}\n{refinement}"


def drawn(seed: int, prompt: str, response: str) -> random.Random:
    """A generator of draws that depends on these three alone, in every process."""
    return random.Random(f"{seed}\0{prompt}\0{response}")  # seeded by the text's SHA-512, not by hash()


def _column(row: Row, column: str) -> object:
    if column not in row:
        raise UserError(f"row {row.get('id')}: no column '{column}', which the critic reads.{suggest(column, row)}")
    return row[column]


def _number(row: Row, column: str) -> float:
    value = _column(row, column)
    try:
        return float(str(value))
    except ValueError:
        raise UserError(f"row {row.get('id')}: column '{column}' must be a number, is {value!r}.") from None
