"""The map between two vocabularies: alignment, counts, and what they become, by hand."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignkit.errors import UserError
from alignkit.loading import train_tokenizer
from alignkit.vocabulary import VocabularyMap, align, count, weigh


def dense(lead: VocabularyMap) -> list[list[float]]:
    matrix = torch.zeros(len(lead.column), lead.width)
    matrix[torch.arange(len(lead.column)), lead.column] = lead.weight
    return matrix.tolist()


def test_a_map_picks_and_weighs() -> None:
    """E2 of the card."""
    lead = VocabularyMap(torch.tensor([0, 2, 3]), torch.ones(3), 4)
    assert dense(lead) == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(lead(torch.tensor([[0.2, -0.5, 1.0, -0.3]])), torch.tensor([[0.2, 1.0, -0.3]]))


def test_counts_become_a_map() -> None:
    """E3 of the card: a weight below 1, and a tie that goes to the first column."""
    counts = {(0, 0): 4, (0, 1): 1, (1, 1): 2, (1, 2): 2, (2, 0): 3}
    found = weigh(counts, 3, 3)
    assert found.column.tolist() == [0, 1, 0]
    torch.testing.assert_close(torch.tensor(dense(found)), torch.tensor([[1, 0, 0], [0, 1, 0], [6 / 7, 0, 0]]))


def test_a_token_that_was_never_seen_gets_nothing() -> None:
    found = weigh({(1, 2): 5}, 3, 4)
    assert dense(found) == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_a_column_of_equal_entries_is_divided_by_one() -> None:
    """Both tokens stand beside both, equally often: 1 - 2 / 2 = 0 everywhere, so nothing is more than nothing."""
    assert dense(weigh({(i, j): 1 for i in range(2) for j in range(2)}, 2, 2)) == [[0, 0], [0, 0]]


def naive(counts: dict[tuple[int, int], int], rows: int, columns: int) -> torch.Tensor:
    """The card's steps on a dense matrix."""
    c = torch.zeros(rows, columns, dtype=torch.float64)
    for (i, j), n in counts.items():
        c[i, j] = n
    d = torch.where(c != 0, c - c.mean(1, keepdim=True), 0.0)
    span = d.amax(0) - d.amin(0)
    d = torch.where(c != 0, (d - d.amin(0)) / torch.where(span == 0, 1.0, span), 0.0)
    best = d.max(1, keepdim=True)
    first = (d == best.values).long().argmax(1, keepdim=True)
    return torch.zeros_like(d).scatter_(1, first, best.values)


def test_the_sparse_steps_are_the_dense_ones() -> None:
    rng = random.Random(0)
    for _ in range(50):
        rows, columns = rng.randint(1, 6), rng.randint(1, 6)
        cells = [one for one in itertools.product(range(rows), range(columns)) if rng.random() < 0.5]
        counts = {cell: rng.randint(1, 4) for cell in cells}
        found = torch.tensor(dense(weigh(counts, rows, columns)), dtype=torch.float64)
        torch.testing.assert_close(found, naive(counts, rows, columns), atol=1e-6, rtol=0)


# ---- alignment -------------------------------------------------------------------------------------------------------


def test_equal_sequences_go_side_by_side() -> None:
    assert align(["Ġthe", "Ġcat"], ["▁the", "▁cat"]) == [(0, 0), (1, 1)]


def test_a_token_stands_beside_its_parts() -> None:
    """It costs .1 beside "cat" (one edit, a tenth) and .3 beside "s"; "ran" costs 3 beside "s"."""
    assert align(["the", "cats", "ran"], ["the", "cat", "s", "ran"]) == [(0, 0), (1, 1), (1, 2), (2, 3)]
    assert align(["the", "cat", "s"], ["the", "cats"]) == [(0, 0), (1, 1), (2, 1)]


def test_ties_go_on_in_both_then_in_the_first() -> None:
    """All pairs cost 1: from (0, 0) to (1, 1) diagonally; with a row more, the last step goes in both."""
    assert align(["a", "b"], ["x", "y"]) == [(0, 0), (1, 1)]
    assert align(["a", "b", "c"], ["x", "y"]) == [(0, 0), (1, 0), (2, 1)]


def cheapest(a: list[str], b: list[str]) -> float:
    """The cost of the best path, over all there are."""
    from functools import cache

    from alignkit.vocabulary import _cost

    @cache
    def best(i: int, j: int) -> float:
        here = _cost(a[i], b[j])
        before = [best(i - x, j - y) for x, y in ((1, 1), (1, 0), (0, 1)) if i >= x and j >= y]
        return here + min(before, default=0.0)

    return best(len(a) - 1, len(b) - 1)


def test_the_path_is_the_cheapest_and_moves_by_one() -> None:
    from alignkit.vocabulary import _cost

    rng = random.Random(1)
    for _ in range(40):
        a, b = (["".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(rng.randint(1, 5))] for _ in range(2))
        path = align(a, b)
        assert path[0] == (0, 0) and path[-1] == (len(a) - 1, len(b) - 1)
        assert all((i2 - i, j2 - j) in ((1, 1), (1, 0), (0, 1)) for (i, j), (i2, j2) in itertools.pairwise(path))
        assert sum(_cost(a[i], b[j]) for i, j in path) == pytest.approx(cheapest(a, b))


def test_costs_are_edit_distances() -> None:
    from alignkit.vocabulary import _cost

    assert _cost("kitten", "sitting") == 3
    assert _cost("cat", "cats") == pytest.approx(0.1)
    assert _cost("", "abc") == pytest.approx(0.3)  # the empty token is in every one
    assert _cost("same", "same") == 0


# ---- tokenizers ------------------------------------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat", "a dog ran far", "the cats and the dogs", "birds sing in the rain"] * 3


def test_a_toy_pair_of_tokenizers() -> None:
    """Of one tokenizer with itself the map is the identity on what was seen; ends lead to ends."""
    one = train_tokenizer(TEXTS, 290)
    same = weigh(count(one, one, TEXTS), len(one), len(one))
    seen = {i for text in TEXTS for i in one(text)["input_ids"]}
    assert [i for i in range(len(one)) if same.weight[i] > 0] == sorted(seen)
    assert all(int(same.column[i]) == i and float(same.weight[i]) > 0.3 for i in seen)
    other = train_tokenizer(["sing sing dogs dogs dogs", *reversed(TEXTS)], 300)
    assert one.convert_tokens_to_ids("Ġdog") != other.convert_tokens_to_ids("Ġdog")
    lead = weigh(count(one, other, TEXTS), len(one), len(other))
    assert int(lead.column[one.eos_token_id]) == other.eos_token_id
    for word in ("Ġthe", "Ġdog"):
        a, b = (t.convert_tokens_to_ids(word) for t in (one, other))
        assert int(lead.column[a]) == b and float(lead.weight[a]) == 1.0
    assert bool((lead.weight <= 1).all()) and bool((lead.weight >= 0).all())


def test_the_script_writes_what_is_read(tmp_path: Path) -> None:
    one, other = train_tokenizer(TEXTS, 290), train_tokenizer(["the dogs sing", "far rain"], 275)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"a": "{text}", "n": 3}}\n' for text in TEXTS), encoding="utf-8")
    wanted = weigh(count(one, other, TEXTS), len(one), len(other))
    script = Path(__file__).parent.parent / "scripts" / "map_vocabulary.py"
    for name in ("texts.txt", "texts.jsonl"):
        words = [
            str(tmp_path / "one"),
            str(tmp_path / "other"),
            "--data",
            str(tmp_path / name),
            "--out",
            str(tmp_path / "map"),
        ]
        done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = VocabularyMap.load(str(tmp_path / "map"))
        assert torch.equal(found.column, wanted.column) and torch.equal(found.weight, wanted.weight)
        assert found.width == len(other)
    with pytest.raises(UserError, match=r"model\.steer\.map=.*texts\.txt: is no vocabulary map"):
        VocabularyMap.load(str(tmp_path / "texts.txt"))
