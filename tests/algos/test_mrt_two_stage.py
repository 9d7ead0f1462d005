"""The released two-stage MRT against the esrl card: F4, variant C, E-1 and E-7."""

from __future__ import annotations

import pytest
import torch

from alignkit import losses
from alignkit.algos.mrt_two_stage import MRTTwoStage


class Scripted:
    """A policy that gives prepared log-probabilities: of samples, and of references."""

    def __init__(self, make_batch, samples, gold) -> None:
        self.samples, self.gold = samples, gold
        self.references = make_batch([1] * len(gold), [gold.shape[1]] * len(gold))

    def demonstrations(self, rows, max_tokens=None):
        return self.references

    def forward(self, batch, temperature=None):
        return self.gold if batch is self.references else self.samples

    def score(self, batch, temperature=None):
        return self.forward(batch), None


def test_variant_c_is_the_default():
    """5 samples among the 50 likeliest tokens, alpha .005, .7 of the RL loss and .3 of the likelihood."""
    algo = MRTTwoStage()
    assert (algo.k, algo.decoding.top_k, algo.alpha) == (5, 50, 0.005)
    assert algo.mle_weight == pytest.approx(0.3 / 0.7)


def test_e7_value(make_batch):
    """lp = (-1.7, -1.4), r = (.5, .9): L_RL = -.70015; with MLE 2.0 and lambda .7: .109895.

    The method takes the mean reward off first, which moves the loss by a constant, here .7.
    """
    lp, rewards = torch.tensor([[-1.7], [-1.4]]), torch.tensor([0.5, 0.9])
    every, group = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    assert float(losses.mrt(lp[:, 0], rewards, group, 0.005, every).total) == pytest.approx(-0.7001500, abs=1e-6)
    algo = MRTTwoStage()
    batch = algo.credit(make_batch([2], [1, 1], scores=rewards.tolist()))
    loss = algo.loss(Scripted(make_batch, lp, torch.tensor([[-0.5, -1.5]])), batch)
    value = float(loss.total) / loss.count
    assert 0.7 * (value - 0.7) == pytest.approx(0.1098950, abs=1e-6)


def test_e7_gradient(make_batch):
    """.7 * d L_RL = -.7 alpha Q (r - E r) on the samples, .3 * -1 on each token of the reference."""
    lp = torch.tensor([[-1.7], [-1.4]], requires_grad=True)
    gold = torch.tensor([[-0.5, -1.5]], requires_grad=True)
    algo = MRTTwoStage()
    batch = algo.credit(make_batch([2], [1, 1], scores=[0.5, 0.9]))
    loss = algo.loss(Scripted(make_batch, lp, gold), batch)
    (0.7 * loss.total / loss.count).backward()
    assert gold.grad.tolist() == [pytest.approx([-0.3, -0.3])]
    step = 0.7 * 0.005 * 0.25 * 0.4  # Q = (1/2, 1/2) up to 4e-4
    assert lp.grad.flatten().tolist() == pytest.approx([step, -step], rel=1e-3)


@pytest.mark.parametrize(
    ("alpha", "wanted"),
    [
        (0.005, [-4.465487e-4, 6.280e-5, 3.837465e-4]),
        # -alpha Q (r - E r): E r = .5642206
        (1.0, [-0.8807619 * 0.0357794, 0.1191982 * 0.2642206, 3.9987e-5 * 0.4642206]),
    ],
)
def test_e1_gradient(make_batch, alpha, wanted):
    algo = MRTTwoStage(alpha=alpha)
    lp = torch.tensor([[-10.0], [-12.0], [-20.0]], dtype=torch.float64, requires_grad=True)
    loss = algo.objective(lp, algo.credit(make_batch([3], [1] * 3, scores=[0.6, 0.3, 0.1])))
    loss.total.backward()
    assert (lp.grad[:, 0] / loss.count).tolist() == pytest.approx(wanted, abs=2e-8 if alpha < 1 else 1e-6)


def test_duplicates_count_each(make_batch):
    """Two equal samples among three at equal lp: Q = 1/3 each, E r = 2/3; d = -alpha (r - 2/3) / 3."""
    batch = make_batch([3], [1] * 3, scores=[1.0, 1.0, 0.0])
    batch = batch.with_(response_ids=torch.tensor([[11], [11], [12]]))
    algo = MRTTwoStage(alpha=0.3)
    lp = torch.full((3, 1), -2.0, requires_grad=True)
    algo.objective(lp, algo.credit(batch)).total.backward()
    assert lp.grad[:, 0].tolist() == pytest.approx([-1 / 30, -1 / 30, 2 / 30], abs=1e-7)


def test_padding_is_masked(make_batch):
    """The release pushes short samples down by their padding; here a masked position has no gradient."""
    algo = MRTTwoStage(alpha=1.0)
    batch = algo.credit(make_batch([2], [1, 3], scores=[1.0, 0.0]))
    lp = torch.tensor([[-3.0, -9.0, -9.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    algo.objective(lp, batch).total.backward()
    torch.testing.assert_close(lp.grad, torch.tensor([[-0.25, 0.0, 0.0], [0.25, 0.25, 0.25]]))


def test_samples_are_drawn_from_the_likeliest_tokens(policy, rows):
    """With top_k 1 all five are the greedy response; no reference is among them."""
    algo = MRTTwoStage(top_k=1, max_new_tokens=4)
    batch = algo.sample(policy, rows(2), None, torch.Generator().manual_seed(0))
    assert batch.group.tolist() == [0] * 5 + [1] * 5
    for first in (0, 5):
        assert (batch.response_ids[first : first + 5] == batch.response_ids[first]).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 1}, "k"),
        ({"temperature": -1.0}, "temperature"),
        ({"alpha": 0.0}, "alpha"),
        ({"normalize": "tokens"}, "mle_weight"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        MRTTwoStage(**settings)
