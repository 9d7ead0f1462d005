"""A study on synthetic rewards: does a reward model's accuracy predict the policy that is optimised against it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from alignkit import ranking
from alignkit.errors import need

Array = np.ndarray


@dataclass
class Measured:
    """M reward models on P prompts."""

    right: Array  # (M, P) accuracy on all pairs of a prompt's candidates
    start: Array  # (P,) golden value of the uniform policy
    best: dict[str, Array]  # optimiser → (P,) that of the policy optimised on the golden reward
    reached: dict[str, Array]  # optimiser → (M, P) that of the policy optimised on each reward model
    kl: dict[
        str, Array
    ]  # optimiser → (1 + M,) mean KL of these policies from the uniform one, the golden reward's first

    def error(self, optimiser: str) -> float:
        """Standard error of the mean gain over prompts."""
        gain = self.best[optimiser] - self.start
        return float(gain.std(ddof=1) / math.sqrt(len(gain)))


@dataclass(kw_only=True)
class NDR:
    """Does accuracy predict policy quality? Reward models of several families, their accuracy and normalised drop ratio.

    The question and the measure are those of arXiv 2410.05584; the text was not at hand, and this experiment is
    alignkit's: a bandit of prompts and candidate responses with feature vectors, no language model. The golden reward of
    the candidates is standard normal (mapped by rank, which leaves preferences as they are), every reward model is
    scaled to unit variance, and each is optimised by best-of-n over the candidates and by the exact policy gradient of a
    softmax over them, from the uniform policy, without a KL penalty.

    Families, each with strengths from weak to the setting's value: ``regressional`` golden plus normal noise; ``length``
    golden plus a bonus on a feature with a long tail, equally large; ``flips`` trained with flipped labels; ``missing``
    trained without some features; ``truncated`` trained on the worse responses only.

    If golden and proxy are jointly normal, NDR is rho = sin(pi (accuracy - 1/2)) under either optimiser, in expectation
    over prompts, whatever the number of candidates (a subset of independent draws is independent draws). So the
    regressional family must lie on that line; what the others do is measured. The policy gradient takes the same steps
    for every reward model: early on, NDR also tells how fast the shape of its scores lets it go (column ``kl``); with
    many steps it ends at the candidate that scores best. Intervals are 95 % bootstrap intervals over reward models
    (within families) and prompts; those of correlations over reward models alone.
    """

    prompts: int = 200  # of the bandit; candidates are drawn afresh for each
    candidates: int = 64  # responses to a prompt that are ranked and chosen from
    features: int = 8  # of a response, standard normal; one more is its length, which the golden reward ignores
    golden: Literal["mlp", "linear"] = "mlp"  # what the golden reward is of the features, before the map by rank
    models: int = 12  # reward models in a family
    noise: float = 2.0  # largest noise (regressional) or bonus (length), in standard deviations of the golden reward
    flips: float = 0.4  # largest share of flipped labels
    cut: float = 0.9  # largest share of responses, the best ones, that training never sees (truncated)
    pairs: int = 2000  # training pairs of a reward model
    hidden: int = 16  # units of a trained reward model; 0: linear
    train_steps: int = 150  # of Adam on all pairs at once
    train_rate: float = 0.03  # learning rate of Adam
    best_of: tuple[int, ...] = (2, 4, 16, 64)  # n of best-of-n, drawn from the candidates without replacement
    pg_steps: tuple[int, ...] = (40, 200)  # of the policy gradient, looked at after each
    pg_rate: float = 1.0  # its step size on the logits
    responses: tuple[int, ...] = (2, 4, 8, 16, 64)  # to a prompt, in variants of accuracy; 2: one random pair
    bins: int = 4  # of the golden ranking, in variants of accuracy
    resamples: int = 1000  # behind the intervals
    families: ClassVar[tuple[str, ...]] = ("regressional", "length", "flips", "missing", "truncated")

    def __post_init__(self) -> None:
        need(
            self, "prompts >= 2", "candidates >= 5", "features >= 2", "models >= 3", "noise > 0", "flips > 0",
            "flips < 0.5", "cut > 0", "cut < 1", "pairs >= 1", "hidden >= 0", "train_steps >= 0", "train_rate > 0",
            "pg_rate > 0", "bins >= 1", "resamples >= 1",
        )  # fmt: skip
        if self.golden not in ("mlp", "linear"):
            raise ValueError(f"golden must be mlp or linear, is '{self.golden}'")
        for name, sizes in (("best_of", self.best_of), ("responses", self.responses), ("bins", [max(2, self.bins)])):
            if not sizes or min(sizes) < 2 or max(sizes) > self.candidates:
                raise ValueError(f"{name} must be between 2 and candidates ({self.candidates}), is {list(sizes)}")
        if not self.pg_steps or min(self.pg_steps) < 1:
            raise ValueError(f"pg_steps must be at least 1, is {list(self.pg_steps)}")

    def run(self, seed: int) -> dict[str, Any]:
        """Tables (name → rows), summary (metric → value, low, high) and the verdict."""
        golden, proxies, strengths = self.world(seed)
        seen = self.measure(golden, proxies)
        rng = np.random.default_rng([seed, 7])
        counts = rng.multinomial(self.prompts, np.full(self.prompts, 1 / self.prompts), size=self.resamples)
        weights = np.concatenate([np.ones((1, self.prompts)), counts]) / self.prompts  # the first row is the estimate
        first = np.repeat(np.arange(len(self.families)) * self.models, self.models)  # model of each model's family
        drawn = first + rng.integers(self.models, size=(self.resamples, len(first)))
        drawn = np.concatenate([np.arange(len(first))[None], drawn])
        family = [name for name in self.families for _ in range(self.models)]

        proxy_rows = [
            {"family": f, "strength": float(s), **row}
            for f, s, row in zip(family, strengths, self._proxy_rows(seen), strict=True)
        ]
        family_rows, scatters = self._family_rows(seen, np.array(family), weights, drawn)
        tables = {
            "families": family_rows,
            "correlations": self._correlation_rows([self.variants(golden, p) for p in proxies], proxy_rows, drawn),
            "optimisers": self._optimiser_rows(seen),
            "proxies": proxy_rows,
        }
        return {"tables": tables, "summary": _summary(tables), "verdict": self._verdict(family_rows, scatters)}

    def measure(self, golden: Array, proxies: Array) -> Measured:
        """Accuracy and the optimised policies' golden values, of golden (P, K) and proxies (M, P, K)."""
        policies = [self.optimise(scores) for scores in (golden, *proxies)]
        values = {k: np.stack([(p[k] * golden).sum(-1) for p in policies]) for k in policies[0]}
        return Measured(
            right=np.stack([ranking.pair_accuracy(golden, proxy) for proxy in proxies]),
            start=golden.mean(-1),
            best={k: v[0] for k, v in values.items()},
            reached={k: v[1:] for k, v in values.items()},
            kl={k: np.array([_kl_from_uniform(p[k]) for p in policies]) for k in values},
        )

    def world(self, seed: int) -> tuple[Array, Array, Array]:
        """Golden rewards (P, K), the reward models' scores (M, P, K), family by family, and their strengths (M,)."""
        draws = [np.random.default_rng([seed, i]) for i in range(7)]  # apart, so that a setting moves its own part only
        value = self._golden(draws[0])
        x = self._responses(draws[1], (self.prompts, self.candidates))
        golden = _normal_scores(value(x))
        level = (1 + np.arange(self.models)) / self.models

        noise = draws[2].standard_normal((self.models, *golden.shape))
        scores = [golden + s * self.noise * z for s, z in zip(level, noise, strict=True)]
        scores += [golden + s * self.noise * x[..., -1] for s in level]

        both = self._responses(draws[3], (self.pairs, 2))  # one set of pairs for all
        clean = value(both)[:, 0] > value(both)[:, 1]
        dropped = np.ceil(level * (self.features - 1)).astype(int)
        trained = [
            (both, clean ^ (draws[4].random(self.pairs) < s * self.flips), self._keep(draws[4], 0)) for s in level
        ]
        trained += [(both, clean, self._keep(draws[4], n)) for n in dropped]
        for s in level:
            pool = self._responses(draws[5], (math.ceil(2 * self.pairs / (1 - s * self.cut)),))
            worst = draws[5].permutation(np.argsort(value(pool))[: 2 * self.pairs])
            low = pool[worst].reshape(self.pairs, 2, -1)
            trained.append((low, value(low)[:, 0] > value(low)[:, 1], self._keep(draws[5], 0)))
        scores += self._train(trained, x, draws[6])
        proxies = np.stack(scores)
        proxies = (proxies - proxies.mean((1, 2), keepdims=True)) / proxies.std((1, 2), keepdims=True)
        return (
            golden,
            proxies,
            np.concatenate([level * self.noise] * 2 + [level * self.flips, dropped, level * self.cut]),
        )

    def optimise(self, scores: Array) -> dict[str, Array]:
        """Optimiser → policy (P, K), the chance of each candidate, from scores (P, K); before optimising it is 1 / K."""
        policies = {f"best_of_{n}": ranking.best_of_policy(scores, n) for n in self.best_of}
        logits, policy = np.zeros_like(scores), np.full_like(scores, 1 / scores.shape[-1])
        for step in range(1, max(self.pg_steps) + 1):
            logits += self.pg_rate * policy * (scores - (policy * scores).sum(-1, keepdims=True))
            policy = _softmax(logits)
            if step in self.pg_steps:
                policies[f"policy_gradient_{step}"] = policy
        return policies

    def variants(self, golden: Array, proxy: Array) -> dict[str, float]:
        """Accuracy and other measures of a proxy (P, K), means over prompts.

        ``responses_k``: all pairs of k responses a prompt; ``budget_k``: as few prompts as make it as many responses as two
        a prompt; ``bins_i_j``: chosen from bin i, rejected from bin j of the golden ranking, 0 the best.
        ``ece`` depends on the scale of the scores, here unit variance.
        """
        found = {}
        for k in self.responses:
            right = ranking.pair_accuracy(golden[:, :k], proxy[:, :k])
            found[f"responses_{k}"] = float(right.mean())
            if k > 2:
                found[f"budget_{k}"] = float(right[: max(1, 2 * self.prompts // k)].mean())
        for i in range(self.bins):
            for j in range(i, self.bins):
                found[f"bins_{i}_{j}"] = ranking.accuracy(_margins(golden, proxy, self.bins, i, j))
        for measure in (ranking.pearson, ranking.spearman, ranking.kendall, ranking.xi, ranking.mrr, ranking.ndcg):
            found[measure.__name__] = float(measure(golden, proxy).mean())
        found["best_of_5"] = float(ranking.best_of(golden, proxy, 5).mean())
        found["ece"] = ranking.ece(_margins(golden, proxy, 1, 0, 0))
        return found

    def _responses(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Feature vectors (*shape, features + 1): standard normal, and at the end length: exponential, mean 0, variance 1."""
        return np.concatenate([rng.standard_normal((*shape, self.features)), rng.exponential(size=(*shape, 1)) - 1], -1)

    def _golden(self, rng: np.random.Generator) -> Any:
        """The golden reward of feature vectors (..., features + 1) → (...), before the map by rank."""
        if self.golden == "linear":
            direction = rng.standard_normal(self.features)
            return lambda x: x[..., :-1] @ direction
        inner = 2 * rng.standard_normal((self.features, 8)) / math.sqrt(self.features)
        shift, outer = rng.standard_normal(8), rng.standard_normal(8)
        return lambda x: np.tanh(x[..., :-1] @ inner + shift) @ outer

    def _keep(self, rng: np.random.Generator, dropped: int) -> Array:
        """(features + 1,) 1 for what a reward model sees, 0 for ``dropped`` features at random; it always sees the length."""
        return (np.append(rng.permutation(self.features), self.features) >= dropped).astype(float)

    def _train(self, sets: list[tuple[Array, Array, Array]], x: Array, rng: np.random.Generator) -> list[Array]:
        """Scores of x by a reward model for each (pairs (N, 2, F), whether the first is preferred (N,), features it sees)."""
        scores = []
        for pairs, first, keep in sets:
            sign = torch.tensor(np.where(first, 1.0, -1.0))
            model = [rng.standard_normal(keep.shape) / 10] if not self.hidden else [
                rng.standard_normal((len(keep), self.hidden)) / math.sqrt(len(keep)),
                np.zeros(self.hidden),
                rng.standard_normal(self.hidden) / math.sqrt(self.hidden),
            ]  # fmt: skip
            weights = [torch.tensor(w, requires_grad=True) for w in model]
            adam = torch.optim.Adam(weights, lr=self.train_rate)
            data = torch.tensor(pairs * keep)
            for _ in range(self.train_steps):
                adam.zero_grad()
                out = _reward(weights, data)
                torch.nn.functional.softplus(-sign * (out[:, 0] - out[:, 1])).mean().backward()
                adam.step()
            with torch.no_grad():
                scores.append(_reward(weights, torch.tensor(x * keep)).numpy())
        return scores

    def _optimiser_rows(self, seen: Measured) -> list[dict[str, Any]]:
        """What each optimiser does with the golden reward: KL from the uniform policy, gain and its standard error."""
        return [
            {"optimiser": name, "kl": float(seen.kl[name][0]), "gain": float((best - seen.start).mean()),
             "gain_error": seen.error(name)}
            for name, best in seen.best.items()
        ]  # fmt: skip

    def _proxy_rows(self, seen: Measured) -> list[dict[str, Any]]:
        """A row for each reward model: accuracy, the correlation that it predicts, NDR by optimiser."""
        rows = []
        for m, accuracy in enumerate(seen.right.mean(1)):
            row = {"accuracy": float(accuracy), "rho": float(ranking.rho_of_accuracy(accuracy))}
            for name, best in seen.best.items():
                reached, start, gold = (float(v.mean()) for v in (seen.reached[name][m], seen.start, best))
                row[f"ndr_{name}"] = ranking.ndr(reached, start, gold, se=seen.error(name))
            rows.append(row)
        return rows

    def _family_rows(
        self, seen: Measured, family: Array, weights: Array, drawn: Array
    ) -> tuple[list[dict[str, Any]], dict[tuple[str, str], Array]]:
        """A row for each optimiser and family (and all), and the resampled scatters; weights (B, P), drawn (B, M)."""
        rows, scatters = [], {}
        accuracy = np.take_along_axis(weights @ seen.right.T, drawn, 1)
        rho = ranking.rho_of_accuracy(accuracy)
        for name, best in seen.best.items():
            start = weights @ seen.start
            reached = weights @ seen.reached[name].T - start[:, None]
            ndr = np.take_along_axis(reached / (weights @ best - start)[:, None], drawn, 1)
            for group in (*self.families, "all"):
                of = np.flatnonzero((family == group) | (group == "all"))
                scatters[name, group] = _scatter(rho[:, of], ndr[:, of])
                values = {"accuracy": accuracy, "rho": rho, "ndr": ndr, "residual": ndr - rho}
                means = {k: v[:, of].mean(1) for k, v in values.items()}
                columns = _columns({**means, "scatter": scatters[name, group]})
                rows.append({"family": group, "optimiser": name, "kl": float(seen.kl[name][1 + of].mean()), **columns})
        return rows, scatters

    def _correlation_rows(
        self, variants: list[dict[str, float]], proxy_rows: list[dict[str, Any]], drawn: Array
    ) -> list[dict[str, Any]]:
        """A row for each variant of accuracy and optimiser: how its order of all reward models goes with NDR's."""
        rows = []
        for variant in variants[0]:
            x = np.array([v[variant] for v in variants])[drawn]
            for name in [k for k in proxy_rows[0] if k.startswith("ndr_")]:
                y = np.array([row[name] for row in proxy_rows])[drawn]
                columns = _columns({"kendall": ranking.kendall(x, y), "spearman": ranking.spearman(x, y)})
                rows.append({"measure": variant, "optimiser": name.removeprefix("ndr_"), **columns})
        return rows

    def _verdict(self, rows: list[dict[str, Any]], scatters: dict[tuple[str, str], Array]) -> str:
        """Whether the regressional family lies on the line, and what the others do."""
        regressional = [r for r in rows if r["family"] == "regressional"]
        off = [r for r in regressional if not r["residual_low"] <= 0 <= r["residual_high"]]
        parts = [f"regressional: off NDR = rho under {r['optimiser']}, by {_text(r, 'residual')}" for r in off] or [
            "regressional: on NDR = rho within its interval, under every optimiser"
        ]
        names = [r["optimiser"] for r in regressional]
        hardest = f"best_of_{max(self.best_of)}"
        for group in (*self.families[1:], "all"):
            mine = {r["optimiser"]: r for r in rows if r["family"] == group}
            residuals = [f"{_text(mine[n], 'residual')} ({n})" for n in names if n == hardest or "gradient" in n]
            more = {n: scatters[n, group] - scatters[n, "regressional"] for n in names}
            grows = [n for n in names if np.percentile(more[n][1:], 2.5) > 0]
            under = "every optimiser" if len(grows) == len(names) else ", ".join(grows) or "none"
            parts.append(
                f"{group}: mean residual {', '.join(residuals)}; more scatter at equal accuracy than regressional "
                f"under {under}"
            )
        return ". ".join(parts) + "."


def _reward(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Scores (...) of x (..., F) under a linear model (one weight) or one with a hidden layer (three)."""
    if len(weights) == 1:
        return x @ weights[0]
    inner, shift, outer = weights
    return torch.tanh(x @ inner + shift) @ outer


def _normal_scores(values: Array) -> Array:
    """The values mapped by rank to a standard normal distribution."""
    order = torch.tensor(values).flatten().argsort().argsort().double()
    return torch.special.ndtri((order + 0.5) / len(order)).reshape(values.shape).numpy()


def _softmax(logits: Array) -> Array:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _kl_from_uniform(policy: Array) -> float:
    """Mean over prompts of a policy's (P, K) KL from 1 / K."""
    k = policy.shape[-1]
    return float((policy * np.log(np.maximum(policy * k, 1e-300))).sum(-1).mean())


def _margins(golden: Array, proxy: Array, bins: int, i: int, j: int) -> Array:
    """(N,) proxy margins of a bin's pairs of all prompts."""
    pairs = [ranking.rank_bins(g, bins, i, j) for g in golden]
    return np.concatenate([p[c[:, 0]] - p[c[:, 1]] for p, c in zip(proxy, pairs, strict=True)])


def _scatter(rho: Array, ndr: Array) -> Array:
    """(B,) deviation of NDR from its own straight line in rho, both (B, M): what models of equal accuracy differ by."""
    m = rho.shape[1]
    r = np.nan_to_num(ranking.pearson(rho, ndr))  # of one model drawn M times there is no line
    return ndr.std(1) * np.sqrt((1 - r * r).clip(0) * m / (m - 2))


def _columns(values: dict[str, Array]) -> dict[str, float]:
    """NAME, NAME_low and NAME_high of each (1 + B,): the estimate, then its resamples."""
    found: dict[str, float] = {}
    for name, v in values.items():
        low, high = np.percentile(v[1:], [2.5, 97.5])
        found |= {name: float(v[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _text(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:+.3f} [{row[name + '_low']:+.3f}, {row[name + '_high']:+.3f}]"


def _summary(tables: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The families' residuals and scatters, and how well accuracy (on the fewest responses, on all, on all of fewer prompts) goes with NDR."""
    chosen = {
        f"{m}/{r['family']}/{r['optimiser']}": (r, m) for m in ("residual", "scatter") for r in tables["families"]
    }
    sizes = [r["measure"] for r in tables["correlations"] if r["measure"].startswith("responses_")]
    chosen |= {
        f"{m}/{r['measure']}/{r['optimiser']}": (r, m)
        for m in ("kendall", "spearman") for r in tables["correlations"] if r["measure"] in (sizes[0], sizes[-1], sizes[-1].replace("responses", "budget"))
    }  # fmt: skip
    return {k: {"value": r[m], "low": r[f"{m}_low"], "high": r[f"{m}_high"]} for k, (r, m) in chosen.items()}
