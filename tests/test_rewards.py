"""Rewards: against sacrebleu, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sacrebleu import sentence_bleu, sentence_chrf

from alignkit.batch import Batch
from alignkit.errors import UserError
from alignkit.rewards.metric import ChrF, ExactMatch, SentenceBLEU
from alignkit.rewards.mix import Mix
from alignkit.rewards.rule import Answer, Constant, Length, Slots, values


def batch(*pairs: tuple[str, dict[str, Any]], lengths: list[int] | None = None) -> Batch:
    """Responses with their rows, one group each."""
    n = len(pairs)
    width = max(lengths or [1])
    mask = torch.tensor([[t < k for t in range(width)] for k in (lengths or [1] * n)])
    ones = torch.ones(n, 1, dtype=torch.long)
    rows = [{"id": i, "references": [], **row} for i, (_, row) in enumerate(pairs)]
    return Batch(
        ones, ones.bool(), torch.ones(n, width, dtype=torch.long), mask, torch.arange(n), rows, [y for y, _ in pairs]
    )


REFERENCES = ["the cat sat on the mat", "a cat is on the mat"]
RESPONSES = ["the cat sat on the mat", "a cat sat", "", "dogs run fast over there", "the the the the"]


def test_bleu_and_chrf_are_sacrebleus_sentence_scores() -> None:
    rows = batch(*((y, {"references": REFERENCES}) for y in RESPONSES))
    bleu = [sentence_bleu(y, REFERENCES, use_effective_order=True).score / 100 for y in RESPONSES]
    assert SentenceBLEU()(rows).tolist() == pytest.approx(bleu)
    assert bleu[0] == pytest.approx(1)
    assert 0 < bleu[1] < 1
    chrf = [sentence_chrf(y, REFERENCES).score / 100 for y in RESPONSES]
    assert ChrF()(rows).tolist() == pytest.approx(chrf)


def test_smoothing_is_a_setting() -> None:
    rows = batch(("a cat ran", {"references": REFERENCES}))
    add1 = (
        sentence_bleu("a cat ran", REFERENCES, smooth_method="add-k", smooth_value=1, use_effective_order=True).score
        / 100
    )
    assert float(SentenceBLEU(smooth="add-k", smooth_value=1)(rows)[0]) == pytest.approx(add1)
    assert float(SentenceBLEU()(rows)[0]) != pytest.approx(add1)


def test_exact_match_takes_any_reference() -> None:
    rows = batch((REFERENCES[1], {"references": REFERENCES}), ("a cat", {"references": REFERENCES}))
    assert ExactMatch()(rows).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("reward", [SentenceBLEU(), ChrF(), ExactMatch()])
def test_a_row_without_references_is_named(reward: Any) -> None:
    with pytest.raises(UserError, match=r"row 1 has no references"):
        reward(batch(("a", {"references": ["a"]}), ("a", {})))


def test_length_falls_with_the_distance_to_the_target() -> None:
    rows = batch(("a b c d", {}), ("a b", {}), ("a", {}), lengths=[10, 5, 25])
    assert Length(target=10)(rows).tolist() == [1.0, 0.5, 0.0]
    assert Length(target=2, unit="words")(rows).tolist() == [0.0, 1.0, 0.5]
    assert Length(target=3, unit="characters")(rows).tolist() == pytest.approx([0.0, 1.0, 1 / 3])


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("51", "51", 1.0),
        ("65-14=51", "51", 1.0),  # the working before it does not count
        ("65-14=52", "51", 0.0),
        ("65-14=51=", "51", 1.0),
        ("65-14", "14", 1.0),  # this minus is an operation
        ("65-14", "-14", 0.0),
        ("3-9=-6", "-6", 1.0),
        ("3-9=6", "-6", 0.0),
        ("3-9=-6", "6", 0.0),
        ("(-4)-6", "6", 1.0),
        ("8--6", "-6", 1.0),
        ("", "51", 0.0),
        ("I do not know.", "0", 0.0),
        ("so it is 51.", "51", 1.0),
        ("51 apples are left, I think", "51", 1.0),
        ("51 or 52", "51", 0.0),
        ("51", "the working #### 51", 1.0),
        ("051", "51", 1.0),
        ("1,024 and no cents", "1024", 1.0),
        ("1024.00", "1,024", 1.0),
        ("1,2", "12", 0.0),  # a list, not thousands
        ("1,2", "2", 1.0),
        ("0.5", "5", 0.0),
        ("51", 51, 1.0),
        ("-0.5", -0.5, 1.0),
    ],
)
def test_answer(response: str, answer: Any, score: float) -> None:
    assert Answer()(batch((response, {"answer": answer}))).tolist() == [score]


def test_answer_takes_each_row_by_itself_and_any_column() -> None:
    rows = batch(("1", {"sum": "1"}), ("1", {"sum": "2"}), ("2", {"sum": "2"}))
    assert Answer(column="sum")(rows).tolist() == [1.0, 0.0, 1.0]


def test_answer_names_a_row_that_it_cannot_use() -> None:
    with pytest.raises(UserError, match=r"row 1 has no column 'answer'.* Did you mean 'answers'\? Set reward\.column"):
        Answer()(batch(("1", {"answer": "1"}), ("1", {"answers": "1"})))
    for value in ("none", "", None):
        with pytest.raises(UserError, match=r"row 0: column 'answer' holds no number .*"):
            Answer()(batch(("1", {"answer": value})))


ACT = "inform(name='alamo square seafood grill';near='alamo square';phone='4155512345';kidsallowed=dont_care;type=restaurant)"


def test_the_values_to_say_are_distinct_and_longest_first() -> None:
    assert values(ACT) == ("alamo square seafood grill", "alamo square", "4155512345")
    assert values("goodbye()") == ()
    assert values("inform(name=nopa;near=nopa)") == ("nopa",)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("alamo square seafood grill near alamo square has phone 4155512345", 1.0),
        ("alamo square seafood grill has phone 4155512345", 2 / 3),  # the area is only said inside the name
        ("alamo square seafood grill near alamo square alamo square : 4155512345", 2 / 3),  # repeated
        ("alamo square seafood grill near alamo square : 4155512345 or 94110", 2 / 3),  # invented number
        ("dont_care", 0.0),
        ("", 0.0),
    ],
)
def test_slots(response: str, score: float) -> None:
    assert float(Slots()(batch((response, {"da": ACT})))[0]) == pytest.approx(score)


def test_an_act_without_values_scores_one() -> None:
    assert Slots()(batch(("goodbye", {"da": "goodbye()"}))).tolist() == [1.0]


def test_mix_is_a_weighted_sum() -> None:
    mix = Mix(rewards={"a": Constant(value=2), "b": Length(target=1)}, weights={"a": 0.5, "b": 2.0})
    assert mix(batch(("x", {}))).tolist() == [3.0]
    with pytest.raises(ValueError, match="different parts"):
        Mix(rewards={"a": Constant()}, weights={"b": 1.0})
