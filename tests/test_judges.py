"""Judges: a reward that compares scores, and a chat model that is asked in both orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from alignkit.batch import Batch
from alignkit.config import conf_dir
from alignkit.errors import UserError
from alignkit.feedback import Answer, Question
from alignkit.judges import ByChat, ByReward
from alignkit.prompt import Prompt
from alignkit.rewards.metric import ExactMatch
from alignkit.rewards.rule import Length

ROWS = [{"prompt": f"p{i}", "references": [f"y{i}"], "id": i} for i in range(3)]
PAIR = Prompt(template="{{ instruction }}|{{ first }}|{{ second }}")


@dataclass
class Program:
    """A chat model that is a function of (first text, second text, attempt); it keeps what it was asked."""

    says: Callable[[str, str, int], str | None]
    asked: list[Question] = field(default_factory=list)
    accounts: list[Any] = field(default_factory=list)

    def ask(self, questions: list[Question], account: Any) -> list[Answer]:
        self.asked += questions
        self.accounts.append(account)
        texts = [self.says(*q.messages[-1]["content"].split("|")[1:], q.attempt) for q in questions]
        return [Answer(text, "" if text is not None else "refused") for text in texts]


def chat(says: Callable[[str, str, int], str | None]) -> ByChat:
    return ByChat(critic=Program(says), prompt=PAIR)


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_the_higher_score_wins() -> None:
    found = ByReward(reward=ExactMatch()).prefer(ROWS, ["y0", "no", "no"], ["no", "y1", "nay"])
    assert found.preference.tolist() == [1.0, 0.0, 0.5]
    assert found.scores is not None
    assert found.scores.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert [one["scores"] for one in found.details] == [[1, 0], [0, 1], [0, 0]]
    assert found.figures == {}


@pytest.mark.parametrize(("tie", "wanted"), [(0.0, [1.0, 0.0, 0.5]), (0.25, [0.5, 0.0, 0.5]), (0.5, [0.5, 0.5, 0.5])])
def test_a_difference_up_to_tie_is_a_tie(tie: float, wanted: list[float]) -> None:
    """Scores of 4, 3 and 2 characters where 4 are wanted: 1, 0.75, 0.5."""
    judge = ByReward(reward=Length(target=4, unit="characters"), tie=tie)
    assert judge.prefer(ROWS, ["aaaa", "aa", "aa"], ["aaa", "aaaa", "bb"]).preference.tolist() == wanted


def test_a_tie_is_no_negative_number() -> None:
    with pytest.raises(ValueError, match="tie must be at least 0"):
        ByReward(reward=ExactMatch(), tie=-0.1)


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=5))
def test_a_reward_does_not_care_for_the_order(pairs: list[tuple[str, str]]) -> None:
    rows = [{"prompt": "p", "references": ["abc"], "id": i} for i in range(len(pairs))]
    first, second = map(list, zip(*pairs, strict=True))
    judge = ByReward(reward=Length(target=3, unit="characters"))
    assert (judge.prefer(rows, first, second).preference + judge.prefer(rows, second, first).preference == 1).all()


def test_many_rows_and_all_their_columns_reach_the_reward() -> None:
    class Wanted:
        def __call__(self, batch: Batch) -> torch.Tensor:
            return torch.tensor([float(row["wanted"] == y) for row, y in zip(batch.rows, batch.responses, strict=True)])

    rows = [{"prompt": "p", "references": [], "id": i, "wanted": str(i)} for i in range(700)]
    right, wrong = [str(i) for i in range(700)], ["no"] * 700
    assert (ByReward(reward=Wanted()).prefer(rows, right, wrong).preference == 1).all()


# ---- chat models -----------------------------------------------------------------------------------------------------

SWAPS = [  # verdict on (x, y), verdict on (y, x) → preference for x
    ("A", "B", 1.0), ("B", "A", 0.0), ("C", "C", 0.5), ("A", "A", 0.5), ("B", "B", 0.5), ("A", "C", 0.75), ("C", "B", 0.75),
    ("B", "C", 0.25), ("C", "A", 0.25),
]  # fmt: skip


@pytest.mark.parametrize(("straight", "swapped", "preference"), SWAPS)
def test_the_preference_is_the_mean_over_both_orders(straight: str, swapped: str, preference: float) -> None:
    judge = chat(lambda first, second, attempt: f"[[{straight if first == 'x' else swapped}]]")
    found = judge.prefer(ROWS[:1], ["x"], ["y"], None)
    assert found.preference.tolist() == [preference]
    assert found.details == [{"orders": [straight, swapped]}]
    assert found.figures["consistency"] == float((straight, swapped) in {("A", "B"), ("B", "A"), ("C", "C")})
    verdicts = [v for v in (straight, swapped) if v != "C"]
    assert found.figures["first_wins"] == (verdicts.count("A") / len(verdicts) if verdicts else None)


def test_a_judge_that_always_takes_the_first_says_nothing() -> None:
    found = chat(lambda first, second, attempt: "[[A]]").prefer(ROWS, ["a", "b", "c"], ["d", "e", "f"], None)
    assert found.preference.tolist() == [0.5, 0.5, 0.5]
    assert found.figures == {"consistency": 0.0, "first_wins": 1.0, "asked_again": 0}


def test_a_judge_without_bias() -> None:
    judge = chat(lambda first, second, attempt: "[[A]]" if len(first) > len(second) else "[[B]]")
    found = judge.prefer(ROWS, ["aa", "b", "cc"], ["a", "bb", "c"], None)
    assert found.preference.tolist() == [1.0, 0.0, 1.0]
    assert found.figures == {"consistency": 1.0, "first_wins": 0.5, "asked_again": 0}


VERDICTS = {
    "[[A]]": 1.0, "so: [[B]]\n": 0.0, "I thought [[A]], but no.\n\n[[B]]": 0.0, "[[C]]": 0.5, "**[[A]]**": 1.0,
    "[[B]] is wrong; [[D]] is none; [[A]].": 1.0,
    "": None, "A": None, "[A]": None, "[[a]]": None, "[[AB]]": None, "[[A]": None, "[[D]]": None, "[[A or B]]": None,
    "\uff3b\uff3bA\uff3d\uff3d": None, "[[\u0410]]": None, "The first one.": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "preference"), VERDICTS.items())
def test_the_last_verdict_counts_and_nothing_else_is_one(text: str, preference: float | None) -> None:
    other = {1.0: "[[B]]", 0.0: "[[A]]"}.get(
        preference if preference is not None else 2.0, "[[C]]"
    )  # the same, swapped
    found = chat(lambda first, second, attempt: text if first == "x" else other).prefer(ROWS[:1], ["x"], ["y"], None)
    assert found.preference.tolist() == [preference] if preference is not None else np.isnan(found.preference).all()
    assert found.figures["asked_again"] == (preference is None)


def test_who_fails_is_asked_again_once() -> None:
    judge = chat(lambda first, second, attempt: "[[A]]" if second == "y" or attempt else "hm")
    found = judge.prefer(ROWS[:2], ["x", "x"], ["y", "z"], None)
    assert [q.attempt for q in judge.critic.asked] == [0, 0, 0, 0, 1, 1, 1]  # (x, z), (y, x), (z, x)
    assert found.preference.tolist() == [0.5, 0.5]
    assert found.figures["asked_again"] == 3


def test_a_row_without_a_verdict_in_one_order_is_left_out() -> None:
    found = chat(lambda first, second, attempt: None if first == "z" else "[[A]]").prefer(
        ROWS[:2], ["x", "x"], ["y", "z"], None
    )
    assert found.preference[0] == 0.5
    assert np.isnan(found.preference[1])
    assert found.details[1] == {"orders": ["A", None]}
    assert found.figures == {"consistency": 0.0, "first_wins": 1.0, "asked_again": 1}  # of the first row alone


def test_no_verdict_at_all_leaves_the_figures_open() -> None:
    found = chat(lambda first, second, attempt: "hm").prefer(ROWS, ["x"] * 3, ["y"] * 3, None)
    assert np.isnan(found.preference).all()
    assert found.figures == {"consistency": None, "first_wins": None, "asked_again": 6}


def test_what_the_critic_is_told() -> None:
    judge = chat(lambda first, second, attempt: "[[C]]")
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    rows = [{"prompt": "plain"}, {"prompt": turns[:1]}, {"prompt": turns}]
    judge.prefer(rows, ["a", "a", "a"], ["b", "b", "b"], "the account")
    said = [q.messages for q in judge.critic.asked]
    assert said[0] == [{"role": "user", "content": "plain|a|b"}]
    assert [m[0]["content"] for m in said[1:]] == [
        "one|a|b", "user: one\n\nassistant: two\n\nuser: three|a|b",
        "plain|b|a", "one|b|a", "user: one\n\nassistant: two\n\nuser: three|b|a",
    ]  # fmt: skip
    assert judge.critic.asked[0].row is rows[0]
    assert judge.critic.accounts == ["the account"]


def test_a_template_with_another_name_is_refused() -> None:
    judge = ByChat(critic=Program(lambda first, second, attempt: "[[A]]"), prompt=Prompt(template="{{ frist }}"))
    with pytest.raises(UserError, match=r"asks for 'frist'\. Did you mean 'first'\?"):
        judge.prefer(ROWS[:1], ["x"], ["y"], None)


def test_the_shipped_prompt_shows_all_texts_and_every_verdict() -> None:
    settings = yaml.safe_load((conf_dir() / "prompt" / "pairwise.yaml").read_text(encoding="utf-8"))
    assert settings.pop("_target_") == "alignkit.prompt.Prompt"
    (turn,) = Prompt(**settings).messages(instruction="<the task>", first="<one>", second="<two>")
    places = [turn["content"].index(text) for text in ("<the task>", "<one>", "<two>", "[[A]]", "[[B]]", "[[C]]")]
    assert places == sorted(places)
    assert "{" not in turn["content"]
