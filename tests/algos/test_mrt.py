"""Minimum risk training against the vectors of the baselines card and of the esrl card, E-1."""

from __future__ import annotations

import pytest
import torch

from alignkit import losses
from alignkit.algos.mrt import MRT

LP, RISKS = [-5.0, -6.0, -8.0], [0.2, 0.5, 0.9]  # baselines card
EVERY = torch.ones(3, dtype=torch.bool)
ONE_GROUP = torch.zeros(3, dtype=torch.long)


def shares(lp: list[float], alpha: float) -> list[float]:
    """Q_j is the loss of a reward of -1 for candidate j alone."""
    keep, group = torch.ones(len(lp), dtype=torch.bool), torch.zeros(len(lp), dtype=torch.long)
    return [float(losses.mrt(torch.tensor(lp), -one, group, alpha, keep).total) for one in torch.eye(len(lp))]


@pytest.mark.parametrize(
    ("lp", "alpha", "wanted"),
    [
        (LP, 0.005, [0.335556, 0.333883, 0.330561]),
        (LP, 1.0, [0.705385, 0.259496, 0.035119]),
        ([-10.0, -12.0, -20.0], 0.005, [0.3399881, 0.3366052, 0.3234067]),
        ([-10.0, -12.0, -20.0], 1.0, [0.8807619, 0.1191982, 3.9987e-5]),
        ([-2000.0, -2001.0], 1.0, [0.7310586, 0.2689414]),  # nothing underflows
    ],
)
def test_q(lp, alpha, wanted):
    assert shares(lp, alpha) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("alpha", "risk"), [(0.005, 0.531557), (1.0, 0.302432)])
def test_risk(alpha, risk):
    loss = losses.mrt(torch.tensor(LP), -torch.tensor(RISKS), ONE_GROUP, alpha, EVERY)
    assert (float(loss.total), loss.count) == (pytest.approx(risk, abs=1e-6), 1.0)


@pytest.mark.parametrize(("alpha", "wanted"), [(0.005, -0.3373151), (1.0, -0.5642206)])
def test_e1_loss(alpha, wanted):
    rewards = torch.tensor([0.6, 0.3, 0.1])
    loss = losses.mrt(torch.tensor([-10.0, -12.0, -20.0]), rewards, ONE_GROUP, alpha, EVERY)
    assert float(loss.total) == pytest.approx(wanted, abs=1e-6)


# ---- the gradient, through the method's own credit and objective -----------------------------------------------------


def gradient(batch, lp: list[float], **settings) -> list[float]:
    """d loss / d lp of each response, one token each; the loss is a mean over inputs."""
    algo = MRT(gold=False, **settings)
    logprobs = torch.tensor(lp, dtype=torch.float64)[:, None].requires_grad_()
    loss = algo.objective(logprobs, algo.credit(batch))
    loss.total.backward()
    return (logprobs.grad[:, 0] / loss.count).tolist()


def test_gradients(make_batch):
    """d risk / d lp = alpha Q (risk_j - risk) at alpha 1; the three sum to 0."""
    batch = make_batch([3], [1] * 3, scores=[-r for r in RISKS])
    found = gradient(batch, LP, alpha=1.0)
    assert found == pytest.approx([-0.072254, 0.051268, 0.020986], abs=1e-6)
    assert sum(found) == pytest.approx(0.0, abs=1e-7)
    wanted = [0.005 * q * (r - 0.531557) for q, r in zip([0.335556, 0.333883, 0.330561], RISKS, strict=True)]
    assert gradient(batch, LP, alpha=0.005) == pytest.approx(wanted, abs=1e-8)


def test_e1_gradient(make_batch):
    batch = make_batch([3], [1] * 3, scores=[0.6, 0.3, 0.1])
    found = gradient(batch, [-10.0, -12.0, -20.0], alpha=0.005)
    assert found == pytest.approx([-4.465487e-4, 6.280e-5, 3.837465e-4], abs=1e-8)


def test_each_prompt_has_its_own_candidates(make_batch):
    """Two prompts: half the gradient of each alone, and no word of the other's rewards."""
    alone = gradient(make_batch([3], [1] * 3, scores=[-r for r in RISKS]), LP, alpha=1.0)
    batch = make_batch([3, 2], [1] * 5, scores=[*(-r for r in RISKS), 7.0, 7.0])
    found = gradient(batch, [*LP, -1.0, -3.0], alpha=1.0)
    assert found == pytest.approx([g / 2 for g in alone] + [0.0, 0.0], abs=1e-6)


def test_padding_is_no_part_of_lp(make_batch):
    """lp of (-5, masked -50), (-2, -4) and (-8, masked): the vector's -5, -6, -8."""
    algo = MRT(gold=False, alpha=1.0)
    batch = algo.credit(make_batch([3], [1, 2, 1], scores=[-r for r in RISKS]))
    logprobs = torch.tensor([[-5.0, -50.0], [-2.0, -4.0], [-8.0, -50.0]], requires_grad=True)
    algo.objective(logprobs, batch).total.backward()
    wanted = [[-0.072254, 0.0], [0.051268, 0.051268], [0.020986, 0.0]]
    torch.testing.assert_close(logprobs.grad, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_length_normalised(make_batch):
    """Means -2 of three tokens and -4 of one: Q = (.880797, .119203), E r = .880797; d / d token = -alpha Q (r - E r) / n."""
    algo = MRT(gold=False, alpha=1.0, length_normalized=True)
    batch = algo.credit(make_batch([2], [3, 1], scores=[1.0, 0.0]))
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]], requires_grad=True)
    algo.objective(logprobs, batch).total.backward()
    share = 0.880797 * 0.119203
    wanted = [[-share / 3] * 3, [share, 0.0, 0.0]]
    torch.testing.assert_close(logprobs.grad, torch.tensor(wanted), atol=1e-6, rtol=0)


# ---- the set of candidates -------------------------------------------------------------------------------------------


def doubled(make_batch):
    """The vector's three candidates, the first drawn twice; the second copy has other padding ids."""
    batch = make_batch([4], [1, 1, 1, 1], scores=[-0.2, -0.5, -0.2, -0.9])
    ids = torch.tensor([[11, 0], [12, 0], [11, 7], [13, 0]])
    return batch.with_(response_ids=ids, mask=torch.tensor([[True, False]] * 4))


def test_a_candidate_drawn_twice_stands_in_the_set_once(make_batch):
    batch = doubled(make_batch)
    lp = torch.tensor([[-5.0, 0.0], [-6.0, 0.0], [-5.0, 0.0], [-8.0, 0.0]], requires_grad=True)
    algo = MRT(gold=False, alpha=1.0)
    credited = algo.credit(batch)
    algo.objective(lp, credited).total.backward()
    first, second, again, third = lp.grad[:, 0].tolist()
    assert first + again == pytest.approx(-0.072254, abs=1e-6)  # whichever of the two it counts
    assert [second, third] == pytest.approx([0.051268, 0.020986], abs=1e-6)
    assert algo.metrics(credited)["distinct"] == 0.75


def test_duplicates_can_count(make_batch):
    """Q = e^(-5, -6, -5, -8) / sum = (.413785, .152223, .413785, .020601) up to 5e-4; the risk by hand."""
    q = torch.tensor([-5.0, -6.0, -5.0, -8.0], dtype=torch.float64).softmax(0)
    risks = torch.tensor([0.2, 0.5, 0.2, 0.9], dtype=torch.float64)
    wanted = q * (risks - (q * risks).sum())
    lp = torch.tensor([[-5.0, 0.0], [-6.0, 0.0], [-5.0, 0.0], [-8.0, 0.0]], dtype=torch.float64, requires_grad=True)
    algo = MRT(gold=False, alpha=1.0, distinct=False)
    algo.objective(lp, algo.credit(doubled(make_batch))).total.backward()
    assert lp.grad[:, 0].tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_equal_responses_to_two_prompts_are_no_duplicates(make_batch):
    batch = make_batch([2, 2], [1] * 4, scores=[1.0, 0.0, 1.0, 0.0])
    batch = batch.with_(response_ids=torch.tensor([[11], [12], [11], [12]]))
    algo = MRT(gold=False)
    assert algo.metrics(algo.credit(batch))["distinct"] == 1.0


def test_a_prefix_is_no_duplicate(make_batch):
    batch = make_batch([2], [1, 2], scores=[1.0, 0.0]).with_(response_ids=torch.tensor([[11, 0], [11, 0]]))
    algo = MRT(gold=False)
    assert algo.metrics(algo.credit(batch))["distinct"] == 1.0


# ---- the reference as a candidate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gold_follows_the_samples_of_its_prompt(policy, rows, temperature):
    data = rows(3)
    algo = MRT(k=2, temperature=temperature, max_new_tokens=4)
    batch = algo.sample(policy, data, None, torch.Generator().manual_seed(0))
    assert batch.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["id"] for row in batch.rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    gold = policy.demonstrations(data, 4)
    for i in range(3):
        assert batch.responses[3 * i + 2] == data[i]["response"]
        n = int(gold.lengths[i])
        assert int(batch.lengths[3 * i + 2]) == n
        assert torch.equal(batch.response_ids[3 * i + 2, :n], gold.response_ids[i, :n])
    found = policy.forward(batch, torch.full((9,), temperature)).detach()
    torch.testing.assert_close(batch.logprobs, found, atol=1e-4, rtol=0)


def test_without_gold_there_are_samples_only(policy, rows):
    batch = MRT(k=2, gold=False, max_new_tokens=4).sample(policy, rows(3), None, torch.Generator().manual_seed(0))
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2]


def test_gold_and_an_equal_sample_are_one_candidate(tiny_causal, rows):
    """The reference is what the policy decodes greedily, and so are the samples near temperature 0: one candidate."""
    data = rows(2)
    algo = MRT(k=2, temperature=1e-4, max_new_tokens=3)
    drawn = algo.sample(tiny_causal, data, None, torch.Generator().manual_seed(0))
    first = drawn.take(torch.tensor([0, 3]))
    tiny_causal.demonstrations = lambda rows, limit=None: first.with_(group=torch.arange(2))
    batch = algo.sample(tiny_causal, data, None, torch.Generator().manual_seed(0))
    algo.credit(batch.with_(scores=torch.zeros(6)))
    assert algo.metrics(batch)["distinct"] == pytest.approx(1 / 3)


def test_the_kl_is_measured_on_samples(policy, rows):
    """A reference is not drawn from the policy: its log-ratio is no estimate of KL(policy || start model)."""
    algo = MRT(k=2, kl=0.1, max_new_tokens=4)
    batch = algo.sample(policy, rows(2), None, torch.Generator().manual_seed(0))
    ref = batch.logprobs.clone()
    ref[2::3] -= 5.0  # the start model likes the references less, and the samples as much
    assert algo.adapt(batch.with_(ref_logprobs=ref * batch.mask)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 1, "gold": False}, "k"),
        ({"k": 0}, "k"),
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        MRT(**settings)


def test_one_sample_and_the_reference_are_a_set():
    assert MRT(k=1, gold=True).k == 1
