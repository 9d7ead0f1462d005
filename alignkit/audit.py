"""Whether the reward is being gamed: measures beside it, and alarms on what has moved too far from the start."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from sacrebleu.metrics import CHRF

from alignkit.batch import Batch
from alignkit.config import AuditSettings
from alignkit.rewards import Reward, scores_of

N = 3  # tokens or words of an n-gram in `repetition` and `copied`: what shares three in a row is no accident
REFERRED = 16  # prompts a step whose response is held against references: chrF takes half of the audit's time
WORD = re.compile(r"\w+|[^\w\s]")
CHRF_SCORE = CHRF()
SAYS = {  # alarm → the measure that it watches, and how that is called
    "length": ("length", "the mean length of a response, in tokens,"),
    "repetition": ("repetition", "the share of a response's token 3-grams that repeat"),
    "diversity": ("distinct_2", "the share of token bigrams, over all prompts, that differ"),
    "copy": ("copy", "the share of a response's word 3-grams that stand in the prompt"),
    "reference": ("reference", "chrF against the references"),
    "second": ("second", "the second reward"),
}

Values = dict[str, list[float]]  # measure → a value of each prompt


# ---- measures --------------------------------------------------------------------------------------------------------


def ngrams(items: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    """All runs of ``n`` items in order; none where there are fewer items."""
    return list(zip(*(items[i:] for i in range(n)), strict=False))


def repetition(ids: Sequence[int]) -> float:
    """Share of a response's 3-grams of tokens that stand earlier in it too, 0 to 1; 0 below three tokens."""
    grams = ngrams(ids, N)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(responses: list[list[int]], n: int) -> float:
    """Different n-grams of tokens over all n-grams of the responses together, 0 to 1; 1 where there are none."""
    grams = [gram for ids in responses for gram in ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks."""
    return WORD.findall(text.lower())


def copied(response: str, prompt: set[tuple[str, ...]]) -> float:
    """Share of a response's 3-grams of words that are among the prompt's, 0 to 1; 0 below three words."""
    grams = ngrams(words(response), N)
    return sum(gram in prompt for gram in grams) / len(grams) if grams else 0.0


def measures(batches: list[Batch], second: Reward | None = None, referred: int | None = None) -> Values:
    """Name → one value a prompt, the mean over its responses; of ``distinct_1`` and ``distinct_2`` one value in all.

    The first response alone stands for a prompt in ``distinct_1``, ``distinct_2`` and ``reference``: these then do not
    depend on how many a method draws. ``reference`` is of each batch's first ``referred`` prompts, None: of all.
    """
    found: Values = {}
    firsts: list[list[int]] = []
    for batch in batches:
        sizes = torch.unique_consecutive(batch.group, return_counts=True)[1].tolist()
        starts = batch.group_starts().tolist()
        ids = [row[:n] for row, n in zip(batch.response_ids.tolist(), batch.lengths.tolist(), strict=True)]
        firsts += [ids[i] for i in starts]
        prompts = [{gram for x in _turns(batch.prompts[i]) for gram in ngrams(words(x), N)} for i in starts]
        own = [g for g, n in enumerate(sizes) for _ in range(n)]  # which prompt each response answers
        by_response = {
            "length": [float(len(x)) for x in ids],
            "cut_off": [float(not x) for x in batch.extra["ended"].tolist()],
            "repetition": [repetition(x) for x in ids],
            "copy": [copied(y, prompts[g]) for y, g in zip(batch.responses, own, strict=True)],
        }
        if batch.scores is not None:
            by_response["reward"] = batch.scores.tolist()
        if second is not None:
            # torch's own generator belongs to training: it goes on as if nobody had looked
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                by_response["second"] = scores_of(second, batch).tolist()
        spans = [slice(i, i + n) for i, n in zip(starts, sizes, strict=True)]
        by_prompt = {name: [sum(x[s]) / (s.stop - s.start) for s in spans] for name, x in by_response.items()}
        if max(sizes) > 1:
            by_prompt["unique"] = [len(set(batch.responses[s])) / (s.stop - s.start) for s in spans]
        by_prompt["reference"] = [
            CHRF_SCORE.sentence_score(batch.responses[i], batch.rows[i]["references"]).score
            for i in starts[:referred]
            if batch.rows[i]["references"]
        ]
        for name, values in by_prompt.items():
            found.setdefault(name, []).extend(values)
    return {**{k: v for k, v in found.items() if v}, **{f"distinct_{n}": [distinct(firsts, n)] for n in (1, 2)}}


def _turns(prompt: Any) -> list[str]:
    """The text of a prompt; of chat messages one text a turn."""
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]


# ---- alarms ----------------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def error(values: list[float]) -> float:
    """Standard error of a mean; infinite where there is one value alone, which says nothing about others."""
    n, middle = len(values), mean(values)
    return math.sqrt(sum((x - middle) ** 2 for x in values) / (n - 1) / n) if n > 1 else math.inf


def rings(s: AuditSettings, was: Values, now: Values, paired: bool = False) -> dict[str, bool]:
    """Alarm → whether it rings, of those that are switched on and whose measure is there at both times.

    Args:
        paired: the values of both times are of the same prompts in order, so that only their differences are noise.
    """

    def rise(name: str) -> float:
        return mean(now[name]) - mean(was[name])

    def margin(name: str) -> float:
        assert s.spread is not None
        if paired:
            return s.spread * error([b - a for a, b in zip(was[name], now[name], strict=True)])
        return s.spread * math.hypot(error(was[name]), error(now[name]))

    found = {}
    if s.length is not None:
        before, after = mean(was["length"]), mean(now["length"])
        found["length"] = after > s.length * before or before > s.length * after
    if s.repetition is not None:
        found["repetition"] = rise("repetition") > s.repetition
    if s.diversity is not None:
        found["diversity"] = mean(now["distinct_2"]) < s.diversity * mean(was["distinct_2"])
    if s.copy is not None:
        found["copy"] = rise("copy") > s.copy
    if s.spread is not None:
        for name in ("reference", "second"):
            if name in was and name in now:
                found[name] = rise("reward") > margin("reward") and -rise(name) > margin(name)
    return found


class Audit:
    """Measures every step's samples, and dev responses where they are evaluated; remembers the start and what has rung.

    The start of samples is their first ``window`` steps, held against the last ``window``; that of dev is its first
    evaluation, held against the present one, row by row.
    """

    def __init__(self, settings: AuditSettings, second: Reward | None = None) -> None:
        self.settings, self.second = settings, second
        self.alarms: list[dict[str, Any]] = []  # {name, step, was, is, text} of each alarm when it first rang
        self.ringing: list[str] = []  # names at the last look at samples
        self.new: list[str] = []  # texts of those that rang at the last look and never before
        self.over = False  # whether the run is to end; dev comes after that was asked, so it waits for the next step
        self._seen: dict[str, dict[str, list[Any]]] = {}  # "" or "dev/" → start, recent: pairs [step, Values]

    def look(self, step: int, batches: list[Batch], where: str = "") -> dict[str, float]:
        """What is measured after ``step`` steps: means by name, and alarms as ``audit/NAME``, 0 or 1.

        Args:
            batches: samples with scores; what is no sample must have been left out.
            where: ``"dev/"`` for dev responses; put before every name.
        """
        values = measures(batches, self.second, None if where else REFERRED)
        seen = self._seen.setdefault(where, {"start": [], "recent": []})
        window = 1 if where else self.settings.window
        if len(seen["start"]) < window:
            seen["start"].append([step, values])
        seen["recent"] = [*seen["recent"], [step, values]][-window:]
        was, now = _pooled(seen["start"]), _pooled(seen["recent"])
        found = rings(self.settings, was, now, paired=bool(where))
        names = {f"{where}audit/{name}": name for name, one in found.items() if one}
        known = {alarm["name"] for alarm in self.alarms}
        alarms = [self._alarm(key, name, step, was, now, seen) for key, name in names.items() if key not in known]
        self.alarms, self.new = self.alarms + alarms, [alarm["text"] for alarm in alarms]
        if not where:
            self.ringing, self.over = list(names), self.settings.stop and bool(self.alarms)
        means = {f"{where}{name}": mean(x) for name, x in values.items()}
        return means | {f"{where}audit/{name}": float(one) for name, one in found.items()}

    def state(self) -> dict[str, Any]:
        """What later looks depend on, as JSON."""
        return {"seen": self._seen, "alarms": self.alarms, "over": self.over}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        if state:  # of a run that was begun without an audit there is none
            self._seen, self.alarms, self.over = state["seen"], state["alarms"], state["over"]

    def _alarm(
        self, key: str, name: str, step: int, was: Values, now: Values, seen: dict[str, list[Any]]
    ) -> dict[str, Any]:
        measure, says = SAYS[name]
        before, after = mean(was[measure]), mean(now[measure])
        text = f"{key} rings at step {step}: "
        if name in ("reference", "second"):
            text += f"the reward rose from {mean(was['reward']):.3g} to {mean(now['reward']):.3g}, while "
        text += f"{says} went from {before:.3g} ({_steps(seen['start'])}) to {after:.3g} ({_steps(seen['recent'])})."
        return {"name": key, "step": step, "was": before, "is": after, "text": text}


def _pooled(part: list[Any]) -> Values:
    """The values of some steps together."""
    pooled: Values = {}
    for _, values in part:
        for name, some in values.items():
            pooled.setdefault(name, []).extend(some)
    return pooled


def _steps(part: list[Any]) -> str:
    first, last = part[0][0], part[-1][0]
    return f"step {first}" if first == last else f"steps {first} to {last}"
