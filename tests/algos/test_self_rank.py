"""Self-ranking: by the model's own critique (srt.md), and sharpening by likelihood and majority (sharpening.md)."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from critical import SCORES, ask, critical_policy

from alignkit.algos.self_rank import SelfRank
from alignkit.critique import FEEDBACK
from alignkit.errors import UserError
from alignkit.policy import Policy


def ranks(policy: Policy, rows: list, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    algo = SelfRank(**{"temperature": 1.0, **settings})
    return algo.refine(policy, None, rows, None, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def test_the_models_own_scores_choose() -> None:
    """Scores by heart: 1 2 3 has 10 and 3 1 2 has 2, 7 8 9 has 9 and 7 9 8 has 6, but 1 0 2 has 7 and 0 1 2 has 5."""
    settings = {"n": 16, "max_new_tokens": 60, "max_feedback_tokens": 60}
    found = ranks(critical_policy(), ask(), **settings)
    assert [(row["response"], row["score"]) for row in found] == [("1 2 3", 10), ("7 8 9", 9), ("4 5 6", 10), ("1 0 2", 7)]  # fmt: skip
    for row in found:
        for text, score in zip(row["responses"], row["scores"], strict=True):
            assert FEEDBACK not in text
            if text in SCORES:
                assert score == SCORES[text]
    pairs = ranks(critical_policy(), [ask()[0], ask()[3]], write="pairs", **settings)
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("1 2 3", "3 1 2"), ("1 0 2", "0 1 2")]


@pytest.mark.parametrize("score", ["loglik", "loglik_norm"])
def test_likelihood_is_that_of_the_untempered_model(ragged_policy: Policy, rows: Any, score: str) -> None:
    """The sum, or the mean of a token, from a pass of its own, whatever the temperature of sampling; both choose differently."""
    data = rows(6)
    algo = SelfRank(n=8, temperature=0.6, score=score, max_new_tokens=12)  # type: ignore[arg-type]
    batch = algo.sampled(ragged_policy, data, 8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logprobs = ragged_policy.forward(batch).double()
    sums = (logprobs * batch.mask).sum(1).view(6, 8)
    means = sums / batch.lengths.view(6, 8)
    assert (sums.argmax(1) != means.argmax(1)).any(), "or the test could not tell the two apart"
    wanted = sums if score == "loglik" else means
    found = ranks(ragged_policy, data, n=8, temperature=0.6, score=score, max_new_tokens=12)
    for i, row in enumerate(found):
        assert row["scores"] == pytest.approx(wanted[i].tolist(), abs=1e-4)
        assert row["response"] == batch.responses[i * 8 + int(wanted[i].argmax())]


def test_majority_is_how_many_say_the_same_the_earliest_of_equals(tiny_causal: Policy, rows: Any) -> None:
    """Counted within a prompt: two prompts that are alike do not vote for each other."""
    data = rows(3) + rows(3)
    found = ranks(tiny_causal, data, n=12, temperature=0.7, score="majority", max_new_tokens=1)
    for row in found:
        counts = Counter(row["responses"])
        assert row["scores"] == [counts[text] for text in row["responses"]]
        first = next(text for text in row["responses"] if counts[text] == max(counts.values()))
        assert row["response"] == first
    assert any(1 < max(row["scores"]) < 12 for row in found)


def test_even_votes_make_no_pair(tiny_causal: Policy, rows: Any) -> None:
    found = ranks(tiny_causal, rows(2), n=4, temperature=2.0, score="majority", max_new_tokens=12, write="pairs")
    assert [len(set(row["responses"])) for row in found] == [4, 4]
    assert [row["dropped"] for row in found] == ["tie", "tie"]


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_likeliest_is_found_with_the_probability_of_the_card(tiny_causal: Policy, rows: Any, n: int) -> None:
    """P(best of N = argmax) = 1 - (1 - p)^N (p = 0.5: .75, .9375, .996094), on 2,000 prompts within four deviations."""
    many = 2000
    with torch.no_grad():
        ids, mask = tiny_causal._pad(tiny_causal.encode_prompts(rows(1)), "left")
        probs = tiny_causal.model(input_ids=ids, attention_mask=mask.long()).logits[0, -1].double().softmax(-1)
    p = float(probs.max())
    assert 0.02 < p < 0.9, "a chance of its own for either outcome"
    data = [{**rows(1)[0], "id": i} for i in range(many)]
    found = ranks(tiny_causal, data, n=n, score="loglik", max_new_tokens=1)
    hits = sum(abs(row["score"] - math.log(p)) < 1e-4 for row in found) / many
    wanted = 1 - (1 - p) ** n
    assert abs(hits - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / many)


def test_an_encoder_decoder_can_rank_by_likelihood_alone(tiny_seq2seq: Policy, rows: Any) -> None:
    with pytest.raises(UserError, match=r"algo\.score=critique needs a causal model; take algo\.score=loglik_norm"):
        SelfRank().check(tiny_seq2seq)
    SelfRank(score="loglik_norm").check(tiny_seq2seq)
    assert "dropped" not in ranks(tiny_seq2seq, rows(1), n=2, score="loglik_norm", max_new_tokens=4)[0]


def test_where_no_critique_can_be_read_the_row_is_dropped(build_policy: Any, rows: Any) -> None:
    policy = build_policy("causal", max_position_embeddings=128)
    found = ranks(policy, rows(2), n=2, max_new_tokens=6, max_feedback_tokens=6)
    assert [(row["dropped"], row["scores"]) for row in found] == [("no score", [None, None])] * 2


@pytest.mark.parametrize("wrong", [{"n": 1}, {"max_feedback_tokens": 0}])
def test_ranges(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SelfRank(**wrong)
