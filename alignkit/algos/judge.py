"""Pairwise judging: how often one system's answers are better than another's, also at equal length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.errors import need, suggest
from alignkit.metrics import Sentences, per_prompt, summary

Array = np.ndarray
LENGTH_RESAMPLES = 200  # behind the intervals of length-controlled win rates: each is a regression
RIDGE = (1e-6, 0.1)  # on intercept and slope, in rows: it keeps both finite where length, or nothing, decides all


@dataclass(kw_only=True)
class Judge:
    """What several systems said to the same held-out rows, compared in pairs: one candidate with every other system.

    Win rate is the mean preference for the candidate, ties as a half, over the rows that have a verdict. The length-controlled
    one follows AlpacaEval 2 (arXiv 2404.04475): what a logistic regression of the preference on the difference in length says
    of answers of equal length. Ours in that it has no term for how difficult an instruction is, and in its small ridge.

    The run's reward, where there is one, is a judge by the name ``reward``; ``judges`` are more of them.
    """

    outputs: dict[
        str, str
    ]  # system → its run (outputs-after.jsonl there, else -test, else -dev), or a file; RUN#first: that column
    candidate: str | None = None  # the system that is compared with every other; null: the last
    judges: dict[str, Any] | None = None  # name → judge: a class of alignkit.judges, or one of your own
    bootstrap: int = 1000  # resamples of rows behind the intervals

    def __post_init__(self) -> None:
        need(self, "bootstrap >= 0")
        if len(self.outputs) < 2:
            raise ValueError(
                "outputs must name at least two systems, as in 'algo.outputs={base: runs/A, tuned: runs/B}', "
                f"has {', '.join(self.outputs) or 'none'}"
            )
        if self.candidate is None:
            self.candidate = list(self.outputs)[-1]
        if self.candidate not in self.outputs:
            raise ValueError(
                f"candidate '{self.candidate}' is not among the outputs.{suggest(self.candidate, self.outputs)}"
            )

    @property
    def opponents(self) -> list[str]:
        return [name for name in self.outputs if name != self.candidate]

    def compared(self, preference: Array, gap: Array) -> dict[str, Any]:
        """What N verdicts say of the candidate.

        Args:
            preference: (N,) for the candidate's text, in [0, 1]; not a number where there is no verdict.
            gap: (N,) characters of the candidate's text less those of the other.

        Returns:
            ``win_rate`` and ``length_controlled`` (per cent, with 95 % intervals; the second where neither is always the
            longer), the counts ``wins``, ``ties`` and ``losses`` (a preference above, at and below 1/2), ``failed``, rows
            without a verdict, and ``longer``, the share of rows whose candidate's text is the longer one (equal ones count
            half): near 0 or 1 an equal length lies outside of what was seen, and the regression extrapolates with more
            confidence than it should have.
        """
        rates = per_prompt([{"win_rate": 100 * float(p)} for p in preference])
        if not rates:
            raise ValueError("there is a verdict on none of the rows")
        known = ~np.isnan(preference)
        kept, differ = preference[known], gap[known]
        sums = np.stack([np.nan_to_num(preference), _length_feature(gap, known), known.astype(float)], axis=1)
        return {
            **summary(Sentences(rates), self.bootstrap),
            **(
                {}  # one is always the longer: nothing is known of equal lengths
                if (differ > 0).all() or (differ < 0).all()
                else summary(_LengthControlled({"length_controlled": sums}), min(self.bootstrap, LENGTH_RESAMPLES))
            ),
            "wins": int((kept > 0.5).sum()),
            "ties": int((kept == 0.5).sum()),
            "losses": int((kept < 0.5).sum()),
            "failed": int((~known).sum()),
            "longer": float((np.sign(gap[known]) + 1).mean() / 2),
        }


class _LengthControlled(Sentences):
    """Rows of (preference, length feature, whether it counts): a win rate at equal length for each weighting of the rows."""

    def n(self, name: str) -> int:
        return int(self.stats[name][:, 2].sum())

    def scores(self, weights: Array) -> dict[str, Array]:
        return {
            name: 100 * np.array([_at_equal_length(y, x, w * counts) for w in weights])
            for name, (y, x, counts) in ((name, stats.T) for name, stats in self.stats.items())
        }


def _length_feature(gap: Array, known: Array) -> Array:
    """(N,) tanh of the difference in length over its deviation; it is not centred, so that 0 is an equal length."""
    deviation = gap[known].std()
    return np.tanh(gap / deviation) if deviation > 0 else np.zeros(len(gap))


def _at_equal_length(y: Array, x: Array, weight: Array) -> float:
    """sigmoid(b) of the regression sigmoid(b + a x) to soft labels y, (N,) each, by Newton's method; halved steps descend."""
    design, ridge, beta = np.stack([np.ones(len(x)), x]), np.array(RIDGE), np.zeros(2)

    def loss(beta: Array) -> float:
        z = beta @ design
        return float(weight @ (np.logaddexp(0, z) - y * z) + 0.5 * ridge @ beta**2)

    if weight.sum() == 0:
        return float("nan")
    for _ in range(100):
        p = _sigmoid(beta @ design)
        gradient = design @ (weight * (p - y)) + ridge * beta
        hessian = (design * (weight * p * (1 - p))) @ design.T + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        while loss(beta - step) > loss(beta) and np.abs(step).max() > 1e-9:
            step = step / 2
        beta = beta - step
        if np.abs(step).max() < 1e-9:
            break
    return float(_sigmoid(beta[0]))


def _sigmoid(z: Any) -> Any:
    return np.exp(-np.logaddexp(0, -z))


def agreement(a: Array, b: Array) -> dict[str, float | int | None]:
    """How far two judges agree on who wins, of (N,) preferences each: ``same``, the share of equal verdicts (win, tie, loss), and
    Cohen's ``kappa``, over the ``n`` rows on which both have one.

    Kappa is None where chance alone would make them agree: both say one and the same thing of all rows.
    """
    known = ~(np.isnan(a) | np.isnan(b))
    if not known.any():
        return {"same": None, "kappa": None, "n": 0}
    one, other = (np.sign(x[known] - 0.5).astype(int) for x in (a, b))
    same = float((one == other).mean())
    chance = sum(float((one == v).mean() * (other == v).mean()) for v in (-1, 0, 1))
    return {"same": same, "kappa": (same - chance) / (1 - chance) if chance < 1 else None, "n": int(known.sum())}
