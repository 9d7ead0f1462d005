"""Means over seeds, and differences that are paired where runs pair. numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from alignkit.metrics import SEED

LEVEL = 0.95
RESAMPLES = 10_000  # of seeds, for bootstrap intervals


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; no interval of fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    n: int
    paired: bool = False

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out; never without an interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_share(t: float, df: int) -> float:
    """P(|T| < t) of Student's t with ``df`` degrees of freedom, a whole number (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    cos2 = math.cos(angle) ** 2
    term = total = math.cos(angle) if df % 2 else 1.0
    for k in range(2 + df % 2, df - 1, 2):
        term *= cos2 * (k - 1) / k
        total += term
    if df == 1:
        return 2 * angle / math.pi
    return 2 / math.pi * (angle + math.sin(angle) * total) if df % 2 else math.sin(angle) * total


@cache
def t_quantile(df: int) -> float:
    """The t below which ``|T|`` lies with probability 0.95, by halving."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, df) < LEVEL else (low, middle)
    return high


def interval(values: list[float], how: str = "t") -> Estimate:
    """The mean of some values (one a seed) with Student's interval, or a percentile bootstrap's over the values.

    The bootstrap of few values is too narrow: of five it covers the mean in about 83 of 100 cases, not in 95.

    Raises:
        ValueError: no finite value.
    """
    x = np.array([v for v in values if math.isfinite(v)], dtype=float)
    if not len(x):
        raise ValueError("no finite value")
    mean, n = float(x.mean()), len(x)
    if n < 2:
        return Estimate(mean, None, None, n)
    if how == "bootstrap":
        drawn = np.random.default_rng(SEED).integers(0, n, (RESAMPLES, n))
        low, high = np.percentile(x[drawn].mean(1), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        return Estimate(mean, float(low), float(high), n)
    half = t_quantile(n - 1) * float(x.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def difference(of: dict[Any, float], against: dict[Any, float], how: str = "t") -> Estimate | None:
    """Mean of ``of`` less ``against`` (seed → value): over the seeds that both have, if there are two; else, where both have
    two seeds of their own, Welch's interval, its degrees of freedom rounded down; else, of one shared or any single seeds, the
    bare difference.

    None where one side has no finite value.
    """
    a, b = ({k: v for k, v in x.items() if math.isfinite(v)} for x in (of, against))
    if not a or not b:
        return None
    both = [k for k in a if k in b]
    if len(both) > 1 or len(both) == min(len(a), len(b)) == 1:
        found = interval([a[k] - b[k] for k in both], how)
        return Estimate(found.mean, found.low, found.high, found.n, paired=True)
    x, y = (np.array(list(values.values())) for values in (a, b))
    mean, n = float(x.mean() - y.mean()), min(len(x), len(y))
    if n < 2:
        return Estimate(mean, None, None, n)
    if how == "bootstrap":
        rng = np.random.default_rng(SEED)
        drawn = [v[rng.integers(0, len(v), (RESAMPLES, len(v)))].mean(1) for v in (x, y)]
        low, high = np.percentile(drawn[0] - drawn[1], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        return Estimate(mean, float(low), float(high), n)
    errors = [float(v.var(ddof=1)) / len(v) for v in (x, y)]
    whole = sum(errors)
    below = sum(e**2 / (len(v) - 1) for e, v in zip(errors, (x, y), strict=True))
    half = t_quantile(max(1, math.floor(whole**2 / below)) if below else 1) * math.sqrt(whole)
    return Estimate(mean, mean - half, mean + half, n)


def over_rows(before: list[Any], after: list[Any], resamples: int) -> dict[str, Estimate]:
    """Metric → after − before with a paired 95 % interval over held-out rows, the mean over pairs of runs.

    Args:
        before, after: ``metrics.Sentences`` of one run each, of the same rows in the same order. Every resample draws the
            same rows for all, so with one pair this is ``metrics.difference``.
    """
    n = len(next(iter(before[0].stats.values())))
    drawn = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    weights = np.concatenate([np.ones((1, n)), drawn])
    gaps: dict[str, list[np.ndarray]] = {}
    for old, new in zip(before, after, strict=True):
        was, now = old.scores(weights), new.scores(weights)
        for name in was:
            if name in now:
                gaps.setdefault(name, []).append(now[name] - was[name])
    found = {}
    for name, each in gaps.items():
        if len(each) == len(before):
            point, *rest = np.mean(each, 0)
            low, high = np.nanpercentile(rest, [2.5, 97.5])
            found[name] = Estimate(float(point), float(low), float(high), n, paired=True)
    return found
