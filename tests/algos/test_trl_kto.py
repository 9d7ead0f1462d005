"""TRL's KTO: each response by itself, in an order that the seed decides."""

from __future__ import annotations

import pytest

from alignkit.algos.trl_kto import TrlKTO
from alignkit.errors import UserError


def test_a_pair_is_two_responses(tiny_causal, rows):
    pairs = [{**row, "chosen": row["response"], "rejected": "no"} for row in rows(4)]
    given = TrlKTO().dataset(tiny_causal, pairs, 3)
    assert sorted((one["prompt"].strip(), one["completion"].strip(), one["label"]) for one in given) == sorted(
        (row["prompt"], text, good) for row in pairs for text, good in ((row["chosen"], True), ("no", False))
    )
    assert given == TrlKTO().dataset(tiny_causal, pairs, 3) != TrlKTO().dataset(tiny_causal, pairs, 4)
    assert [one["label"] for one in given] != [True, False] * 4, "neighbours do not answer the same prompt"


def test_single_responses_keep_their_judgement(tiny_causal, rows):
    judged = [{**row, "desirable": row["id"] % 3 == 0} for row in rows(5)]
    given = TrlKTO().dataset(tiny_causal, judged, 0)
    assert {one["prompt"].strip(): one["label"] for one in given} == {r["prompt"]: r["desirable"] for r in judged}


def test_settings_and_rows():
    algo = TrlKTO(batch_size=6, desirable_weight=1.5)
    assert (algo.per_step(2), algo.per_step(1), algo.arguments()["desirable_weight"]) == (12, 6, 1.5)
    with pytest.raises(UserError, match=r"data\.desirable"):
        algo.prepare([{"prompt": "a", "response": "b"}], ("response",))
    with pytest.raises(ValueError, match="beta must be above 0"):
        TrlKTO(beta=0)
