"""Measures of a reward model against numbers worked by hand, brute force and properties."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit import ranking

NAN = float("nan")
E3 = (np.array([0.60, 0.66, 0.71, 0.75, 0.82]), np.array([0.35, 0.30, 0.62, 0.55, 0.90]))
E4 = (np.array([0.1, 0.9, 0.5, -0.3, 0.2]), np.array([0.0, 0.7, 0.8, -0.1, -0.2]))
TIED = (np.array([3.0, 2, 1]), np.array([5.0, 5, 1]))  # the proxy cannot tell the two best apart
LISTS = [
    ranking.pair_accuracy,
    ranking.spearman,
    ranking.kendall,
    ranking.xi,
    ranking.mrr,
]  # use the proxy's order only

# small whole numbers: ties are common, and maps of them lose nothing to rounding
lists = st.integers(2, 7).flatmap(
    lambda k: st.tuples(*[st.lists(st.integers(-4, 4), min_size=k, max_size=k).map(np.array)] * 2)
)
untied = st.integers(2, 7).flatmap(lambda k: st.tuples(*[st.permutations(range(k)).map(np.array)] * 2))
some = settings(max_examples=60, deadline=None, derandomize=True)


def close(found: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found, wanted, atol=tolerance, rtol=0)


# ---- pairs -------------------------------------------------------------------------------------------------------


def test_pairs_with_ties() -> None:
    """Margins 1, -1, 0, 2: 2.5 of 4 right, one tie."""
    margins = np.array([1.0, -1, 0, 2])
    assert ranking.accuracy(margins) == 2.5 / 4


def test_ece() -> None:
    """Confidence .75 four times (3 right, 1 wrong: calibrated) and .9 once, wrong: (0 · 4 + .9 · 1) / 5 = .18; in one
    bin (.75 · 4 + .9 - 3) / 5, the same."""
    margins = np.array([math.log(3)] * 3 + [-math.log(3), -math.log(9)])
    close(ranking.ece(margins), 0.18)
    close(ranking.ece(margins, bins=1), 0.18)
    # .75 wrong and .9 right: apart .75 / 2 + .1 / 2, in one bin |1.65 - 1| / 2
    two = np.array([-math.log(3), math.log(9)])
    close(ranking.ece(two), 0.425)
    close(ranking.ece(two, bins=1), 0.325)


def test_ece_of_ties_and_of_certainty() -> None:
    """A tie has confidence 1/2 and is half right; a certain right pair has no error, a certain wrong one error 1."""
    assert ranking.ece(np.zeros(3)) == 0
    assert ranking.ece(np.array([1000.0])) == 0
    assert ranking.ece(np.array([-1000.0])) == 1


@pytest.mark.parametrize("wrong", [np.zeros(0), np.zeros((2, 2)), np.array([NAN])])
def test_margins_are_checked(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="margins"):
        ranking.accuracy(wrong)


@some
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=20).map(np.array))
def test_pairs_read_backwards(margins: np.ndarray) -> None:
    close(ranking.accuracy(-margins), 1 - ranking.accuracy(margins))
    assert 0 <= ranking.ece(margins) <= 1


# ---- lists -------------------------------------------------------------------------------------------------------


def test_card_e3() -> None:
    close(ranking.kendall(*E3), 0.6)
    close(ranking.spearman(*E3), 0.8)
    close(ranking.pearson(*E3), 0.904954, 1e-6)


def test_card_e4() -> None:
    assert ranking.pair_accuracy(*E4) == 0.7
    assert ranking.mrr(*E4) == 0.5
    close(ranking.best_of(*E4, 5), 0.5)


def test_ties_of_the_proxy() -> None:
    """golden 3 2 1, proxy 5 5 1. Pairs: tie (wrong), right, right. tau-b: 2 / sqrt(3 · 2). Ranks 3 2 1 and 2.5 2.5 1.
    The best has rank 1 or 2: (1 + 1/2) / 2. xi: orders 1 3 2 and 1 2 3 of golden from the lowest proxy, steps 3 and 2,
    so 1 - 3 · 2.5 / (9 - 1)."""
    close(ranking.pair_accuracy(*TIED), 2 / 3)
    close(ranking.kendall(*TIED), 2 / math.sqrt(6))
    close(ranking.spearman(*TIED), 1.5 / math.sqrt(2 * 1.5))
    close(ranking.mrr(*TIED), 0.75)
    close(ranking.xi(*TIED), 1 - 3 * 2.5 / 8)


def test_ndcg_by_hand() -> None:
    """Gains 2 1 0, discounts 1, 1/log2 3, 1/2; the ideal 2 + 1/log2 3; with the best two swapped 1 + 2/log2 3; tied: between."""
    d = 1 / math.log2(3)
    golden = np.array([3.0, 2, 1])
    assert ranking.ndcg(golden, golden) == 1
    close(ranking.ndcg(golden, np.array([4.0, 5, 1])), (1 + 2 * d) / (2 + d))
    close(ranking.ndcg(*TIED), 3 * (1 + d) / 2 / (2 + d))
    close(ranking.ndcg(golden + 7, np.array([4.0, 5, 1])), (1 + 2 * d) / (2 + d))


def test_ties_of_golden() -> None:
    """golden 1 1 0: of the tied pair nothing is asked. tau-b 2 / sqrt(2 · 3). Both bests count for mrr: (1/1 + 1/3) / 2."""
    golden = np.array([1.0, 1, 0])
    assert ranking.pair_accuracy(golden, np.array([3.0, 2, 1])) == 1
    close(ranking.kendall(golden, np.array([3.0, 2, 1])), 2 / math.sqrt(6))
    close(ranking.mrr(golden, np.array([3.0, 1, 2])), 2 / 3)
    # Chatterjee: golden from the lowest proxy 0 1 1: r 1 3 3, steps 2; l 3 2 2, sum l (3 - l) = 0 + 2 + 2
    close(ranking.xi(golden, np.array([3.0, 2, 1])), 1 - 3 * 2 / (2 * 4))


def test_nothing_to_compare() -> None:
    flat, x = np.full(3, 0.1), np.array([1.0, 2, 3])
    for measure in (
        ranking.pair_accuracy,
        ranking.xi,
        ranking.ndcg,
        ranking.pearson,
        ranking.spearman,
        ranking.kendall,
    ):
        assert np.isnan(measure(flat, x)), measure.__name__
    for measure in (ranking.pearson, ranking.spearman, ranking.kendall):
        assert np.isnan(measure(x, flat)), measure.__name__
    assert ranking.pair_accuracy(x, flat) == 0
    assert np.isnan(ranking.pair_accuracy(np.ones(1), np.ones(1)))


def test_xi_of_orders() -> None:
    """1 - 3 / (K + 1) for an agreeing and for a reversed order, and the mean over all orders is about 0."""
    x = np.arange(6.0)
    close(ranking.xi(x, x), 1 - 3 / 7)
    close(ranking.xi(x, -x), 1 - 3 / 7)
    orders = np.array([*permutations(range(6))], dtype=float)
    close(ranking.xi(np.broadcast_to(x, orders.shape), orders).mean(), 0)  # E |step| = (K + 1) / 3 exactly


def test_many_lists_at_once() -> None:
    golden, proxy = np.random.default_rng(0).integers(0, 4, (2, 3, 5, 6))
    for measure in (*LISTS, ranking.pearson, ranking.ndcg, lambda g, p: ranking.best_of(g, p, 3)):
        wanted = [[measure(g, p) for g, p in zip(*rows, strict=True)] for rows in zip(golden, proxy, strict=True)]
        close(measure(golden, proxy), wanted)


def test_lists_are_checked() -> None:
    for golden, proxy in ((np.ones(2), np.ones(3)), (np.ones(0), np.ones(0)), (np.array(1.0), np.array(1.0))):
        with pytest.raises(ValueError, match="one shape"):
            ranking.kendall(golden, proxy)
    with pytest.raises(ValueError, match="finite"):
        ranking.kendall(np.array([1, NAN]), np.ones(2))


@some
@given(lists)
def test_order_is_all_that_counts(pair: tuple[np.ndarray, np.ndarray]) -> None:
    golden, proxy = pair
    for measure in LISTS:
        close(measure(golden, 3 * proxy**3 + 2), measure(golden, proxy))
        close(measure(2 * golden**3 - 5, proxy), measure(golden, proxy))
    close(ranking.ndcg(golden, proxy**3), ranking.ndcg(golden, proxy))
    close(ranking.pearson(5 * golden + 1, 2 * proxy - 3), ranking.pearson(golden, proxy))


@some
@given(lists, st.randoms(use_true_random=False))
def test_the_order_of_the_responses_does_not_count(pair: tuple[np.ndarray, np.ndarray], random: Any) -> None:
    golden, proxy = pair
    order = random.sample(range(len(golden)), len(golden))
    for measure in (*LISTS, ranking.pearson, ranking.ndcg, lambda g, p: ranking.best_of(g, p, 2)):
        close(measure(golden[order], proxy[order]), measure(golden, proxy))


@some
@given(lists)
def test_correlations_turn_with_the_proxy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    golden, proxy = pair
    for measure in (ranking.pearson, ranking.spearman, ranking.kendall):
        close(measure(golden, -proxy), -measure(golden, proxy))
        close(measure(proxy, golden), measure(golden, proxy))
        assert np.isnan(measure(golden, proxy)) or abs(measure(golden, proxy)) <= 1 + 1e-12
    close(ranking.xi(golden, -proxy), ranking.xi(golden, proxy))
    ties = (np.sign(golden[:, None] - golden) != 0) & (proxy[:, None] == proxy)
    wrong = ranking.pair_accuracy(golden, -proxy) + ranking.pair_accuracy(golden, proxy)
    asked = (golden[:, None] != golden).sum()
    close(wrong, 1 - ties.sum() / asked if asked else NAN)


@some
@given(untied)
def test_without_ties(pair: tuple[np.ndarray, np.ndarray]) -> None:
    golden, proxy = pair
    k = len(golden)
    close(ranking.kendall(golden, proxy), 2 * ranking.pair_accuracy(golden, proxy) - 1)
    d = golden - proxy  # both are ranks
    close(ranking.spearman(golden, proxy), 1 - 6 * (d * d).sum() / (k * (k * k - 1)))
    steps = np.abs(np.diff(golden[np.argsort(proxy)])).sum()
    close(ranking.xi(golden, proxy), 1 - 3 * steps / (k * k - 1))
    close(ranking.mrr(golden, proxy), 1 / (k - proxy[golden.argmax()]))


@some
@given(lists)
def test_ties_are_the_mean_over_their_orders(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """xi, mrr, ndcg and best_of of a tied proxy, against every way to break its ties."""
    golden, proxy = pair
    k = len(golden)
    broken = np.array([proxy * k + np.array(p) for p in permutations(range(k))])
    each = np.broadcast_to(golden, broken.shape)
    for measure in (ranking.xi, ranking.mrr, ranking.ndcg, lambda g, p: ranking.best_of(g, p, 2)):
        close(measure(each, broken).mean(), measure(golden, proxy))


@some
@given(lists, st.data())
def test_best_of_against_all_subsets(pair: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    golden, proxy = pair
    n = data.draw(st.integers(1, len(golden)))
    chosen = []
    for subset in combinations(range(len(golden)), n):
        top = max(proxy[i] for i in subset)
        chosen.append(np.mean([golden[i] for i in subset if proxy[i] == top]))
    close(ranking.best_of(golden, proxy, n), np.mean(chosen))
    policy = ranking.best_of_policy(proxy, n)
    close(policy.sum(), 1)
    assert (policy >= 0).all()


def test_best_of_ends() -> None:
    """Of one it is the mean, of all the proxy's favourite, of none or of too many an error."""
    golden, proxy = E4
    close(ranking.best_of(golden, proxy, 1), golden.mean())
    close(ranking.best_of(golden, golden, 5), golden.max())
    for n in (0, 6):
        with pytest.raises(ValueError, match="between 1 and the 5"):
            ranking.best_of(golden, proxy, n)


def test_ranks() -> None:
    close(ranking.ranks(np.array([[10.0, 30, 20, 20]])), [[1, 4, 2.5, 2.5]])


def test_rank_bins() -> None:
    """From the best down: responses 1, 2 | 4, 0 | 3."""
    golden = E4[0]
    assert {tuple(p) for p in ranking.rank_bins(golden, 3, 0, 1)} == {(1, 4), (1, 0), (2, 4), (2, 0)}
    assert ranking.rank_bins(golden, 3, 0, 0).tolist() == [[1, 2]]
    assert {tuple(p) for p in ranking.rank_bins(golden, 3, 1, 2)} == {(4, 3), (0, 3)}
    assert len(ranking.rank_bins(golden, 1, 0, 0)) == 10


def test_rank_bins_leave_ties_out() -> None:
    assert ranking.rank_bins(np.array([1.0, 1, 1, 0]), 2, 0, 0).shape == (0, 2)
    assert len(ranking.rank_bins(np.array([1.0, 1, 1, 0]), 2, 0, 1)) == 2


@pytest.mark.parametrize(("bins", "i", "j"), [(2, 1, 0), (2, 0, 2), (6, 0, 1), (2, -1, 0)])
def test_rank_bins_are_checked(bins: int, i: int, j: int) -> None:
    with pytest.raises(ValueError, match="bins"):
        ranking.rank_bins(E4[0], bins, i, j)


@some
@given(lists)
def test_pairs_of_one_bin_are_the_pairs_of_the_list(pair: tuple[np.ndarray, np.ndarray]) -> None:
    golden, proxy = pair
    pairs = ranking.rank_bins(golden, 1, 0, 0)
    right = (proxy[pairs[:, 0]] > proxy[pairs[:, 1]]).mean() if len(pairs) else NAN
    close(ranking.pair_accuracy(golden, proxy), right)


# ---- what becomes of a policy ------------------------------------------------------------------------------------

CARD = {2: (0.56419, 0.19315), 4: (1.02938, 0.63629), 16: (1.76599, 1.83509), 64: (2.34373, 3.17451), 256: (2.82686, 4.54908)}  # fmt: skip


@pytest.mark.parametrize(("n", "wanted"), CARD.items())
def test_card_best_of_n(n: int, wanted: tuple[float, float]) -> None:
    close(ranking.normal_max(n), wanted[0], 1e-5)
    close(ranking.kl_best_of(n), wanted[1], 1e-5)


def test_one_sample_changes_nothing() -> None:
    close(ranking.normal_max(1), 0)
    assert ranking.kl_best_of(1) == 0
    close(ranking.normal_max(2), 1 / math.sqrt(math.pi))


def test_kl_is_that_of_the_policy() -> None:
    """Best of n among many candidates: sum p log(K p) tends to log n - (n - 1) / n."""
    k = 2000
    policy = ranking.best_of_policy(np.arange(k), 16)
    p = policy[policy > 0]
    close((p * np.log(k * p)).sum(), ranking.kl_best_of(16), 0.01)


def test_card_e1() -> None:
    noise = np.array([0.5, 1, 2])
    rho = 1 / np.sqrt(1 + noise**2)
    close(ranking.accuracy_of_rho(rho), [0.852416, 0.75, 0.647584], 1e-6)
    close(ranking.rho_of_accuracy(np.array([0.852416, 0.75, 0.647584])), [0.894427, 0.707107, 0.447214], 2e-6)
    close(ranking.rho_of_accuracy([0.6, 0.7, 0.8, 0.9]), [0.309017, 0.587785, 0.809017, 0.951057], 1e-6)
    close(ranking.rho_of_accuracy([0, 0.5, 1]), [-1, 0, 1])


@some
@given(st.floats(0, 1))
def test_accuracy_and_rho_are_inverse(accuracy: float) -> None:
    close(ranking.accuracy_of_rho(ranking.rho_of_accuracy(accuracy)), accuracy, 1e-7)
    close(ranking.rho_of_accuracy(1 - accuracy), -ranking.rho_of_accuracy(accuracy))


def test_card_e2() -> None:
    close(ranking.ndr(0.8, 0.2, 1.0), 0.75)
    assert ranking.ndr(0.2, 0.2, 1.0) == 0
    assert ranking.ndr(1.0, 0.2, 1.0, se=0.1) == 1
    assert ranking.ndr(0.0, 0.2, 1.0) < 0
    assert ranking.ndr(1.2, 0.2, 1.0) > 1


@pytest.mark.parametrize(("start", "gold", "se"), [(1.0, 1.0, None), (1.0, 0.5, None), (0, 0.1, 0.1), (0, NAN, None)])
def test_ndr_needs_a_gain(start: float, gold: float, se: float | None) -> None:
    with pytest.raises(ValueError, match="better than the start"):
        ranking.ndr(0.5, start, gold, se=se)


def test_normal_rewards_are_on_the_line() -> None:
    """Golden N(0, 1), proxy golden + N(0, 1): accuracy 3/4, gain of the best of n rho m_n, within 4 standard errors."""
    rng = np.random.default_rng(0)
    golden = rng.standard_normal((2000, 32))
    proxy = golden + rng.standard_normal(golden.shape)
    right = ranking.pair_accuracy(golden, proxy)
    assert abs(right.mean() - 0.75) < 4 * right.std() / math.sqrt(2000)
    for n in (2, 4, 16, 32):
        gain = ranking.best_of(golden, proxy, n)
        assert abs(gain.mean() - math.sqrt(0.5) * ranking.normal_max(n)) < 4 * gain.std() / math.sqrt(2000), n
