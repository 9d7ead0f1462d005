"""Cutting batches: whole groups, every row once, padding trimmed, content kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.batch import Batch

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def shapes(draw):
    """Group sizes, response lengths of the rows, prompt lengths of the groups, padding side."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    lengths = draw(st.lists(st.integers(1, 7), min_size=sum(sizes), max_size=sum(sizes)))
    prompts = draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    return sizes, lengths, prompts, draw(st.sampled_from(["left", "right"]))


def content(batch: Batch) -> dict[int, tuple]:
    """What each row says, padding left out, by the row's number."""
    return {
        int(batch.extra["row"][i]): (
            batch.prompt_ids[i, batch.prompt_mask[i]].tolist(),
            batch.response_ids[i, batch.mask[i]].tolist(),
            batch.logprobs[i, batch.mask[i]].tolist(),
            int(batch.group[i]),
            batch.rows[i]["id"],
            batch.responses[i],
            None if batch.scores is None else float(batch.scores[i]),
        )
        for i in range(len(batch))
    }


def check_parts(whole: Batch, parts: list[Batch]) -> None:
    """Every row once and unchanged, every group in one part, its rows adjacent and in order."""
    numbers = [n for part in parts for n in part.extra["row"].tolist()]
    assert sorted(numbers) == list(range(len(whole)))
    merged = {}
    for part in parts:
        merged.update(content(part))
    assert merged == content(whole)
    groups = [part.group.unique_consecutive().tolist() for part in parts]
    flat = [g for one in groups for g in one]
    assert sorted(flat) == sorted(set(whole.group.tolist())), "a group was cut or scattered"
    for part in parts:
        for g in part.group.unique().tolist():
            rows = part.extra["row"][part.group == g].tolist()
            assert rows == sorted(rows)


def check_trimmed(batch: Batch, side: str) -> None:
    """No column is padding in every row, and the prompts are still padded on their side."""
    longest = int(batch.prompt_mask.sum(1).max())
    assert batch.prompt_ids.shape[1] == batch.prompt_mask.shape[1] == longest
    assert batch.response_ids.shape[1] == batch.logprobs.shape[1] == int(batch.lengths.max())
    edge = batch.prompt_mask[:, -1] if side == "left" else batch.prompt_mask[:, 0]
    assert edge.all()


@QUICK
@given(shape=shapes(), budget=st.integers(1, 120))
def test_split(make_batch, shape, budget):
    sizes, lengths, prompts, side = shape
    whole = make_batch(sizes, lengths, prompts, side, scores=[float(i) for i in range(sum(sizes))])
    parts = whole.split(budget)
    check_parts(whole, parts)
    for part in parts:
        check_trimmed(part, side)
        prompts = part.prompt_mask.sum(1)[part.group_starts()]  # a group's prompt is read once
        assert int(prompts.sum() + part.mask.sum()) <= budget or part.group.unique().numel() == 1


def test_split_by_hand(make_batch):
    """Prompt once + responses of the groups: 2 + 6, 2 + 1 + 1, 2 + 3 + 2 = 8, 4, 7 tokens; shortest first 1, 2, 0."""
    whole = make_batch([1, 2, 2], [6, 1, 1, 3, 2])
    for budget, wanted in [(19, [[1, 2, 0]]), (18, [[1, 2], [0]]), (11, [[1, 2], [0]]), (10, [[1], [2], [0]])]:
        assert [p.group.unique_consecutive().tolist() for p in whole.split(budget)] == wanted, budget
    assert [p.group.unique_consecutive().tolist() for p in whole.split(1)] == [[1], [2], [0]]


@QUICK
@given(shape=shapes(), count=st.integers(1, 8))
def test_minibatches(make_batch, shape, count):
    sizes, lengths, prompts, side = shape
    whole = make_batch(sizes, lengths, prompts, side)
    parts = list(whole.minibatches(count))
    check_parts(whole, parts)
    assert len(parts) == min(count, len(sizes))
    order = [n for part in parts for n in part.extra["row"].tolist()]
    assert order == list(range(len(whole))), "in order"
    groups = [part.group.unique().numel() for part in parts]
    assert max(groups) - min(groups) <= 1, "as even as can be"


@QUICK
@given(shape=shapes(), data=st.data())
def test_take(make_batch, shape, data):
    """Any rows in any order; padding goes, content stays, also when the batch came with too much padding."""
    sizes, lengths, prompts, side = shape
    whole = make_batch(sizes, lengths, prompts, side)
    index = data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=6, unique=True))
    part = whole.take(torch.tensor(index))
    assert part.extra["row"].tolist() == index
    everything = content(whole)
    assert content(part) == {i: everything[i] for i in index}
    check_trimmed(part, side)


def test_take_cuts_every_token_field(make_batch):
    """All (B, T) fields stay aligned with the ids; (B,) fields and absent ones are left whole."""
    whole = make_batch([1, 1], [5, 2])
    lp = whole.logprobs
    whole = whole.with_(ref_logprobs=lp * 2, values=lp * 3, advantages=lp * 4, probe_tokens=7)
    part = whole.take(torch.tensor([1]))
    assert part.response_ids.tolist() == [[6, 7]]
    assert part.mask.tolist() == [[True, True]]
    assert part.logprobs.tolist() == [[-6.0, -7.0]]
    assert part.ref_logprobs.tolist() == [[-12.0, -14.0]]
    assert part.values.tolist() == [[-18.0, -21.0]]
    assert part.advantages.tolist() == [[-24.0, -28.0]]
    assert part.scores is None
    assert whole.with_(scores=torch.tensor([0.5, 0.25])).take(torch.tensor([1])).scores.tolist() == [0.25]
    assert part.probe_tokens == 7


@pytest.mark.parametrize("side", ["left", "right"])
def test_take_keeps_the_padding_side(make_batch, side):
    """Prompts of 1, 4 and 2 tokens; without the longest, the others keep 2 columns."""
    part = make_batch([1, 1, 1], prompts=[1, 4, 2], side=side).take(torch.tensor([0, 2]))
    wanted = [[False, True], [True, True]] if side == "left" else [[True, False], [True, True]]
    assert part.prompt_mask.tolist() == wanted


def test_groups(make_batch):
    batch = make_batch([3, 1, 2])
    assert batch.group_starts().tolist() == [0, 3, 4]
    assert batch.group_sizes().tolist() == [3, 3, 3, 1, 2, 2]
    assert batch.prompts == ["p0", "p0", "p0", "p1", "p2", "p2"]


def test_lengths_and_with(make_batch):
    batch = make_batch([1, 1], [3, 1])
    assert batch.lengths.tolist() == [3, 1]
    changed = batch.with_(scores=torch.ones(2))
    assert changed.scores.tolist() == [1.0, 1.0]
    assert batch.scores is None
    assert len(changed) == 2
