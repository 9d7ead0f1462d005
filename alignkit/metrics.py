"""Corpus metrics with bootstrap intervals: BLEU, chrF, exact match, length ratio, mean reward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from alignkit.errors import UserError

SEED = 12345  # of the resamples; the same rows are drawn for two systems, so that differences are paired


@dataclass
class Sentences:
    """Sufficient statistics of each row: a corpus metric is a function of their (weighted) sum."""

    stats: dict[str, np.ndarray]  # metric → (N, S) float64

    def n(self, name: str) -> int:
        """How many rows a metric is of, where it counts them; else all."""
        stats = self.stats[name]
        counts = (stats.shape[1] == 2 and name != "length_ratio") or name in ("ece", "nll")
        return int(stats[:, -1].sum()) if counts else len(stats)

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """(W, N) row weights → metric → (W,) corpus scores."""
        return {n: _SCORE.get(n.partition("/")[0], _share)(weights @ stats) for n, stats in self.stats.items()}


def sentences(
    responses: list[str],
    references: list[list[str]],
    measured: dict[str, list[float]] | None = None,
    nll: list[tuple[float, int]] | None = None,
) -> Sentences:
    """Statistics of N responses against their accepted answers; rows may have any number of these.

    Args:
        measured: further values of each row, by name (``reward``, ``preference_accuracy``); with no references at all they
            are all there is.
        nll: (nats, tokens) of each row's own response; the metric is nats a token, over all rows together.
    """
    stats: dict[str, np.ndarray] = {}
    if any(references) and not all(references):
        missing = next(i for i, r in enumerate(references) if not r)
        raise UserError(f"held-out row {missing} has no references, others do. Complete or drop it.")
    if responses and all(references):
        width = max(len(r) for r in references)
        streams: list[list[str | None]] = [[r[j] if j < len(r) else None for r in references] for j in range(width)]
        bleu = np.array(_bleu()._extract_corpus_statistics(responses, streams), dtype=float)
        stats["bleu"] = bleu
        stats["chrf"] = np.array(_chrf()._extract_corpus_statistics(responses, streams), dtype=float)
        exact = [float(y in r) for y, r in zip(responses, references, strict=True)]
        stats["exact_match"] = _with_count(exact)
        stats["length_ratio"] = bleu[:, :2]  # (system length, closest reference length)
    for name, values in (measured or {}).items():
        stats[name] = _with_count(values)
    if nll is not None:
        stats["nll"] = np.array([(nats, tokens, 1) for nats, tokens in nll], dtype=float)
    return Sentences(stats)


def pairs(
    margins: list[float], lengths: list[tuple[int, int]], prompts: list[str], sections: list[str] | None = None
) -> Sentences:
    """Statistics of N pairs: margins in log-odds, lengths in characters of (chosen, rejected), prompt and section of each.

    Pairs of one prompt hang together, so resamples draw prompts: there is a row of statistics for each prompt.

    ``ece`` is the expected calibration error over ten bins of confidence max(p, 1 - p), p = sigmoid(margin); ``macro`` the
    mean of the sections' shares ranked right, which are there as ``section/NAME`` too.
    """
    d = np.asarray(margins, dtype=float)
    right = (np.sign(d) + 1) / 2
    p = 1 / (1 + np.exp(-np.abs(d)))
    place = np.minimum(((p - 0.5) * 20).astype(int), 9)
    bins = np.eye(10)[place]
    size = np.sign([a - b for a, b in lengths])
    stats = {
        "preference_accuracy": _with_count(list(right)),
        "ties": _with_count(list(d == 0)),
        "margin": _with_count(margins),
        "nll": _with_count(list(np.logaddexp(0, -d))),
        "ece": np.concatenate([bins * p[:, None], bins * right[:, None], np.ones((len(d), 1))], axis=1),
        "longer_wins": _with_count(list((size + 1) / 2)),
    }
    names = sorted(set(sections)) if sections else []
    if len(names) > 1:
        inside = (np.asarray(sections)[:, None] == np.asarray(names)).astype(float)  # (N, S)
        stats["macro"] = np.concatenate([inside * right[:, None], inside], axis=1)
        for i, name in enumerate(names):
            stats[f"section/{name}"] = np.stack([inside[:, i] * right, inside[:, i]], axis=1)
    place_of = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = [place_of[prompt] for prompt in prompts]
    return Sentences({name: _summed(x, group, len(place_of)) for name, x in stats.items()})


def _summed(stats: np.ndarray, group: list[int], n: int) -> np.ndarray:
    """(N, S) → (n, S) sums over the rows of each group."""
    sums = np.zeros((n, stats.shape[1]))
    np.add.at(sums, group, stats)
    return sums


def per_prompt(found: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Statistics of metrics that each prompt has by itself; one that a prompt has not, or is not a number, does not count."""
    names = list(dict.fromkeys(name for one in found for name in one))
    values = np.array([[one.get(name, np.nan) for name in names] for one in found], dtype=float)
    known = ~np.isnan(values)
    return {
        name: np.stack([np.nan_to_num(values[:, i]), known[:, i]], axis=1)
        for i, name in enumerate(names)
        if known[:, i].any()
    }


def summary(s: Sentences, resamples: int) -> dict[str, dict[str, float]]:
    """Metric → value, 95 % percentile-bootstrap interval and n."""
    n = _rows(s)
    point = s.scores(np.ones((1, n)))
    drawn = s.scores(_weights(n, resamples)) if resamples else {}
    return {name: {"value": float(point[name][0]), **_interval(drawn.get(name)), "n": s.n(name)} for name in point}


def difference(before: Sentences, after: Sentences, resamples: int) -> dict[str, dict[str, float]]:
    """Metric → after − before with a paired 95 % interval and the share of resamples in which it is above 0."""
    n = _rows(before)
    one, weights = np.ones((1, n)), _weights(n, resamples)
    old, new = before.scores(one), after.scores(one)
    point = {k: new[k] - v for k, v in old.items()}
    after_drawn = after.scores(weights)
    drawn = {k: after_drawn[k] - v for k, v in before.scores(weights).items()}
    return {
        k: {"value": float(point[k][0]), **_interval(drawn[k]), "above_zero": float((drawn[k] > 0).mean()), "n": n}
        for k in point
    }


def signatures() -> dict[str, str]:
    """sacrebleu's own description of how BLEU and chrF were computed."""
    return {"bleu": str(_bleu().get_signature()), "chrf": str(_chrf().get_signature())}


@cache
def _bleu() -> Any:
    return BLEU()


@cache
def _chrf() -> Any:
    return CHRF()


def _rows(s: Sentences) -> int:
    return len(next(iter(s.stats.values())))


def _weights(n: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)


def _with_count(values: list[float]) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)


def _interval(drawn: np.ndarray | None) -> dict[str, float]:
    if drawn is None:
        return {}
    low, high = np.nanpercentile(drawn, [2.5, 97.5])  # a resample may hold no row of a section
    return {"low": float(low), "high": float(high)}


def _sacre(metric: Any, sums: np.ndarray) -> np.ndarray:
    whole = [[int(x) for x in row] for row in sums]
    return np.array([metric._compute_score_from_stats(row).score for row in whole])


def _share(sums: np.ndarray) -> np.ndarray:
    """(W, 2) sums and counts → means; not a number where nothing was counted."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)


def _macro(sums: np.ndarray) -> np.ndarray:
    """(W, 2S) sums, then counts of S sections → means over sections; not a number where a resample has none of one."""
    values, counts = np.split(sums, 2, axis=1)
    return np.divide(values, counts, out=np.full_like(values, np.nan), where=counts > 0).mean(1)


_SCORE = {
    "bleu": lambda sums: _sacre(_bleu(), sums),
    "chrf": lambda sums: _sacre(_chrf(), sums),
    "nll": lambda sums: sums[:, 0] / sums[:, 1],  # of pairs their number, of texts their tokens
    "ece": lambda sums: np.abs(sums[:, :10] - sums[:, 10:20]).sum(1) / sums[:, 20],
    "macro": lambda sums: 100 * _macro(sums),
    **dict.fromkeys(
        (
            "accuracy",
            "agreement",
            "exact_match",
            "first_exact_match",
            "parse_failed",
            "preference_accuracy",
            "ties",
            "longer_wins",
            "section",
        ),
        lambda sums: 100 * _share(sums),
    ),
}  # every other one is a mean
