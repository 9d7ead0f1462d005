"""What every method that makes a data set brings to the stage ``refine``: settings, and ``refine``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignkit.batch import Batch
from alignkit.critique import FIELDS, KEYWORDS, Critique, answer, has_marker, parse
from alignkit.data import Row
from alignkit.decode import Decode
from alignkit.errors import UserError, need, suggest
from alignkit.feedback import Account
from alignkit.policy import Policy

Criticise = Callable[[list[Row], list[str], tuple[str, ...]], list[Critique]]
"""(rows, a response to each, the parts of a critique that are needed) → what is said of each response."""


@dataclass(kw_only=True)
class Refine:
    """Settings of the stage that makes a data set: how drafts are sampled, how many rows are done between two saves."""

    rows_per_part: int = 64  # rows that are done, then saved, together
    temperature: float = 0.7  # of drafts and samples
    max_new_tokens: int = 64  # of a draft or sample
    needs_policy: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        need(self, "rows_per_part >= 1", "temperature > 0", "max_new_tokens >= 1")

    def refine(
        self, policy: Policy, reward: Any, rows: list[Row], account: Account, generator: torch.Generator
    ) -> list[Row]:
        """The rows of the new data set that come of these rows, in their order.

        One that is not to be used has ``dropped``, the name of the filter that it did not pass, and stays in the count.
        """
        raise NotImplementedError(f"{type(self).__name__} must define refine(policy, reward, rows, account, generator)")

    def prepare(self, rows: list[Row]) -> list[Row]:
        """The rows, before a model is loaded: those that are not wanted are left out."""
        return rows

    def check(self, policy: Policy) -> None:
        """Refuse a model that cannot do what the method asks of it."""

    def sampled(self, policy: Policy, rows: list[Row], n: int, generator: torch.Generator, **how: Any) -> Batch:
        """``n`` responses to each row."""
        tau = torch.full((len(rows),), self.temperature)
        settings = Decode(max_new_tokens=self.max_new_tokens, **how)
        return policy.generate(rows, n, settings, temperature=tau, generator=generator)


WRITTEN = (  # columns that say what this run made of a row: one that has them already, from a run before, does not keep them
    "response", "chosen", "rejected", "dropped", "score", "score_response", "score_refinement", "score_chosen",
    "score_rejected",
)  # fmt: skip


def own(row: Row) -> Row:
    """A row's columns as the new data set keeps them: without its number and without what this run writes."""
    return {name: value for name, value in row.items() if name not in ("id", *WRITTEN)}


def told(row: Row) -> Row:
    """``own`` columns, and the instruction where one text can tell it."""
    single = isinstance(row["prompt"], str) or sum(turn["role"] == "user" for turn in row["prompt"]) == 1
    return own(row) | ({"instruction": instruction(row)} if single else {})


def instruction(row: Row) -> str:
    """The instruction of a row as one text: a prompt, or the user turn of a chat that has one.

    Raises:
        UserError: a chat of several turns, which one text cannot tell.
    """
    if isinstance(row["prompt"], str):
        return row["prompt"]
    turns = [str(turn["content"]) for turn in row["prompt"] if turn["role"] == "user"]
    if len(turns) != 1:
        raise UserError(
            f"row {row.get('id', '?')} is a chat with {len(turns)} user turns; an instruction has one. Leave such rows out."
        )
    return turns[0]


@dataclass(kw_only=True)
class Improve(Refine):
    """Settings of what criticises and rewrites drafts, and of the filters behind it."""

    rounds: int = 1  # critiques and rewrites in a row; the best-scored refinement is kept, the earliest of equals
    min_gain: int = 0  # a refinement's score must be above the draft's by at least this: 0 keeps equal ones
    need_fields: bool = False  # drop feedback without weaknesses and suggestions under headings of their own

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "rounds >= 1", "min_gain >= -9")

    def prepare(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            instruction(row)
        return rows

    def improved(self, rows: list[Row], drafts: list[str], criticise: Criticise, source: str) -> list[Row]:
        """Drafts, what is said of each, and the best refinement, each refinement scored by a critique of its own.

        Round k criticises refinement k as if it were a first answer: that gives its score, by a critic who does not see where
        it comes from, and the next refinement.
        """
        texts = [[draft] for draft in drafts]
        chains: list[list[Critique]] = [[] for _ in rows]
        for k in range(self.rounds + 1):
            needed = self.needed if k == 0 else KEYWORDS if k < self.rounds else ("score",)
            going = [i for i, said in enumerate(texts) if len(said) == k + 1 and said[k]]
            if not going:
                break
            found = criticise([rows[i] for i in going], [texts[i][k] for i in going], needed)
            for i, said in zip(going, found, strict=True):
                chains[i].append(said)
                if said.missing(needed) is None:
                    texts[i].append(said.refinement)
        return [self._row(*each, source) for each in zip(rows, texts, chains, strict=True)]

    @property
    def needed(self) -> tuple[str, ...]:
        """The parts that a draft's critique must have (rule 1)."""
        return FIELDS if self.need_fields else KEYWORDS

    def _row(self, row: Row, responses: list[str], chain: list[Critique], source: str) -> Row:
        draft, first = responses[0], chain[0] if chain else parse("")
        scores = [critique.score for critique in chain]
        made = {
            **own(row),
            "instruction": instruction(row),
            "response": draft,
            "feedback": {
                "weaknesses": first.weaknesses, "suggestions": first.suggestions, "score": first.score, "raw": first.raw,
            },
            "refinement": first.refinement,
            "score_response": first.score,
            "score_refinement": None,
            "scores": scores,
            "source": source,
        }  # fmt: skip
        missing = first.missing(self.needed)
        if not draft:
            return made | {"dropped": "draft empty"}
        if missing:
            return made | {"dropped": missing if missing == first.why else f"no {missing}"}
        scored = [(score, -k) for k, score in enumerate(scores) if k and score is not None]
        if not scored:
            return made | {"dropped": "refinement not scored"}
        score, k = max(scored)[0], -max(scored)[1]
        made |= {"refinement": responses[k], "score_refinement": score}
        if any(map(has_marker, (draft, first.weaknesses, first.suggestions, responses[k]))):
            return made | {"dropped": "marker inside"}
        assert first.score is not None
        return made if score - first.score >= self.min_gain else made | {"dropped": "no gain"}


def drafts_of(batch: Batch) -> list[str]:
    """The first answers of what was sampled: cut at the feedback marker, where a model goes on to criticise itself."""
    return [answer(text) for text in batch.responses]


def column(rows: list[Row], name: str) -> list[str]:
    """Texts of a column.

    Raises:
        UserError: a row without it.
    """
    for row in rows:
        if not isinstance(row.get(name), str):
            raise UserError(
                f"row {row['id']} has no text in column '{name}', which algo.drafts asks for.{suggest(name, own(row))}"
            )
    return [row[name] for row in rows]


def ranked(rows: list[Row], batch: Batch, scores: Tensor, write: str) -> list[Row]:
    """The best of each row's samples, the earliest of equals; with ``write=pairs`` beside the worst.

    Args:
        scores: (B,), higher is better; not a number: out of the race.
    """
    found = []
    for i, row in enumerate(rows):
        mine = (batch.group == i).nonzero().flatten().tolist()
        order = sorted((j for j in mine if scores[j] == scores[j]), key=lambda j: (-float(scores[j]), j))
        made = {**told(row), "responses": [batch.responses[j] for j in mine]}
        made["scores"] = [None if scores[j] != scores[j] else float(scores[j]) for j in mine]
        if not order:
            found.append(made | {"dropped": "no score"})
            continue
        best, worst = order[0], order[-1]
        made |= {"response": batch.responses[best], "score": float(scores[best])}
        if write == "pairs":
            made |= {
                "chosen": batch.responses[best], "rejected": batch.responses[worst],
                "score_chosen": float(scores[best]), "score_rejected": float(scores[worst]),
            }  # fmt: skip
            if made["score_chosen"] == made["score_rejected"]:
                made["dropped"] = "tie"
            elif not (made["chosen"] and made["rejected"]):
                made["dropped"] = "empty"
            elif made["chosen"] == made["rejected"]:
                made["dropped"] = "alike"
        found.append(made)
    return found
