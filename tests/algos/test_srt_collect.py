"""Data of SRT's stage 1 against the method card (srt.md): parser and filter, independent scores, rounds, asking again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from critical import FIRST, PROMPTS, ask, critical_policy
from running import composed

from alignkit.algos._refine import Improve, instruction, own
from alignkit.algos.srt_collect import SRTCollect
from alignkit.algos.srt_self import SRTSelf
from alignkit.critique import parse
from alignkit.errors import UserError
from alignkit.feedback import Answer, Question
from alignkit.prompt import Prompt

PROMPT = Prompt(template=composed(["+algo=srt_collect", "model=tiny_causal"]).algo.prompt.template)


class Says:
    """A critic that answers by what it is shown, and keeps the questions."""

    def __init__(self, answer: Callable[[Question], str | None]) -> None:
        self.answer, self.asked = answer, []

    def ask(self, questions: list[Question], account: Any) -> list[Answer]:
        self.asked.append(questions)
        return [Answer(self.answer(question)) for question in questions]


def said(score: object, refinement: str, words: str = "w") -> str:
    return f"Weaknesses: {words}\nSuggestions: s\nOverall Score: [[{score}]]\n\n### Improved Response\n{refinement}"


def rows(*drafts: str) -> list[dict[str, Any]]:
    return [
        {"prompt": f"instruction {i}", "draft": draft, "response": None, "references": ["a"], "id": i, "topic": "t"}
        for i, draft in enumerate(drafts)
    ]


def collected(critic: Says, drafts: list[str], **settings: Any) -> list[dict[str, Any]]:
    algo = SRTCollect(critic=critic, prompt=PROMPT, drafts="draft", **settings)
    return algo.refine(None, None, algo.prepare(rows(*drafts)), None, torch.Generator())  # type: ignore[arg-type]


# ---- E3: parser and filter -----------------------------------------------------------------------------------------

PLAIN = "weak: ...\nadvise: ...\nOverall Score: [[6]]\n### Improved Response\nok"
E3 = [
    (PLAIN, 6, 7, None, None),
    (PLAIN, 6, 6, None, "no gain"),
    (PLAIN, 6, 5, "no gain", "no gain"),
    ("weak: ...\nadvise: ...\nOverall Score: [[6]]\nok", 6, 7, "no refinement", "no refinement"),
    ("weak: ...\nadvise: ...\nOverall Score: [[11]]\n### Improved Response\nok", None, 7, "no score", "no score"),
    ("###Overall Score: [[ 8 ]]\n###Improved Response\nok", 8, 9, None, None),
]


@pytest.mark.parametrize(("text", "score", "fresh", "first", "second"), E3)
def test_parser_and_filters_of_the_card(
    text: str, score: int | None, fresh: int, first: str | None, second: str | None
) -> None:
    """E3: stage 1 keeps equal scores, stage 2 asks for a gain."""
    assert parse(text).score == score
    [found] = collected(Says(lambda q: text if q.response == "y" else said(fresh, "again")), ["y"])
    assert found.get("dropped") == first and found["score_response"] == score
    if first is None:
        assert (found["refinement"], found["score_refinement"]) == ("ok", fresh)
    answers = {"y": parse(text), "ok": parse(said(fresh, "again"))}
    algo = SRTSelf()
    [pair] = [
        algo._pair(r) for r in algo.improved(rows("y"), ["y"], lambda _, ts, fields: [answers[t] for t in ts], "self")
    ]
    assert pair.get("dropped") == second
    assert ("chosen" in pair) == (second is None)
    if second is None:
        assert (pair["chosen"], pair["rejected"]) == ("ok", "y")
        assert (pair["score_chosen"], pair["score_rejected"]) == (fresh, score)


@pytest.mark.parametrize(("gain", "kept"), [(-1, [5, 6, 7]), (0, [6, 7]), (1, [7]), (2, [])])
def test_min_gain_is_the_least_gain(gain: int, kept: list[int]) -> None:
    critic = Says(lambda q: said(6, "r" + q.response[1:]) if q.response[0] == "y" else said(q.response[1:], "z"))
    found = collected(critic, ["y5", "y6", "y7"], min_gain=gain)
    assert [row["score_refinement"] for row in found if "dropped" not in row] == kept


def test_a_row_holds_what_stage_1_learns_from() -> None:
    critic = Says(lambda q: said(3, "better", "words") if q.response == "y" else said(9, "z"))
    [found] = collected(critic, ["y"])
    raw = "Weaknesses: words\nSuggestions: s\nOverall Score: [[3]]"
    assert found == {
        "prompt": "instruction 0", "draft": "y", "references": ["a"], "topic": "t", "instruction": "instruction 0",
        "response": "y", "feedback": {"weaknesses": "words", "suggestions": "s", "score": 3, "raw": raw},
        "refinement": "better", "score_response": 3, "score_refinement": 9, "scores": [3, 9], "source": "critic",
    }  # fmt: skip


def test_a_perfect_draft_stays_to_teach_that_nothing_is_to_be_changed() -> None:
    """ToolACE-R (toolace_r.md) keeps what its refinement equals; so does a filter that keeps equal scores."""
    [found] = collected(Says(lambda q: said(10, q.response)), ["y"])
    assert "dropped" not in found and found["refinement"] == found["response"] == "y"


@pytest.mark.parametrize(
    ("draft", "text", "why", "settings"),
    [
        ("", said(3, "r"), "draft empty", {}),
        ("y", "Overall Score: [[3]]\n### Improved Response\nr", "no weaknesses", {"need_fields": True}),
        ("y", "Weaknesses: w\nOverall Score: [[3]]\n### Improved Response\nr", "no suggestions", {"need_fields": True}),
        ("y", said(3, "one\n### Feedback\ntwo"), "marker inside", {}),
        ("one\n### Improved Response\ntwo", said(3, "r"), "marker inside", {}),
    ],
)
def test_what_cannot_be_learned_is_dropped_by_name(draft: str, text: str, why: str, settings: dict) -> None:
    [found] = collected(Says(lambda q: text if q.response == draft else said(9, "z")), [draft], **settings)
    assert found["dropped"] == why


def test_a_refinement_needs_a_score_not_fields() -> None:
    """The fields of the paper's rule 1 are asked of the feedback that is learned; of the fresh critique only its score counts."""
    fresh = "Overall Score: [[9]]\n### Improved Response\nz"
    [found] = collected(Says(lambda q: said(3, "r") if q.response == "y" else fresh), ["y"], need_fields=True)
    assert "dropped" not in found and found["score_refinement"] == 9
    answers = {"y": said(3, "r"), "r": fresh, "z": fresh.replace("9", "10")}
    [found] = collected(Says(lambda q: answers[q.response]), ["y"], need_fields=True, rounds=2)
    assert (found["refinement"], found["scores"]) == ("z", [3, 9, 10])  # and it goes on
    [found] = collected(Says(lambda q: said(3, "r") if q.response == "y" else "fine"), ["y"])
    assert found["dropped"] == "refinement not scored"


# ---- independent scores --------------------------------------------------------------------------------------------


def test_the_question_about_a_refinement_shows_neither_draft_nor_feedback() -> None:
    """Test 3 of the card, on the rendered texts; and it is the question that would be asked of a first answer."""
    critic = Says(lambda q: said(3, "REFINED", "WEAK") if q.response == "DRAFT" else said(9, "z"))
    collected(critic, ["DRAFT"])
    first, fresh = [[m["content"] for m in one.messages] for [one] in critic.asked]
    assert "DRAFT" in first[0] and "REFINED" not in first[0]
    assert "REFINED" in fresh[0] and "instruction 0" in fresh[0]
    assert not any(word in text for word in ("DRAFT", "WEAK", "[[3]]") for text in fresh)
    assert [text.replace("DRAFT", "REFINED") for text in first] == fresh


def test_questions_hold_the_row_and_the_slots_in_their_order() -> None:
    critic = Says(lambda q: said(3, "r"))
    collected(critic, ["y"])
    [[question], _] = critic.asked
    text = question.messages[-1]["content"]
    slots = ["### Instruction\ninstruction 0\n", "### Response\ny\n", "### Requirements\n", "### Feedback\n"]
    assert [text.index(slot) for slot in slots] == sorted(text.index(slot) for slot in slots)
    assert text.endswith("### Feedback\n") and question.row["topic"] == "t" and question.response == "y"


# ---- rounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "kept", "score", "scores"),
    [(1, "r1", 6, [3, 6]), (2, "r2", 8, [3, 6, 8]), (3, "r2", 8, [3, 6, 8, 8]), (4, "r4", 9, [3, 6, 8, 8, 9]), (5, "r4", 9, [3, 6, 8, 8, 9, 2])],
)  # fmt: skip
def test_the_best_round_is_kept_the_earliest_of_equals(rounds: int, kept: str, score: int, scores: list[int]) -> None:
    """Test 8 of the card: refinements r1, r2, … have scores 6, 8, 8, 9, 2; feedback and draft are the first round's."""
    given = dict(zip(["y", "r1", "r2", "r3", "r4", "r5"], [3, 6, 8, 8, 9, 2], strict=True))
    order = [*given, "r6"]
    critic = Says(lambda q: said(given[q.response], order[order.index(q.response) + 1], f"of {q.response}"))
    [found] = collected(critic, ["y"], rounds=rounds)
    assert (found["refinement"], found["score_refinement"], found["scores"]) == (kept, score, scores)
    assert found["response"] == "y" and found["feedback"]["weaknesses"] == "of y" and found["score_response"] == 3
    assert [one.response for [one] in critic.asked] == order[: rounds + 1]


def test_a_round_without_a_refinement_ends_the_chain_and_what_was_scored_stays() -> None:
    answers = {"y": said(3, "r1"), "r1": "Overall Score: [[7]]", "a": said(3, "a1"), "a1": said(2, "a2"), "a2": "?"}
    found = collected(Says(lambda q: answers[q.response]), ["y", "a"], rounds=3, reasks=0)
    assert [(r["refinement"], r["score_refinement"], r["scores"]) for r in found] == [("r1", 7, [3, 7]), ("a1", 2, [3, 2, None])]  # fmt: skip
    assert [r.get("dropped") for r in found] == [None, "no gain"]


# ---- asking again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reasks", [0, 1, 3])
def test_what_cannot_be_read_is_asked_again_a_bounded_number_of_times(reasks: int) -> None:
    critic = Says(lambda q: "no idea" if q.response == "bad" else said(5, q.response))
    found = collected(critic, ["good", "bad", "fine"], reasks=reasks)
    assert [r.get("dropped") for r in found] == [None, "no score", None]
    about = [(q.response, q.attempt) for asked in critic.asked for q in asked]
    assert about[:3] == [("good", 0), ("bad", 0), ("fine", 0)]
    assert about[3 : 3 + reasks] == [("bad", k) for k in range(1, reasks + 1)]
    assert about[3 + reasks :] == [("good", 0), ("fine", 0)]  # of their refinements
    bad = [q for asked in critic.asked for q in asked if q.response == "bad"]
    assert all(q.messages == bad[0].messages for q in bad)


def test_an_answer_on_the_second_attempt_counts() -> None:
    critic = Says(lambda q: None if (q.response, q.attempt) == ("b", 0) else said(5, f"{q.response}!"))
    found = collected(critic, ["a", "b"])
    assert [r["refinement"] for r in found] == ["a!", "b!"] and not any("dropped" in r for r in found)
    assert found[1]["instruction"] == "instruction 1"  # each answer belongs to its own row


def test_a_score_that_was_given_is_not_lost_by_asking_again() -> None:
    """A critic that finds nothing to improve gives a score alone; asked again, it may say nothing at all."""
    critic = Says(lambda q: said(5, "r") if q.response == "y" else None if q.attempt else "Overall Score: [[9]]")
    [found] = collected(critic, ["y"])
    assert "dropped" not in found and found["score_refinement"] == 9


# ---- drafts --------------------------------------------------------------------------------------------------------


def test_drafts_are_the_policys_own_cut_at_the_marker() -> None:
    """The model of the tests goes on to criticise itself, which is no part of a draft."""
    algo = SRTCollect(critic=Says(lambda q: said(5, q.response)), prompt=PROMPT, temperature=0.05, max_new_tokens=60)
    assert algo.needs_policy
    found = algo.refine(critical_policy(), None, ask(), None, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert [row["response"] for row in found] == FIRST
    assert [row["instruction"] for row in found] == PROMPTS


def test_a_missing_draft_is_named_before_the_critic_is_asked() -> None:
    critic = Says(lambda q: said(5, "r"))
    algo = SRTCollect(critic=critic, prompt=PROMPT, drafts="draft")
    assert not algo.needs_policy
    data = rows("y", "y", "y")
    del data[2]["draft"]
    with pytest.raises(UserError, match=r"row 2 has no text in column 'draft', which algo\.drafts asks for"):
        algo.prepare(data)
    assert not critic.asked


def test_a_chat_is_asked_about_by_its_user_turn() -> None:
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U1"}]
    assert instruction({"prompt": chat}) == "U1"
    with pytest.raises(UserError, match="row 7 is a chat with 2 user turns"):
        instruction({"prompt": [*chat, {"role": "assistant", "content": "A"}, *chat], "id": 7})
    with pytest.raises(UserError, match="0 user turns"):
        instruction({"prompt": chat[:1], "id": 7})


def test_who_refuses_is_not_asked_again_and_the_reason_is_counted() -> None:
    critic = Refuses("filtered", "refused: 400: too long", "malformed")
    found = collected(critic, ["a", "b", "c"])
    assert [row["dropped"] for row in found] == ["filtered", "refused", "malformed"]
    assert critic.asked == ["a", "b", "c", "c"]  # what was broken may come whole


class Refuses:
    """Gives no text, for a reason by response."""

    def __init__(self, *why: str) -> None:
        self.why, self.asked = dict(zip("abc", why, strict=True)), []

    def ask(self, questions: list[Question], account: Any) -> list[Answer]:
        self.asked += [q.response for q in questions]
        return [Answer(None, self.why[q.response]) for q in questions]


def test_half_a_rewrite_is_none() -> None:
    class Cut:
        def ask(self, questions: list[Question], account: Any) -> list[Answer]:
            return [Answer(said(5, "half of a"), cut=True) for _ in questions]

    [found] = collected(Cut(), ["y"])
    assert found["dropped"] == "no refinement" and found["score_response"] == 5


def test_columns_that_a_run_before_has_written_do_not_count_for_this_one() -> None:
    """A row may come from a file with a column of this name, or from a run of another method."""
    old = {"dropped": "no gain", "score": "high", "score_chosen": 1, "score_response": 2, "chosen": "c", "topic": "t"}
    assert own({"prompt": "p", "id": 3, "response": "r", **old}) == {"prompt": "p", "topic": "t"}


@pytest.mark.parametrize(
    "wrong", [{"rounds": 0}, {"min_gain": -10}, {"rows_per_part": 0}, {"temperature": 0.0}, {"max_new_tokens": 0}]
)
def test_ranges(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Improve(**wrong)
    with pytest.raises(ValueError, match="reasks"):
        SRTCollect(critic=Says(str), prompt=PROMPT, reasks=-1)  # type: ignore[arg-type]
