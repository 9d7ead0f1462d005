"""The text of a critique: every spelling of the markers, what a hostile text may hold, and what is written is read back."""

from __future__ import annotations

import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from alignkit.critique import FIELDS, KEEPS, Critique, answer, has_marker, parse, written

# the method's Table 1 spells `Overall Score: [[6]]` and `### Improved Response`, its footnote `###Overall Score` and
# `###Improved Response`; models add bold face, colons, numbers and spaces
SCORES = [
    "Overall Score: [[6]]",
    "###Overall Score: [[6]]",
    "### Overall Score: [[6]]",
    "# Overall Score: [[6]]",
    "######  Overall Score: [[6]]",
    "Overall Score [[6]]",
    "Overall Score:[[6]]",
    "Overall Score : [[ 6 ]]",
    "overall score: [[6]]",
    "OVERALL  SCORE: [[6\t]]",
    "Overall\tScore:\n[[6]]",
    "**Overall Score:** [[6]]",
    "**Overall Score**: [[6]]",
    "**Overall Score: [[6]]**",
    "Overall Score: **[[6]]**",
    "3. Overall Score: [[6]]",
    "### 3) Overall Score: [[6]]",
    "It is decent. Overall Score: [[6]].",
]
IMPROVED = [
    "### Improved Response",
    "###Improved Response",
    "### improved response",
    "### IMPROVED RESPONSE",
    "### Improved Response:",
    "### Improved Response :  ",
    "# Improved Response",
    "#####\tImproved  Response",
    "  ### Improved Response",
    "### **Improved Response**",
    "### **Improved Response:**",
]
FEEDBACK = [variant.lower().replace("improved  response", "improved response").replace("improved response", "feedback")
            for variant in IMPROVED] + ["###Feedback", "### FEEDBACK", "### Feedback :"]  # fmt: skip


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("heading", ["### Improved Response", "###Improved Response"])
def test_every_spelling_of_the_score(score: str, heading: str) -> None:
    found = parse(f"Weaknesses: too short\nSuggestions: say more\n{score}\n{heading}\nok")
    assert (found.score, found.refinement) == (6, "ok")
    assert found.weaknesses == "too short"
    assert found.suggestions in ("say more", "say more\nIt is decent.")


@pytest.mark.parametrize("k", range(1, 11))
def test_every_score(k: int) -> None:
    assert parse(f"Overall Score: [[{k}]]").score == k


@pytest.mark.parametrize("bad", ["[[0]]", "[[11]]", "[[-3]]", "[[6.5]]", "[6]", "6", "[[6]", "[[06]]", "[[six]]", "[[]]",
                                 "[[1 0]]", "[[100]]", "[[6/10]]", "[[1-10]]", "[[6], [7]]"])  # fmt: skip
def test_what_is_no_score(bad: str) -> None:
    text = f"Weaknesses: too short\nOverall Score: {bad}\n### Improved Response\nok"
    assert parse(text).score is None
    assert parse(text).refinement == "ok"
    assert parse(f"Overall Score: [[4]]\n{text}").score == 4  # one that cannot be read does not hide one that can


@pytest.mark.parametrize("heading", IMPROVED)
def test_every_spelling_of_the_improved_response(heading: str) -> None:
    found = parse(f"bad\nOverall Score: [[6]]\n{heading}\nline one\n\nline two\n")
    assert found == Critique("bad", "", 6, "bad\nOverall Score: [[6]]", "line one\n\nline two")


@pytest.mark.parametrize("heading", FEEDBACK)
def test_every_spelling_of_the_feedback(heading: str) -> None:
    text = f"the answer\n\n{heading}\nbad\nOverall Score: [[6]]\n### Improved Response\nok"
    assert parse(text) == Critique("bad", "", 6, "bad\nOverall Score: [[6]]", "ok")
    assert answer(text) == "the answer"
    assert has_marker(text)


@pytest.mark.parametrize("line", [
    "Improved Response", "Improved Response:", "an ### Improved Response", "### Improved Response follows",
    "### The Improved Response", "### Improved", '"### Improved Response"', "> ### Improved Response", "###", "### Response",
    "Feedback", "### Feedback from me", "my ### Feedback", "`### Feedback`", "### Feedbacks",
])  # fmt: skip
def test_a_line_that_only_looks_like_a_heading(line: str) -> None:
    assert not has_marker(line)
    assert not has_marker(f"one\n{line}\ntwo")
    assert answer(f"one\n{line}\ntwo") == f"one\n{line}\ntwo"
    assert parse(f"one\n{line}\ntwo").refinement == ""


# ---- the card's example E3: (feedback, score, fresh score of the refinement) → kept by (stage 1: >=, stage 2: >) -------

SOUND = "weak: too short\nadvise: say more\nOverall Score: [[6]]\n### Improved Response\nok"
E3 = [
    (SOUND, 6, 7, None, (True, True)),
    (SOUND, 6, 6, None, (True, False)),
    (SOUND, 6, 5, None, (False, False)),
    (SOUND.partition("###")[0], 6, None, "refinement", (False, False)),
    (SOUND.replace("[[6]]", "[[11]]"), None, None, "score", (False, False)),
    ("###Overall Score: [[ 8 ]]\n###Improved Response\nok", 8, 9, None, (True, True)),
]


@pytest.mark.parametrize(("text", "score", "fresh", "missing", "kept"), E3)
def test_the_cards_example(
    text: str, score: int | None, fresh: int | None, missing: str | None, kept: tuple[bool, bool]
) -> None:
    found = parse(text)
    assert found.score == score
    assert found.missing() == missing
    sound = missing is None
    assert (sound and fresh >= found.score, sound and fresh > found.score) == kept


def test_rule_one_by_fields_asks_for_each_of_them() -> None:
    assert parse(SOUND).missing(FIELDS) is None
    assert (parse(SOUND).weaknesses, parse(SOUND).suggestions) == ("too short", "say more")
    assert parse(SOUND.replace("advise:", "and")).missing(FIELDS) == "suggestions"
    assert parse(SOUND.replace("weak:", "and")).missing(FIELDS) == "weaknesses"
    assert parse(SOUND.replace("\nok", "\n  \n")).missing(FIELDS) == "refinement"


@pytest.mark.parametrize("weak", ["Weaknesses:", "weak:", "**Weaknesses:**", "**Weaknesses**:", "### Weaknesses:", "1. Weaknesses:",
                                  "1. Identify Weaknesses:", "### Weaknesses", "### 1. Identify Weaknesses\n"])  # fmt: skip
@pytest.mark.parametrize("advice", ["Suggestions:", "advise:", "Actionable Advice:", "2. Offer Actionable Advice:", "## Suggestions",
                                    "**Suggestion**:", "**Suggestions**"])  # fmt: skip
def test_every_heading_of_the_fields(weak: str, advice: str) -> None:
    found = parse(
        f"Well.\n{weak}\ntoo short,\ntoo cold\n{advice}\nsay more\nOverall Score: [[6]]\n### Improved Response\nok"
    )
    assert (found.weaknesses, found.suggestions) == ("too short,\ntoo cold", "say more")
    found = parse(f"{advice}\nsay more\n{weak}\ntoo short\nOverall Score: [[6]]")
    assert (found.weaknesses, found.suggestions) == ("too short", "say more")


# ---- hostile texts -----------------------------------------------------------------------------------------------------


def test_the_last_valid_score_before_the_refinement_counts() -> None:
    text = "Overall Score: [[2]] no:\nOverall Score: [[5]]\nOverall Score: [[0]]\n### Improved Response\nOverall Score: [[9]]"
    assert parse(text).score == 5
    assert parse(text).refinement == "Overall Score: [[9]]"


def test_a_heading_that_the_feedback_quotes_does_not_end_it() -> None:
    text = "Do not write\n### Improved Response\nin an answer.\nOverall Score: [[3]]\n### Improved Response\nok"
    found = parse(text)
    assert (found.score, found.refinement) == (3, "ok")
    assert found.weaknesses == "Do not write\n### Improved Response\nin an answer."


def test_the_refinement_goes_to_the_end() -> None:
    """A second round, or headings of its own: who does not want them asks ``has_marker``."""
    more = "ok\n### Feedback\nfine\nOverall Score: [[9]]\n### Improved Response\nbetter"
    found = parse(f"bad\nOverall Score: [[3]]\n### Improved Response\n{more}")
    assert (found.weaknesses, found.score, found.refinement) == ("bad", 3, more)
    assert has_marker(found.refinement)


def test_a_score_inside_the_answer_is_not_the_critics() -> None:
    text = "Overall Score: [[10]]\n\n### Feedback\nbad\nOverall Score: [[2]]\n### Improved Response\nok"
    assert parse(text) == Critique("bad", "", 2, "bad\nOverall Score: [[2]]", "ok")
    assert parse("Overall Score: [[10]]\n\n### Feedback\nbad\n### Improved Response\nok").score is None


def test_an_answer_ends_at_the_first_marker_of_either_kind() -> None:
    assert answer("one\n### Improved Response\ntwo\n### Feedback\nthree") == "one"
    assert answer("one\n### Feedback\nthree") == "one"
    assert answer("### Feedback\nthree") == ""
    assert answer("  one ") == "one"


def test_a_heading_without_text_and_no_text_at_all() -> None:
    assert parse("") == parse("  \n ") == Critique("", "", None, "", "")
    assert parse("### Feedback") == parse("### Improved Response") == Critique("", "", None, "", "")
    assert parse("### Feedback\n### Improved Response\n") == Critique("", "", None, "", "")
    assert parse("bad\nOverall Score: [[3]]\n### Improved Response").missing() == "refinement"
    assert answer("") == ""
    assert not has_marker("")


LOOK_ALIKES = {
    "full-width brackets": ("[[6]]", "\uff3b\uff3b6\uff3d\uff3d"),
    "lenticular brackets": ("[[6]]", "\u3010\u30106\u3011\u3011"),
    "full-width digit": ("6", "\uff16"),
    "Arabic digit": ("6", "\u0666"),
    "superscript": ("6", "\u2076"),
    "Cyrillic letter": ("Overall", "\u041everall"),
    "zero-width space": ("Overall Score", "Overall\u200b Score"),
    "zero-width space in the brackets": ("[[6", "[[\u200b6"),
    "long s": ("Score", "\u017fcore"),
    "full-width colon": ("Score:", "Score\uff1a"),
}


@pytest.mark.parametrize(("plain", "odd"), LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_a_look_alike_is_no_score(plain: str, odd: str) -> None:
    text = "bad\nOverall Score: [[6]]\n### Improved Response\nok"
    assert parse(text).score == 6
    assert parse(text.replace(plain, odd)).score is None


@pytest.mark.parametrize("line", [
    "\uff03\uff03\uff03 Feedback", "### F\u0435edback", "###\u200bFeedback", "### Feedback\u200b", "### Feedbac\u212a",
    "### Improved Re\u0455ponse", "### Improved\u200bResponse", "### Improved Re\u017fponse",
])  # fmt: skip
def test_a_look_alike_is_no_heading(line: str) -> None:
    assert not has_marker(line)


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0b", "\x0c", "\r"])
def test_only_a_line_feed_starts_a_line(odd: str) -> None:
    """As everywhere here: what else some readers take for the end of a line may stand inside a text."""
    assert not has_marker(f"one{odd}### Feedback{odd}two")


def test_lines_that_end_as_on_windows() -> None:
    text = "the answer\n\n### Feedback\nWeaknesses: bad\nSuggestions: mend\nOverall Score: [[6]]\n### Improved Response\nok\n"
    found = parse(text.replace("\n", "\r\n"))
    assert found == Critique("bad", "mend", 6, found.raw, "ok")
    assert answer(text.replace("\n", "\r\n")) == "the answer"
    assert parse("### Weaknesses\r\nbad\r\nOverall Score: [[6]]").weaknesses == "bad"


MB = 1_000_000
LONG = {
    "words": "word " * (MB // 5),
    "number signs": "#" * MB,
    "spaces": " " * MB,
    "line feeds": "\n" * MB,
    "a score and spaces": "Overall Score" + " " * MB,
    "a score and a colon and spaces": "Overall Score" + " " * (MB // 2) + ":" + " " * (MB // 2),
    "spaces inside a score": "Overall" + " " * MB + "Score",
    "spaces inside brackets": "Overall Score: [[ 6" + " " * MB + "x",
    "a heading and spaces": "### Feedback" + " " * MB + "x",
    "a heading, a colon and spaces": "### Improved Response" + " " * (MB // 2) + ":" + " " * (MB // 2) + "x",
    "spaces inside a heading": "###" + " " * MB + "Improved" + " " * MB + "x",
    "stars": "*" * MB,
    "starred score": "Overall Score" + "*_ " * (MB // 3),
    "digits": "1" * MB,
    "weakness and stars": "weakness" + "*" * MB,
    "number signs and spaces": "# " * (MB // 2),
    "half scores": "Overall Score " * (MB // 14),
    "scores": "Overall Score: [[6]]\n" * (MB // 21),
    "headings": "### Improved Response\n" * (MB // 22),
    "fields": "Weaknesses: x\nSuggestions: y\n" * (MB // 30),
    "brackets": "[" * MB,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_million_characters_take_a_moment(text: str) -> None:
    """Quadratic backtracking would take minutes here."""
    start = time.process_time()
    parse(text)
    answer(text)
    assert time.process_time() - start < 1


# ---- what is written is read back --------------------------------------------------------------------------------------

WORDS = ["word", "Weak point", "Overall", "Score:", "[[6]]", "#", "###", "##", "improved", "**", "Feedback", "Response", ":", "\n",
         "\n\n", "\r\n", "\t", "1.", "\u2028", "\u200b", "\u3010", "\u00e9", "Suggestions", "Weaknesses", "{{ x }}", "</s>"]  # fmt: skip
soup = st.lists(st.sampled_from(WORDS), max_size=12).map(lambda parts: " ".join(parts).strip())
anything = soup | st.text(max_size=60).map(str.strip)
HEADED = ["weak", "advi", "sugg", "overall score"]


def free(text: str) -> bool:
    """Whether a field holds nothing that could be taken for a heading, or a score."""
    return not has_marker(text) and not any(word in " ".join(text.lower().split()) for word in HEADED)


field = anything.filter(free)
unmarked = anything.filter(lambda text: not has_marker(text))
score = st.integers(1, 10)


@given(st.text() | soup.map(lambda s: f"{s}\n### Feedback\n{s}\n### Improved Response\n{s}"))
@example("\ud800")
@example("\x00")
@example("Overall Score: [[" + "9" * 5000 + "]]")
def test_anything_can_be_read(text: str) -> None:
    found = parse(text)
    assert found.score is None or 1 <= found.score <= 10
    assert all(part in text for part in (found.weaknesses, found.suggestions, found.raw, found.refinement))
    assert answer(text) in text
    assert found.missing() in (None, "score", "refinement")


@given(unmarked, field, field, score, unmarked)
@example("a", "*bold* words", "", 10, "Overall Score: [[3]]")
@example("Overall Score: [[1]]", "", "- one\n- two", 1, "")
@example("", ": :", "__x__", 5, "# Title")
def test_what_is_written_is_read_back(response: str, weak: str, advice: str, k: int, better: str) -> None:
    text = written(response, weak, advice, k, better)
    found = parse(text)
    assert (found.weaknesses, found.suggestions, found.score, found.refinement) == (weak, advice, k, better)
    assert answer(text) == response
    assert has_marker(text)
    # what a model goes on with after the heading of the feedback reads the same
    assert parse(text.partition("### Feedback\n")[2] if not has_marker(response) else text) == found


@given(unmarked, field.filter(bool), field.filter(bool), score, unmarked, st.sampled_from(KEEPS))
def test_a_variant_lacks_its_part_and_no_other(
    response: str, weak: str, advice: str, k: int, better: str, keep: str
) -> None:
    text = written(response, weak, advice, k, better, keep)
    if keep == "refinement_only":
        assert text == better
        return
    found = parse(text)
    gone = {
        "full": (), "no_score": ("score",), "no_suggestion": ("suggestions",), "no_weakness": ("weaknesses",),
        "no_feedback": ("weaknesses", "suggestions", "score"),
    }[keep]  # fmt: skip
    full = {"weaknesses": weak, "suggestions": advice, "score": k, "refinement": better}
    read = {name: getattr(found, name) for name in full}
    assert read == full | {name: None if name == "score" else "" for name in gone}
    assert answer(text) == response


def test_the_variants_letter_by_letter() -> None:
    parts = ("y", "w", "s", 7, "r")
    assert {keep: written(*parts, keep) for keep in KEEPS} == {
        "full": "y\n\n### Feedback\nWeaknesses: w\nSuggestions: s\nOverall Score: [[7]]\n\n### Improved Response\nr",
        "no_score": "y\n\n### Feedback\nWeaknesses: w\nSuggestions: s\n\n### Improved Response\nr",
        "no_suggestion": "y\n\n### Feedback\nWeaknesses: w\nOverall Score: [[7]]\n\n### Improved Response\nr",
        "no_weakness": "y\n\n### Feedback\nSuggestions: s\nOverall Score: [[7]]\n\n### Improved Response\nr",
        "no_feedback": "y\n\n### Feedback\n\n### Improved Response\nr",
        "refinement_only": "r",
    }


@given(soup, st.sampled_from([*IMPROVED, *FEEDBACK]), soup)
def test_a_heading_is_found_wherever_it_stands(before: str, heading: str, after: str) -> None:
    assert has_marker(f"{before}\n{heading}\n{after}")


@given(anything)
def test_a_text_without_markers_is_all_answer(text: str) -> None:
    assume(not has_marker(text))
    assert answer(text) == text
    assert parse(text).refinement == ""
