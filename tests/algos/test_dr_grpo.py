"""Dr. GRPO against the method card (baselines.md, "GRPO, Dr. GRPO, DAPO")."""

from __future__ import annotations

import pytest
import torch

from alignkit.algos.dr_grpo import DrGRPO


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [([1.0, 0.0, 0.0, 1.0], [0.5, -0.5, -0.5, 0.5]), ([1.0, 0.0, 0.0, 0.0], [0.75, -0.25, -0.25, -0.25])],
)
def test_card_vectors(make_batch, scores, wanted):
    """R - mean, not divided by the deviation."""
    batch = DrGRPO(k=4).credit(make_batch([4], [1, 2, 3, 1], scores=scores))
    assert batch.advantages[:, 0].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.7, 123.456])
def test_all_equal_group_is_exactly_zero(make_batch, value):
    assert (DrGRPO(k=7).credit(make_batch([7], scores=[value] * 7)).advantages == 0).all()


def aggregated(make_batch, **settings) -> float:
    """The card's token losses [1, 1] and [-1, -1, -1, -1]: advantages -1 and 1 at ratio 1."""
    batch = make_batch([2], [2, 4])
    batch = batch.with_(advantages=torch.tensor([[-1.0], [1.0]]) * batch.mask)
    loss = DrGRPO(k=2, **settings).objective(batch.logprobs, batch)
    return float(loss.total) / loss.count


def test_divided_by_the_longest_response_allowed(make_batch):
    """Card: with the constant 8 → -.125 = (2 - 4) / 8 / 2; over both the constant and the number of responses, as TRL's
    dr_grpo and oat (verl: the constant alone, -.25). The responses' own lengths, 2 and 4, do not count."""
    assert aggregated(make_batch, max_new_tokens=8) == pytest.approx(-0.125, abs=1e-6)
    assert aggregated(make_batch, max_new_tokens=16) == pytest.approx(-0.0625, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted"), [(1.3, 1, -1.2), (1.3, -1, 1.3), (0.7, 1, -0.7), (0.7, -1, 0.8)]
)
def test_clip_vectors(make_batch, ratio, advantage, wanted):
    batch = make_batch([1], [1])
    batch = batch.with_(advantages=torch.full((1, 1), float(advantage)))
    logprobs = batch.logprobs.double() + torch.tensor(ratio, dtype=torch.float64).log()
    loss = DrGRPO(max_new_tokens=1).objective(logprobs, batch)
    assert float(loss.total) / loss.count == pytest.approx(wanted, abs=1e-5)


def test_no_kl_by_default():
    assert DrGRPO().kl == 0
    assert not DrGRPO().wants_reference


@pytest.mark.parametrize(
    ("settings", "named"), [({"k": 1}, "k"), ({"temperature": -1.0}, "temperature"), ({"clip": 0.0}, "clip")]
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        DrGRPO(**settings)
