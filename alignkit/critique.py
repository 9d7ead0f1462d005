"""The text of a critique: an answer, what is said about it, its score, and a better answer; written and read back.

The literal markers are those of SRT (arXiv 2406.07168, Table 1), whose prompt and post-filter spell them differently; so
they are read tolerantly. How the authors tell weaknesses from suggestions is not stated: here by a heading of each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FEEDBACK = "### Feedback"
IMPROVED = "### Improved Response"
KEEPS = ("full", "no_score", "no_suggestion", "no_weakness", "no_feedback", "refinement_only")  # Table 6

_FLAGS = re.MULTILINE | re.IGNORECASE | re.ASCII
# bold face, numbers and number signs stand around the words as models like to have them; a text may be long and hostile, so
# what is repeated is possessive (++, *+): no way of reading it is tried twice
_SCORE = re.compile(
    r"(?:^[#*_ \t]*+(?:\d++[.)])?[#*_ \t]*+|(?<!#)#++[ \t]*+)?"
    r"Overall\s++Score[\s*_]*+:?[\s*_]*+\[\[\s*+(10|[1-9])\s*+\]\][*_]*+",
    _FLAGS,
)
_LINE = r"^[ \t]*+#++[ \t*_]*+{words}[ \t*_]*+:?[ \t*_]*+\r?$"
_IMPROVED = re.compile(_LINE.format(words=r"Improved[ \t]++Response"), _FLAGS)
_FEEDBACK = re.compile(_LINE.format(words="Feedback"), _FLAGS)
# of a field: a colon behind the words, or a line of their own
_HEADING = r"^[ \t#*_-]*+(?:\d++[.)][ \t*_]*+)?(?:{words})[*_]*+[ \t]*+(?::[*_]*+|\r?$)"
_WEAKNESSES = re.compile(_HEADING.format(words=r"(?:identif(?:y|ied)[ \t]++)?weak(?:ness(?:es)?)?"), _FLAGS)
_SUGGESTIONS = re.compile(
    _HEADING.format(words=r"(?:offer[ \t]++)?(?:actionable[ \t]++)?(?:advi[cs]e|suggestions?)"), _FLAGS
)


KEYWORDS = ("score", "refinement")  # what the paper's post-filter looks for
FIELDS = (*KEYWORDS, "weaknesses", "suggestions")  # what its rule 1 asks for besides, each under its heading


@dataclass(frozen=True)
class Critique:
    """What a critic says of a response; a part that it does not write is empty, or None."""

    weaknesses: str
    suggestions: str
    score: int | None  # 1 to 10
    raw: str  # the feedback as it was written, without its headings
    refinement: str  # empty where the text was cut, too: half a refinement is none
    why: str = ""  # why nothing was said at all

    def missing(self, parts: tuple[str, ...] = KEYWORDS) -> str | None:
        """The first of these parts that is not there, or why nothing is; None where all are."""
        return next((self.why or name for name in parts if not getattr(self, name)), None)


def parse(text: str, cut: bool = False) -> Critique:
    """What comes after ``### Feedback``, or with it, taken apart; anything is accepted, and what is not found is empty.

    ``cut``: the text ended at a limit of tokens, so its refinement is not whole and does not count.

    The score is the last valid one before the refinement, which begins at the first heading for it that follows a score (at
    the first of all, where none does): a heading that the feedback quotes does not end it.
    """
    begin = _FEEDBACK.search(text)
    headings = list(_IMPROVED.finditer(text))
    if begin and not (headings and headings[0].start() < begin.start()):
        text = text[begin.end() :]
        headings = list(_IMPROVED.finditer(text))
    scored = _SCORE.search(text)
    later = [h for h in headings if scored and h.start() >= scored.end()]
    heading = next(iter(later or headings), None)
    raw, refinement = (text[: heading.start()], text[heading.end() :]) if heading else (text, "")
    scores = _SCORE.findall(raw)
    weaknesses, suggestions = _fields(raw)
    refinement = "" if cut else refinement.strip()
    return Critique(weaknesses, suggestions, int(scores[-1]) if scores else None, raw.strip(), refinement)


def _fields(feedback: str) -> tuple[str, str]:
    """The texts under the headings of weaknesses and suggestions, each up to the next heading or the score.

    Without either heading all before the score counts as weaknesses.
    """
    found = {"w": _WEAKNESSES.search(feedback), "s": _SUGGESTIONS.search(feedback)}
    scores = list(_SCORE.finditer(feedback))
    if not any(found.values()):
        return (feedback[: scores[-1].start()] if scores else feedback).strip(), ""
    starts = sorted([m.start() for m in found.values() if m] + [m.start() for m in scores] + [len(feedback)])
    texts = {}
    for name, match in found.items():
        end = next((s for s in starts if match and s >= match.end()), 0)
        texts[name] = feedback[match.end() : end].strip() if match else ""
    return texts["w"], texts["s"]


def has_marker(text: str) -> bool:
    """Whether a text holds a heading that would end it, were it part of a sequence."""
    return bool(_FEEDBACK.search(text) or _IMPROVED.search(text))


def written(response: str, weaknesses: str, suggestions: str, score: int, refinement: str, keep: str = "full") -> str:
    """The sequence that a model learns to write: answer, feedback, better answer.

    Args:
        keep: which parts of the feedback stay (Table 6 of the paper); ``refinement_only`` is the better answer alone.
    """
    if keep == "refinement_only":
        return refinement
    said = feedback(weaknesses, suggestions, score, keep)
    return f"{response}\n\n{FEEDBACK}\n{said + chr(10) if said else ''}\n{IMPROVED}\n{refinement}"


def feedback(weaknesses: str, suggestions: str, score: int, keep: str = "full") -> str:
    """The feedback between the two headings, one line or more a part; an empty part has no line."""
    parts = {
        "no_weakness": weaknesses and f"Weaknesses: {weaknesses}",
        "no_suggestion": suggestions and f"Suggestions: {suggestions}",
        "no_score": f"Overall Score: [[{score}]]",
    }
    return (
        "" if keep == "no_feedback" else "\n".join(text for without, text in parts.items() if text and without != keep)
    )


def answer(text: str) -> str:
    """The first answer in what a model wrote: all before the first marker."""
    starts = [marker.start() for marker in (_FEEDBACK.search(text), _IMPROVED.search(text)) if marker]
    return text[: min(starts, default=len(text))].strip()
