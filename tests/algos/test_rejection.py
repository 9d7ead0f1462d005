"""Rejection sampling, with rewards whose order is known, and step 1 of Re-ReST by its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit.algos.rejection import Rejection
from alignkit.batch import Batch
from alignkit.policy import Policy


class Table:
    """A reward that gives the samples of a prompt these numbers, in their order."""

    def __init__(self, *rows: list[float]) -> None:
        self.rows = rows

    def __call__(self, batch: Batch) -> torch.Tensor:
        return torch.tensor([x for row in self.rows for x in row])


def accepted(policy: Policy, rows: list, reward: Any, **settings: Any) -> list[dict[str, Any]]:
    algo = Rejection(**{"max_new_tokens": 8, "temperature": 1.0, **settings})
    return algo.refine(policy, reward, rows, None, torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def samples(policy: Policy, rows: list, n: int, **settings: Any) -> list[list[str]]:
    """The texts that the method draws, in their order."""
    algo = Rejection(**{"max_new_tokens": 8, "temperature": 1.0, **settings})
    texts = algo.sampled(policy, rows, n, torch.Generator().manual_seed(0)).responses
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def test_the_set_of_successes_of_the_card(policy: Policy, rows: Any) -> None:
    """re_rest.md: rewards a [1, 0], b [0, 0], c [0, 0] give D_M = {a1}; b and c are counted, not lost."""
    reward = Table([1, 0], [0, 0], [0, 0])
    found = accepted(policy, rows(3), reward, n=2)
    kept = [row for row in found if "dropped" not in row]
    assert [(row["prompt"], row["response"]) for row in kept] == [("the cat sat", samples(policy, rows(3), 2)[0][0])]
    assert kept[0]["score"] == 1 and kept[0]["accepted"] == 1
    assert [row.get("dropped") for row in found] == [None, "none accepted", "none accepted"]


@pytest.mark.parametrize(
    ("threshold", "most", "kept"),
    [(1.0, 9, [2, 0, 3]), (1.0, 2, [2, 0]), (1.0, 1, [2]), (1.5, 9, [2]), (0.5, 9, [2, 0, 3, 1]), (2.5, 9, [])],
)
def test_threshold_and_number_of_rows(
    tiny_causal: Policy, rows: Any, threshold: float, most: int, kept: list[int]
) -> None:
    """Rewards 1, 0.5, 2, 1: what reaches the threshold, the highest first, the earliest of equals."""
    [texts] = samples(tiny_causal, rows(1), 4)
    assert len(set(texts)) == 4
    found = accepted(tiny_causal, rows(1), Table([1, 0.5, 2, 1]), n=4, threshold=threshold, max_per_prompt=most)
    assert [row["response"] for row in found if "dropped" not in row] == [texts[i] for i in kept]
    assert all(row["accepted"] == {1.0: 3, 1.5: 1, 0.5: 4, 2.5: 0}[threshold] for row in found)
    assert len(found) == max(1, len(kept))


def test_a_text_that_is_drawn_twice_is_one_row(tiny_causal: Policy, rows: Any) -> None:
    """Short samples at a low temperature repeat themselves."""
    how = {"max_new_tokens": 1, "temperature": 0.5}
    [texts] = samples(tiny_causal, rows(1), 32, **how)
    assert 1 < len(set(texts)) < 32
    found = accepted(tiny_causal, rows(1), Table([1.0] * 32), n=32, max_per_prompt=99, **how)
    assert [row["response"] for row in found] == list(dict.fromkeys(texts))
    assert {row["accepted"] for row in found} == {len(set(texts))}


def test_of_equal_texts_the_best_reward_counts(tiny_causal: Policy, rows: Any) -> None:
    """A reward may go by more than the text, as by its tokens."""
    how = {"max_new_tokens": 1, "temperature": 1e-3}
    [texts] = samples(tiny_causal, rows(1), 3, **how)
    assert len(set(texts)) == 1
    [found] = accepted(tiny_causal, rows(1), Table([1.0, 3.0, 2.0]), n=3, **how)
    assert found["score"] == 3.0


def test_rows_stay_in_their_order_with_their_columns(tiny_causal: Policy, rows: Any) -> None:
    found = accepted(tiny_causal, rows(3, topic="t"), Table([1, 2], [0, 0], [2, 1]), n=2, max_per_prompt=2)
    assert [row["prompt"] for row in found] == ["the cat sat"] * 2 + ["a dog ran far"] + ["birds sing"] * 2
    assert all(row["topic"] == "t" and row["instruction"] == row["prompt"] and "id" not in row for row in found)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"max_per_prompt": 0}])
def test_ranges(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1"):
        Rejection(**wrong)
    assert Rejection.needs_reward
