"""Held-out nats a token: what they are a ratio of, and that nothing picks the highest."""

from __future__ import annotations

import json

import pytest
from running import SMALL_CAUSAL, SMALL_SFT, composed, lines, train

from alignkit import metrics
from alignkit.config import check
from alignkit.errors import UserError


def test_nll_is_a_ratio_of_sums(policy, rows) -> None:
    """Against the log-probabilities themselves, for a policy that is not steered."""
    batch = policy.demonstrations(rows(6))
    logprobs = policy.forward(batch).detach()
    for i, (nats, tokens) in enumerate(policy.nll(rows(6))):
        assert tokens == int(batch.lengths[i])
        assert nats == pytest.approx(-float(logprobs[i].sum()), rel=1e-5)
    with pytest.raises(UserError, match="held-out row 0 has no response"):
        policy.nll([{**rows(1)[0], "response": None}])


def test_the_metric_is_over_all_rows_together() -> None:
    """3 nats of 4 tokens, not the mean of 2 and 1 / 3; of the second system 1 of 4, so .5 less."""
    one, other = (
        metrics.sentences(["a", "b"], [["a"], ["c"]], None, nll) for nll in ([(2.0, 1), (1.0, 3)], [(0.5, 1), (0.5, 3)])
    )
    found = metrics.summary(one, 200)["nll"]
    assert (found["value"], found["n"]) == (0.75, 2)
    assert (found["low"], found["high"]) == (pytest.approx(1 / 3), 2.0)  # a resample of one row alone is not rare
    assert metrics.difference(one, other, 200)["nll"]["value"] == -0.5
    assert metrics.pairs([0.0, 0.0], [(1, 1), (1, 2)], ["p", "p"]).n("nll") == 2  # of pairs it is another one


def test_a_run_reports_it_before_and_after(tmp_path) -> None:
    _, start = train(tmp_path, *SMALL_SFT, *SMALL_CAUSAL)
    words = [
        *SMALL_SFT,
        *SMALL_CAUSAL,
        f"model.path={start}",
        "evaluate.nll=true",
        "evaluate.every=2",
        "algo.lr=1e-2",
        "algo.warmup=0",
    ]
    result, run = train(tmp_path, *words, "evaluate.final=last")
    before, after = (result["evaluation"][when]["test"]["nll"]["value"] for when in ("before", "after"))
    assert result["evaluation"]["after"]["difference"]["nll"]["value"] == pytest.approx(after - before)
    assert after < before
    assert [m["step"] for m in lines(run / "metrics.jsonl") if "dev/nll" in m] == [0, 2, 4, 6]
    entries = [json.loads(line) for line in (run / "outputs-after.jsonl").read_text().splitlines()]
    assert sum(e["nll"][0] for e in entries) / sum(e["nll"][1] for e in entries) == pytest.approx(after)


def test_it_cannot_pick_the_best() -> None:
    with pytest.raises(UserError, match=r"evaluate\.select: must be one of"):
        check(composed([*SMALL_SFT, *SMALL_CAUSAL, "evaluate.nll=true", "evaluate.select=nll"]))
