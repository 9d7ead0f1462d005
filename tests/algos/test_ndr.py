"""The study of accuracy and policy quality, at small sizes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from alignkit import ranking
from alignkit.algos.ndr import NDR

SMALL: dict[str, Any] = {
    "prompts": 60, "candidates": 16, "models": 4, "pairs": 300, "train_steps": 40,
    "best_of": (2, 16), "pg_steps": (10, 40), "responses": (2, 4), "bins": 2, "resamples": 200,
}  # fmt: skip
OPTIMISERS = ["best_of_2", "best_of_16", "policy_gradient_10", "policy_gradient_40"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return NDR(**SMALL).run(0)


def ratios(study: NDR, golden: np.ndarray, proxy: np.ndarray) -> list[float]:
    """NDR of one proxy under each optimiser."""
    seen = study.measure(golden, proxy[None])
    means = [(seen.reached[o].mean(), seen.start.mean(), seen.best[o].mean(), seen.error(o)) for o in OPTIMISERS]
    return [ranking.ndr(*m) for m in means]


def test_tables(found: dict[str, Any]) -> None:
    tables = found["tables"]
    assert [r["optimiser"] for r in tables["optimisers"]] == OPTIMISERS
    assert len(tables["proxies"]) == 5 * 4
    assert len(tables["families"]) == (5 + 1) * 4
    # responses_2, responses_4, budget_4, three pairs of bins, six correlations and such, best_of_5, ece
    assert len(tables["correlations"]) == (3 + 3 + 6 + 2) * 4
    for row in tables["families"]:
        assert row["residual"] == pytest.approx(row["ndr"] - row["rho"])
        assert row["ndr_low"] <= row["ndr"] <= row["ndr_high"]
    for value in found["summary"].values():
        assert set(value) == {"value", "low", "high"}
    assert found["summary"]["residual/flips/best_of_2"]["value"] == tables["families"][2]["residual"]
    assert all(family in found["verdict"] for family in NDR.families)
    json.dumps(found, allow_nan=False)


def test_rows_agree(found: dict[str, Any]) -> None:
    """A family's row is the mean of its reward models'."""
    proxies, rows = found["tables"]["proxies"], found["tables"]["families"]
    for row in rows:
        mine = [p for p in proxies if row["family"] in (p["family"], "all")]
        assert row["ndr"] == pytest.approx(np.mean([p[f"ndr_{row['optimiser']}"] for p in mine]))
        assert row["accuracy"] == pytest.approx(np.mean([p["accuracy"] for p in mine]))


def test_one_seed_one_result(found: dict[str, Any]) -> None:
    assert NDR(**SMALL).run(0) == found
    assert NDR(**SMALL).run(1)["tables"] != found["tables"]


def test_a_setting_moves_its_own_part_only() -> None:
    golden, proxies, _ = NDR(**SMALL).world(0)
    other_golden, other, _ = NDR(**{**SMALL, "flips": 0.1}).world(0)
    assert np.array_equal(golden, other_golden)
    changed = np.abs(proxies - other).max((1, 2)) > 0
    assert changed.tolist() == [False] * 8 + [True] * 4 + [False] * 8


def test_rewards_are_scaled() -> None:
    golden, proxies, strengths = NDR(**SMALL).world(0)
    assert golden.shape == (60, 16) and proxies.shape == (20, 60, 16) and strengths.shape == (20,)
    assert abs(golden.mean()) < 1e-9 and abs(golden.std() - 1) < 0.01
    np.testing.assert_allclose(proxies.std((1, 2)), 1)
    assert len(np.unique(golden)) == golden.size
    by_family = [[0.5, 1, 1.5, 2], [0.5, 1, 1.5, 2], [0.1, 0.2, 0.3, 0.4], [2, 4, 6, 7], [0.225, 0.45, 0.675, 0.9]]
    np.testing.assert_allclose(strengths.reshape(5, 4), by_family)


def test_golden_random_and_reversed_proxies() -> None:
    """NDR 1; about 0, within 4 standard errors; about -1, since normal values are alike upside down."""
    study = NDR(**{**SMALL, "prompts": 400})
    golden, _, _ = study.world(0)
    assert ratios(study, golden, golden) == [1.0] * 4
    random = np.random.default_rng(1).standard_normal(golden.shape)
    policies = study.optimise(random)
    for ratio, o in zip(ratios(study, golden, random), OPTIMISERS, strict=True):
        gains = (policies[o] * golden).sum(-1) - golden.mean(-1)
        best = (study.optimise(golden)[o] * golden).sum(-1) - golden.mean(-1)
        assert abs(ratio) < 4 * gains.std() / math.sqrt(400) / best.mean()
    np.testing.assert_allclose(ratios(study, golden, -golden), -1, atol=0.1)


def test_golden_gains_are_those_of_normal_values() -> None:
    """Best of n gains m_n (the card's numbers), also where n is all candidates; within 4 standard errors."""
    study = NDR(**{**SMALL, "prompts": 400})
    golden, proxies, _ = study.world(0)
    seen = study.measure(golden, proxies[:1])
    for o, wanted in (("best_of_2", 0.56419), ("best_of_16", 1.76599)):
        assert abs((seen.best[o] - seen.start).mean() - wanted) < 4 * seen.error(o)


@pytest.mark.parametrize("form", ["mlp", "linear"])
def test_the_regressional_family_is_on_the_line(form: str) -> None:
    """NDR = 1 / sqrt(1 + s^2) = sin(pi (accuracy - 1/2)) for each noise s and optimiser, within 4 standard errors."""
    study = NDR(**{**SMALL, "prompts": 800, "golden": form, "train_steps": 0})
    golden, proxies, strengths = study.world(0)
    seen = study.measure(golden, proxies[:4])
    for m in range(4):
        rho = 1 / math.sqrt(1 + strengths[m] ** 2)
        wanted = 0.5 + math.asin(rho) / math.pi
        assert abs(seen.right[m].mean() - wanted) < 4 * seen.right[m].std() / math.sqrt(800)
        for o in OPTIMISERS:
            best, reached = seen.best[o] - seen.start, seen.reached[o][m] - seen.start
            error = (reached - rho * best).std() / math.sqrt(800) / best.mean()  # of a ratio of means
            assert abs(reached.mean() / best.mean() - rho) < 4 * error, (rho, o)


def test_left_out_features_stay_on_the_line_where_all_is_normal() -> None:
    """Linear golden, linear reward models, normal features: jointly normal, so no Goodhart effect but the regressional."""
    study = NDR(**{**SMALL, "prompts": 400, "golden": "linear", "hidden": 0, "train_steps": 150})
    golden, proxies, _ = study.world(0)
    seen = study.measure(golden, proxies[12:16])
    for m in range(4):
        rho = ranking.rho_of_accuracy(seen.right[m].mean())
        for o in OPTIMISERS:
            best, reached = seen.best[o] - seen.start, seen.reached[o][m] - seen.start
            error = (reached - rho * best).std() / math.sqrt(400) / best.mean()
            assert abs(reached.mean() / best.mean() - rho) < 4 * error, (m, o)


def test_a_long_tail_is_worse_than_accuracy_says() -> None:
    """Choosing the best of 16 finds the longest; the best of 2 does so less."""
    study = NDR(**{**SMALL, "prompts": 400, "train_steps": 0})
    golden, proxies, _ = study.world(0)
    seen = study.measure(golden, proxies[5:6])  # a bonus as large as the golden reward
    short = [
        ranking.rho_of_accuracy(seen.right.mean()) - seen.reached[o].mean() / seen.best[o].mean()
        for o in OPTIMISERS[:2]
    ]
    assert short[1] > short[0] > 0 and short[1] > 0.15


def test_flipped_labels_make_worse_reward_models() -> None:
    study = NDR(**{**SMALL, "prompts": 200, "pairs": 1000, "train_steps": 100})
    golden, proxies, _ = study.world(0)
    right = [ranking.pair_accuracy(golden, p).mean() for p in proxies[8:12]]
    assert right == sorted(right, reverse=True) and right[0] > 0.8


def test_policies_are_distributions() -> None:
    study = NDR(**SMALL)
    proxies = study.world(0)[1]
    for policy in study.optimise(proxies[0]).values():
        np.testing.assert_allclose(policy.sum(-1), 1)
        assert policy.min() >= 0


def test_one_step_of_the_policy_gradient() -> None:
    """Scores 1, 0 at the uniform policy: gradient p (r - J) = ±1/4, logits ±1/2 at rate 2, policy sigmoid(1)."""
    policy = NDR(**{**SMALL, "best_of": (2,), "pg_steps": (1,), "pg_rate": 2.0}).optimise(np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(policy["policy_gradient_1"][0, 0], 1 / (1 + math.exp(-1)))


def test_many_steps_of_the_policy_gradient_end_at_the_best_score() -> None:
    study = NDR(**{**SMALL, "pg_steps": (5, 5000)})
    scores = study.world(0)[1][0]
    late = study.optimise(scores)["policy_gradient_5000"]
    assert (late.argmax(-1) == scores.argmax(-1)).all()
    seen = study.measure(scores, scores[None])
    early, end = seen.kl["policy_gradient_5"], seen.kl["policy_gradient_5000"]
    assert early[0] == early[1] < end[0] and end[0] == pytest.approx(math.log(16), abs=0.1)


def test_equal_budget_is_fewer_prompts() -> None:
    """60 prompts of 2 responses are 30 of 4: a proxy that is golden on those and reversed on the others is right."""
    study = NDR(**SMALL)
    golden, _, _ = study.world(0)
    proxy = np.concatenate([golden[:30], -golden[30:]])
    variants = study.variants(golden, proxy)
    assert (variants["budget_4"], variants["responses_4"], variants["responses_2"]) == (1.0, 0.5, 0.5)
    assert variants["bins_0_1"] == 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": 1}, {"noise": 0.0}, {"flips": 0.5}, {"cut": 1.0}, {"models": 2}, {"best_of": (2, 17)},
        {"responses": (1,)}, {"bins": 17}, {"golden": "tree"}, {"resamples": 0}, {"best_of": ()}, {"pg_steps": (0, 5)},
    ],
)  # fmt: skip
def test_ranges(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NDR(**{**SMALL, **wrong})
