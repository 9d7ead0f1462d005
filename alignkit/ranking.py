"""How well a reward model ranks lists of responses against a golden reward, and what that says of the policy one would get.
Pure numpy.

Lists are ``golden`` and ``proxy``
(..., K), the last axis the K responses to one prompt; a result has the axes before it, a single list gives a number.
Where a list has nothing to compare the result is nan. Names of measures follow arXiv 2410.05584, whose text was not at
hand: conventions (ties, gains, bins) are alignkit's own unless another source is named.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray

# ---- pairs --------------------------------------------------------------------------------------------------------


def accuracy(margins: Array) -> float:
    """Share of pairs ranked right, in [0, 1]; a tie (margin 0) is one half. margins (N,)."""
    return float(_right(_vector(margins)).mean())


def ece(margins: Array, bins: int = 10) -> float:
    """Expected calibration error of p = sigmoid(margin), in [0, 1]. margins (N,).

    The confidence max(p, 1 - p) lies in [1/2, 1], which is cut into ``bins`` of equal width, closed on the left (the last
    one on both sides). In each, the mean confidence is compared with the share ranked right, a tie one half; the absolute
    differences are weighted by the pairs in the bin.
    """
    margins = _vector(margins)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    index = np.minimum((2 * bins * (confidence - 0.5)).astype(int), bins - 1)
    over = np.bincount(index, weights=confidence - _right(margins), minlength=bins)
    return float(np.abs(over).sum() / len(margins))


# ---- lists --------------------------------------------------------------------------------------------------------


def pair_accuracy(golden: Array, proxy: Array) -> Any:
    """Share in [0, 1] of the K(K-1)/2 pairs on whose order golden and proxy agree.

    Strict: golden ties are dropped, a proxy tie counts as wrong. nan where all golden values are equal.
    """
    golden, proxy = _lists(golden, proxy)
    g, p = _signs(golden), _signs(proxy)
    return _ratio((g * p > 0).sum((-2, -1)), (g != 0).sum((-2, -1)))


def pearson(golden: Array, proxy: Array) -> Any:
    """Linear correlation, in [-1, 1]; nan where either is constant."""
    golden, proxy = _lists(golden, proxy)
    g, p = _centred(golden), _centred(proxy)
    return _ratio((g * p).sum(-1), np.sqrt((g * g).sum(-1)) * np.sqrt((p * p).sum(-1)))


def spearman(golden: Array, proxy: Array) -> Any:
    """Linear correlation of the ranks, ties at their average rank; in [-1, 1], nan where either is constant."""
    golden, proxy = _lists(golden, proxy)
    return pearson(ranks(golden), ranks(proxy))


def kendall(golden: Array, proxy: Array) -> Any:
    """Kendall's tau-b: agreeing less disagreeing pairs over sqrt(pairs untied in golden × pairs untied in proxy).

    In [-1, 1]; without ties it is tau-a, 2 ``pair_accuracy`` - 1. nan where either is constant.
    """
    golden, proxy = _lists(golden, proxy)
    g, p = _signs(golden), _signs(proxy)
    untied = np.sqrt((g != 0).sum((-2, -1))) * np.sqrt((p != 0).sum((-2, -1)))
    return _ratio((g * p).sum((-2, -1), dtype=float), untied)


def xi(golden: Array, proxy: Array) -> Any:
    """Chatterjee's xi (arXiv 1909.10140): how far golden is a function of the proxy, be it rising or falling.

    1 - K sum |r_{i+1} - r_i| / (2 sum l_i (K - l_i)) with golden in the order of the proxy, r_i the golden values at most
    and l_i those at least as large as the i-th. About 0 for independent values (it may be below), 1 - 3 / (K + 1) for an
    agreeing or a reversed order. Proxy ties: the expectation over their random orders. nan where golden is constant.
    """
    golden, proxy = _lists(golden, proxy)
    below, upto = _counts(golden)
    low, high = _counts(proxy)
    size = (high - low)[..., :, None]  # of the tie that i is in
    tied = low[..., :, None] == low[..., None, :]
    follows = high[..., :, None] == low[..., None, :]
    # chance that i and j are neighbours: 2 / m in a tie of m (met as i, j and as j, i), 1 / (m m') across two ties
    neighbours = tied / size + follows / (size * (high - low)[..., None, :])
    steps = (neighbours * np.abs(upto[..., :, None] - upto[..., None, :])).sum((-2, -1))
    k = golden.shape[-1]
    return 1 - _ratio(k * steps, 2.0 * ((k - below) * below).sum(-1))


def mrr(golden: Array, proxy: Array) -> Any:
    """1 / the rank that the proxy gives to the golden best, in [1 / K, 1].

    Proxy ties: the mean of 1 / rank over their random orders; several golden bests: their mean.
    """
    golden, proxy = _lists(golden, proxy)
    below, upto = _counts(-proxy)
    k = golden.shape[-1]
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, k + 1))])
    reciprocal = (harmonic[upto] - harmonic[below]) / (upto - below)
    best = golden == golden.max(-1, keepdims=True)
    return (reciprocal * best).sum(-1) / best.sum(-1)


def ndcg(golden: Array, proxy: Array) -> Any:
    """Normalised discounted cumulative gain of the proxy's order over the whole list, in (0, 1].

    Gain: golden less the list's lowest golden value; discount: 1 / log2(1 + rank). Proxy ties share their ranks' mean
    discount. nan where golden is constant.
    """
    golden, proxy = _lists(golden, proxy)
    gain = golden - golden.min(-1, keepdims=True)
    discount = 1 / np.log2(1 + np.arange(1, golden.shape[-1] + 1))
    summed = np.concatenate([[0.0], np.cumsum(discount)])
    below, upto = _counts(-proxy)
    found = (gain * (summed[upto] - summed[below]) / (upto - below)).sum(-1)
    return _ratio(found, (np.sort(gain)[..., ::-1] * discount).sum(-1))


def best_of_policy(proxy: Array, n: int) -> Array:
    """(..., K) chance of each response to be the proxy's best among n of the K, drawn without replacement.

    Exact: the best is among the c lowest with chance C(c, n) / C(K, n). Tied responses share their chance evenly.
    """
    proxy = np.asarray(proxy, dtype=float)
    k = proxy.shape[-1]
    if not 1 <= n <= k:
        raise ValueError(f"n must be between 1 and the {k} responses, is {n}")
    among = np.array([math.comb(c, n) / math.comb(k, n) for c in range(k + 1)])
    below, upto = _counts(proxy)
    chances: Array = (among[upto] - among[below]) / (upto - below)
    return chances


def best_of(golden: Array, proxy: Array, n: int) -> Any:
    """Expected golden value of the proxy's best among n of the K responses, drawn without replacement; ties averaged."""
    golden, proxy = _lists(golden, proxy)
    return (best_of_policy(proxy, n) * golden).sum(-1)


def ranks(x: Array) -> Array:
    """Ranks along the last axis, 1 for the lowest; ties have their average rank."""
    below, upto = _counts(np.asarray(x, dtype=float))
    return (below + upto + 1) / 2


def rank_bins(golden: Array, bins: int, i: int, j: int) -> Array:
    """(N, 2) indices (chosen, rejected) of all pairs with the chosen response of bin i and the rejected one of bin j.

    golden (K,) is sorted from the best down and cut into ``bins`` of equal size (the first ones have one more where K does
    not divide), so bin 0 holds the best and i <= j. Equal golden values make no pair; i = j: the pairs within the bin.
    """
    golden = np.asarray(golden, dtype=float)
    if golden.ndim != 1 or not 0 <= i <= j < bins <= len(golden):
        raise ValueError(f"need golden (K,) and 0 <= i <= j < bins <= K: {golden.shape}, i {i}, j {j}, bins {bins}")
    parts = np.array_split(np.argsort(-golden, kind="stable"), bins)
    chosen, rejected = np.repeat(parts[i], len(parts[j])), np.tile(parts[j], len(parts[i]))
    return np.stack([chosen, rejected], axis=1)[golden[chosen] > golden[rejected]]


# ---- what becomes of a policy -------------------------------------------------------------------------------------


def kl_best_of(n: int) -> float:
    """KL between the best of n and a single sample, log n - (n - 1) / n: for continuous scores, fresh samples."""
    return math.log(n) - (n - 1) / n


def normal_max(n: int) -> float:
    """Expected largest of n standard normal values, m_n: by the trapezoid rule, to about 1e-9."""
    x = np.linspace(-12, 12, 4801)
    cdf = np.array([(1 + math.erf(v / math.sqrt(2))) / 2 for v in x])
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return float((x * n * density * cdf ** (n - 1)).sum() * (x[1] - x[0]))


def ndr(proxy: float, start: float, gold: float, se: float | None = None) -> float:
    """Normalised drop ratio (J_proxy - J_start) / (J_gold - J_start); regret is 1 - NDR.

    Expected golden reward of the policy optimised on the proxy, of the start, and of the policy optimised on the golden
    reward itself. 1: nothing is lost, 0: no better than the start, below 0: worse; it may exceed 1. arXiv 2410.05584 has
    these ingredients; that higher is better is alignkit's choice of orientation.

    Args:
        se: standard error of the denominator.

    Raises:
        ValueError: the denominator is not above 0, or not above its standard error.
    """
    gain = gold - start
    if not gain > max(se or 0.0, 0.0):
        raise ValueError(f"NDR needs a golden policy better than the start: the gain is {gain:.4g}, its error {se}")
    return (proxy - start) / gain


def rho_of_accuracy(accuracy: Any) -> Any:
    """Correlation of golden and proxy, sin(pi (accuracy - 1/2)), in [-1, 1].

    For jointly normal rewards (Sheppard's formula). Then NDR is this correlation for every optimiser that sees the
    proxy only: E[golden | proxy] = rho proxy, both in units of their standard deviation.
    """
    return np.sin(np.pi * (np.asarray(accuracy, dtype=float) - 0.5))


def accuracy_of_rho(rho: Any) -> Any:
    """The inverse: 1/2 + arcsin(rho) / pi."""
    return 0.5 + np.arcsin(np.asarray(rho, dtype=float)) / np.pi


# ---- parts --------------------------------------------------------------------------------------------------------


def _lists(golden: Array, proxy: Array) -> tuple[Array, Array]:
    golden, proxy = np.asarray(golden, dtype=float), np.asarray(proxy, dtype=float)
    if golden.ndim < 1 or golden.shape != proxy.shape or not golden.size:
        raise ValueError(f"golden and proxy must be lists of one shape (..., K): {golden.shape} and {proxy.shape}")
    if not (np.isfinite(golden).all() and np.isfinite(proxy).all()):
        raise ValueError("golden and proxy must be finite")
    return golden, proxy


def _vector(margins: Array) -> Array:
    margins = np.asarray(margins, dtype=float)
    if margins.ndim != 1 or not len(margins) or np.isnan(margins).any():
        raise ValueError(f"margins must be (N,) numbers, at least one; has shape {margins.shape}")
    return margins


def _right(margins: Array) -> Array:
    return (margins > 0) + 0.5 * (margins == 0)


def _counts(x: Array) -> tuple[Array, Array]:
    """How many of a list's values are below each value, and how many at most as large (itself among them)."""
    flat = x.reshape(-1, x.shape[-1])
    found = [
        (np.searchsorted(s, r, "left"), np.searchsorted(s, r, "right"))
        for r, s in zip(flat, np.sort(flat), strict=True)
    ]
    below, upto = (np.array(part).reshape(x.shape) for part in zip(*found, strict=True))
    return below, upto


def _signs(x: Array) -> Array:
    """(..., K, K) int8 sign of x_i - x_j, by comparison so that no difference is lost to rounding."""
    own, other = x[..., :, None], x[..., None, :]
    return (own > other).astype(np.int8) - (own < other).astype(np.int8)


def _centred(x: Array) -> Array:
    x = x - x[..., :1]  # equal values become exact zeros
    return x - x.mean(-1, keepdims=True)


def _ratio(above: Any, below: Any) -> Any:
    """above / below, nan where below is 0."""
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)[()]
