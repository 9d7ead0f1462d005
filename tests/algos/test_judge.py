"""Pairwise judging: win rates, win rates at equal length and agreement, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.algos.judge import Judge, agreement

NAN = float("nan")
TWO = {"base": "a.jsonl", "tuned": "b.jsonl"}


def judged(preference: list[float], longer: list[float] | None = None, bootstrap: int = 0) -> dict[str, Any]:
    lengths = np.array([0.0] * len(preference) if longer is None else longer)
    return Judge(outputs=TWO, bootstrap=bootstrap).compared(np.array(preference), lengths)


# ---- win rates -------------------------------------------------------------------------------------------------------


def test_ties_count_half_and_rows_without_a_verdict_not_at_all() -> None:
    found = judged([1, 1, 0.5, 0, NAN])
    assert found["win_rate"] == {"value": 62.5, "n": 4}  # (1 + 1 + 1/2) / 4
    assert [found[k] for k in ("wins", "ties", "losses", "failed")] == [2, 1, 1, 1]


def test_a_preference_between_tie_and_win_is_a_win_that_counts_three_quarters() -> None:
    found = judged([0.75, 0.25, 0.75, 0.5])
    assert found["win_rate"]["value"] == 56.25
    assert [found[k] for k in ("wins", "ties", "losses")] == [2, 1, 1]


@pytest.mark.parametrize(("preference", "rate"), [([1.0] * 5, 100), ([0.0] * 5, 0), ([0.5] * 5, 50)])
def test_where_all_rows_agree_no_resample_differs(preference: list[float], rate: float) -> None:
    found = judged(preference, [3, -1, 0, 2, 7], bootstrap=100)
    assert found["win_rate"] == {"value": rate, "low": rate, "high": rate, "n": 5}


def test_the_interval_is_that_of_a_share() -> None:
    """400 rows, half of them won: the standard error is 2.5 points, so the interval reaches 1.96 of them to both sides."""
    found = judged([1.0, 0.0] * 200, bootstrap=1000)["win_rate"]
    assert found["low"] == pytest.approx(50 - 4.9, abs=0.6)
    assert found["high"] == pytest.approx(50 + 4.9, abs=0.6)


def test_no_verdict_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is a verdict on none of the rows"):
        judged([NAN, NAN])


# ---- at equal length -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gaps", [[12] * 5, [-5, -1, -9, -2, -1]])
def test_where_one_is_always_the_longer_nothing_is_said_of_equal_lengths(gaps: list[float]) -> None:
    assert "length_controlled" not in judged([1, 1, 0.5, 0, 1, NAN], [*gaps, 0])


def test_without_variation_of_the_difference_in_length_there_is_nothing_to_control() -> None:
    """The maximum likelihood of an intercept alone is the mean."""
    found = judged([1, 1, 0.5, 0, 1, NAN], [0] * 5 + [99])
    assert found["length_controlled"]["value"] == pytest.approx(70, abs=1e-3)
    assert found["length_controlled"]["n"] == 5


def test_two_lengths_are_fitted_exactly() -> None:
    """Longer by 10, three in four are won, shorter by 10, one in two: b + a x = ln 3 and b - a x = 0, so b = ln(3) / 2."""
    found = judged([1, 1, 1, 0, 1, 0, 1, 0] * 1000, [10, 10, 10, 10, -10, -10, -10, -10] * 1000)
    assert found["win_rate"]["value"] == 62.5
    assert found["length_controlled"]["value"] == pytest.approx(100 * math.sqrt(3) / (1 + math.sqrt(3)), abs=0.01)


def test_the_feature_is_the_tanh_of_the_standardised_difference() -> None:
    """Three lengths that only the right feature fits: sigmoid(0.4 + 2 tanh(d / s)), s the population's deviation."""
    d = np.array([-30.0, 0.0, 60.0] * 500)
    s = math.sqrt((30**2 + 60**2) / 3 - 10**2)
    preference = [1 / (1 + math.exp(-0.4 - 2 * math.tanh(x / s))) for x in d]
    found = judged(preference, list(d))
    assert found["length_controlled"]["value"] == pytest.approx(100 / (1 + math.exp(-0.4)), abs=0.02)


def test_a_judge_that_goes_by_length_alone_is_seen_through() -> None:
    d = np.linspace(-100, 300, 401)  # the candidate is longer in three rows of four
    found = judged([float(x > 0) + 0.5 * float(x == 0) for x in d], list(d), bootstrap=200)
    assert found["win_rate"]["value"] == pytest.approx(75, abs=0.2)
    assert found["length_controlled"]["value"] == pytest.approx(50, abs=5)
    assert found["length_controlled"]["low"] < 50 < found["length_controlled"]["high"]


def test_how_often_the_candidate_is_longer() -> None:
    assert judged([1, 0, 0.5, 0, NAN], [3, -1, 0, 200, 9])["longer"] == 0.625  # (1 + 0 + 1/2 + 1) / 4


def test_a_judge_that_does_not_see_length_is_left_alone() -> None:
    """Each length has the same share of wins, so the slope is 0 and the intercept the logit of the share."""
    found = judged([1, 1, 1, 0] * 50, [x for x in range(50) for _ in range(4)])
    assert found["length_controlled"]["value"] == pytest.approx(75, abs=1e-3)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_candidate_that_always_wins_or_loses_stays_finite(rate: float) -> None:
    found = judged([rate] * 30, list(range(30)), bootstrap=50)["length_controlled"]
    assert found["value"] == pytest.approx(100 * rate, abs=0.01)
    assert found["low"] <= found["value"] <= found["high"]


rows = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, NAN]), st.integers(-500, 500)), min_size=1, max_size=30
).filter(lambda rows: any(p == p for p, _ in rows))


@given(rows)
def test_the_rates_of_both_sides_add_up_to_a_hundred(rows: list[tuple[float, int]]) -> None:
    preference, longer = map(list, zip(*rows, strict=True))
    one, other = judged(preference, longer), judged([1 - p for p in preference], [-d for d in longer])
    assert ("length_controlled" in one) == ("length_controlled" in other)
    for rate in {"win_rate", "length_controlled"} & set(one):
        assert one[rate]["value"] + other[rate]["value"] == pytest.approx(100, abs=1e-4)
    assert (one["wins"], one["ties"]) == (other["losses"], other["ties"])
    assert one["longer"] + other["longer"] == pytest.approx(1)
    assert one["wins"] + one["ties"] + one["losses"] + one["failed"] == len(rows)


@given(rows, st.integers(2, 9))
def test_lengths_in_another_unit_change_nothing(rows: list[tuple[float, int]], unit: int) -> None:
    preference, longer = map(list, zip(*rows, strict=True))
    found, other = judged(preference, [unit * d for d in longer]), judged(preference, longer)
    assert ("length_controlled" in found) == ("length_controlled" in other)
    if "length_controlled" in found:
        assert found["length_controlled"]["value"] == pytest.approx(other["length_controlled"]["value"], abs=1e-4)


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    """Same: rows 1, 3, 5 of 5. By chance: win 2/5 * 1/5 + loss 2/5 * 2/5 + tie 1/5 * 2/5 = 8/25. (15 - 8) / (25 - 8)."""
    a, b = np.array([1, 1, 0, 0, 0.5, NAN, 1]), np.array([1, 0, 0, 0.5, 0.5, 1, NAN])
    assert agreement(a, b) == agreement(b, a) == {"same": 0.6, "kappa": pytest.approx(7 / 17), "n": 5}


def test_kappa_at_its_ends() -> None:
    a = np.array([1.0, 0.0, 0.5, 1.0])
    assert agreement(a, a) == {"same": 1.0, "kappa": pytest.approx(1), "n": 4}
    assert agreement(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == {"same": 0.0, "kappa": pytest.approx(-1), "n": 2}
    independent = agreement(np.array([1.0, 1.0, 0.0, 0.0]), np.array([1.0, 0.0, 1.0, 0.0]))
    assert independent == {"same": 0.5, "kappa": pytest.approx(0), "n": 4}


def test_a_weak_preference_is_a_verdict() -> None:
    assert agreement(np.array([0.75, 0.25]), np.array([1.0, 0.0]))["same"] == 1.0


def test_kappa_is_open_where_nothing_varies() -> None:
    assert agreement(np.ones(3), np.ones(3)) == {"same": 1.0, "kappa": None, "n": 3}
    assert agreement(np.array([NAN]), np.ones(1)) == {"same": None, "kappa": None, "n": 0}


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_candidate_is_the_last_system_unless_it_is_named() -> None:
    three = {"base": "a", "tuned": "b", "refined": "c"}
    assert Judge(outputs=three).opponents == ["base", "tuned"]
    assert Judge(outputs=three, candidate="base").opponents == ["tuned", "refined"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"outputs": {}}, "outputs must name at least two systems, .*, has none"),
        ({"outputs": {"base": "a"}}, "outputs must name at least two systems, .*, has base"),
        ({"candidate": "tunde"}, "candidate 'tunde' is not among the outputs. Did you mean 'tuned'?"),
        ({"bootstrap": -1}, "bootstrap must be at least 0"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Judge(**{"outputs": TWO, **settings})
