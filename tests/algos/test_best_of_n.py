"""Best of n, with rewards whose order is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit.algos._refine import ranked, told
from alignkit.algos.best_of_n import BestOfN
from alignkit.batch import Batch
from alignkit.errors import UserError
from alignkit.policy import Policy


class Table:
    """A reward that gives the samples of a prompt these numbers, in their order."""

    def __init__(self, *rows: list[float]) -> None:
        self.rows = rows

    def __call__(self, batch: Batch) -> torch.Tensor:
        return torch.tensor([x for row in self.rows for x in row])


def best(policy: Policy, rows: list, reward: Any, **settings: Any) -> list[dict[str, Any]]:
    algo = BestOfN(max_new_tokens=8, **{"temperature": 1.0, **settings})
    return algo.refine(policy, reward, rows, None, torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def test_the_best_sample_is_the_response_and_the_earliest_of_equals(policy: Policy, rows: Any) -> None:
    found = best(policy, rows(3, topic="t"), Table([0.1, 0.9, 0.4], [2, 2, 1], [-3, -5, -3]), n=3)
    assert [row["score"] for row in found] == pytest.approx([0.9, 2, -3])
    for row, index in zip(found, (1, 0, 0), strict=True):
        assert len(set(row["responses"])) == 3
        assert row["response"] == row["responses"][index]
        assert row["instruction"] == row["prompt"] and row["topic"] == "t"
        assert not {"id", "chosen", "rejected", "dropped"} & set(row)
    assert found[0]["scores"] == pytest.approx([0.1, 0.9, 0.4])


def test_pairs_are_the_best_and_the_worst(policy: Policy, rows: Any) -> None:
    found = best(policy, rows(3), Table([0, 3, 1, 2], [1, 1, 1, 1], [2, 0, 2, 0]), n=4, write="pairs")
    for row, (chosen, rejected) in zip((found[0], found[2]), ((1, 0), (0, 3)), strict=True):
        assert (row["chosen"], row["rejected"]) == (row["responses"][chosen], row["responses"][rejected])
        assert (row["score_chosen"], row["score_rejected"]) == (max(row["scores"]), min(row["scores"]))
    assert [row.get("dropped") for row in found] == [None, "tie", None]


def test_the_pair_of_the_card(make_batch: Any) -> None:
    """Self-Rewarding (temporal_self_rewarding.md): scores 7.5, 8, 9, 6.5 give the pair (9, 6.5); even ones give none."""
    batch = make_batch([4, 4]).with_(responses=list("abcdefgh"))
    scores = torch.tensor([7.5, 8, 9, 6.5, 7, 7, 7, 7])
    first, second = ranked(batch.rows[::4], batch, scores, "pairs")
    assert (first["chosen"], first["rejected"]) == ("c", "d")
    assert (first["score_chosen"], first["score_rejected"]) == (9, 6.5)
    assert second["dropped"] == "tie"


def test_what_has_no_score_is_out_of_the_race(make_batch: Any) -> None:
    batch, nan = make_batch([3, 2]).with_(responses=list("abcde")), float("nan")
    first, second = ranked([batch.rows[0], batch.rows[3]], batch, torch.tensor([nan, 1, 2, nan, nan]), "pairs")
    assert (first["chosen"], first["rejected"], first["scores"]) == ("c", "b", [None, 1, 2])
    assert second["dropped"] == "no score" and "response" not in second


def test_a_pair_of_one_text_is_dropped(make_batch: Any) -> None:
    """As where the reward goes by more than the text."""
    batch = make_batch([2]).with_(responses=["same", "same"])
    [found] = ranked(batch.rows[:1], batch, torch.tensor([1.0, 2.0]), "pairs")
    assert found["dropped"] == "alike"


def test_the_response_of_a_row_is_not_kept_where_nothing_is_chosen(make_batch: Any) -> None:
    batch = make_batch([2])
    rows = [{**batch.rows[0], "dropped": "before", "score": "high"}]
    [found] = ranked(rows, batch, torch.tensor([1.0, 2.0]), "best")
    assert found["score"] == 2.0 and "dropped" not in found and "chosen" not in found


def test_a_reward_of_each_token_counts_by_its_sum(tiny_causal: Policy, rows: Any) -> None:
    def tokens(batch: Batch) -> torch.Tensor:
        weights = torch.tensor([1.0, 3.0, 2.0])[torch.arange(len(batch)) % 3]
        return weights[:, None].expand(batch.mask.shape) / batch.mask.sum(1, keepdim=True)

    for row in best(tiny_causal, rows(2), tokens, n=3):
        assert row["score"] == pytest.approx(3) and row["response"] == row["responses"][1]


def test_a_reward_that_is_not_finite_names_the_row(tiny_causal: Policy, rows: Any) -> None:
    with pytest.raises(UserError, match="the reward of row 1 is nan"):
        best(tiny_causal, rows(2), Table([0, 0], [0, float("nan")]), n=2)


def test_ranges() -> None:
    with pytest.raises(ValueError, match="n must be at least 2"):
        BestOfN(n=1)
    assert BestOfN.needs_reward


def test_a_chat_of_several_turns_is_sampled_too() -> None:
    """Only what one text must tell, an instruction for a critic, is refused there."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert told({"prompt": turns, "id": 0}) == {"prompt": turns}
    assert told({"prompt": turns[:1], "id": 0}) == {"prompt": turns[:1], "instruction": "a"}
