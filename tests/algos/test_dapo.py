"""DAPO against the method card (baselines.md, "GRPO, Dr. GRPO, DAPO") and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_RL, lines, train

from alignkit.algos.dapo import DAPO


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Fake:
    """Stands in for a policy: two responses a row, of 2 and 3 tokens, and a record of the rows it was asked for."""

    is_encoder_decoder = False
    device = torch.device("cpu")

    def __init__(self, make_batch) -> None:
        self.make_batch, self.asked = make_batch, []

    def generate(self, rows, n, how, *, temperature=None, generator=None):
        self.asked.append([row["id"] for row in rows])
        batch = self.make_batch([n] * len(rows), [2, 3] * len(rows))
        return batch.with_(rows=[row for row in rows for _ in range(n)])


def reward_of(live: set[int]):
    """1 and 0 for the two responses to a row of ``live``; .5 for both of any other."""

    def reward(batch):
        place = torch.arange(len(batch)) % 2
        alive = torch.tensor([row["id"] in live for row in batch.rows])
        return torch.where(alive, 1.0 - place, 0.5)

    return reward


def sampled(make_batch, rows, live: set[int], **settings):
    algo = DAPO(k=2, prompts_per_step=2, **settings)
    fake = Fake(make_batch)
    return fake, algo.sample(fake, rows(algo.rows_per_step), reward_of(live), seeded())


def kept(batch) -> list[int]:
    return [batch.rows[int(i)]["id"] for i in batch.group_starts()]


def test_groups_without_a_signal_are_replaced(make_batch, rows):
    """Of rows 0 1 | 2 3 | 4 5 only 1 and 4 have unequal rewards: three draws, groups 1 and 4 stay; the tokens of the
    four others (5 each) are counted as sampled without being trained."""
    fake, batch = sampled(make_batch, rows, {1, 4, 6}, refills=3)
    assert fake.asked == [[0, 1], [2, 3], [4, 5]]
    assert kept(batch) == [1, 4]
    assert batch.group_sizes().tolist() == [2, 2, 2, 2]
    assert batch.scores.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert batch.probe_tokens == 4 * 5
    assert int(batch.mask.sum()) + batch.probe_tokens == 6 * 5


def test_full_at_once_draws_once(make_batch, rows):
    fake, batch = sampled(make_batch, rows, {0, 1}, refills=3)
    assert fake.asked == [[0, 1]]
    assert kept(batch) == [0, 1]
    assert batch.probe_tokens == 0


def test_more_than_needed_are_cut(make_batch, rows):
    """0 | 2 3 have a signal: two groups stay, the one too many counts as sampled with the dead one."""
    _, batch = sampled(make_batch, rows, {0, 2, 3}, refills=3)
    assert kept(batch) == [0, 2]
    assert batch.probe_tokens == 2 * 5


def test_too_few_live_groups(make_batch, rows):
    """After all refills only row 5 has a signal: it stays, a group without one fills the step, so that a step always
    holds ``prompts_per_step`` groups; the filler has advantage exactly 0."""
    fake, batch = sampled(make_batch, rows, {5}, refills=2)
    assert fake.asked == [[0, 1], [2, 3], [4, 5]]
    assert len(kept(batch)) == 2
    assert 5 in kept(batch)
    assert batch.probe_tokens == 4 * 5
    credited = DAPO(k=2).credit(batch)
    for i, row in enumerate(credited.rows):
        assert bool((credited.advantages[i] == 0).all()) == (row["id"] != 5)


def test_no_live_group_at_all(make_batch, rows):
    """A step without any signal: nothing to learn, and no NaN."""
    fake, batch = sampled(make_batch, rows, set(), refills=1)
    assert len(fake.asked) == 2
    assert len(batch) == 4
    algo = DAPO(k=2)
    credited = algo.credit(batch)
    logprobs = credited.logprobs.clone().requires_grad_()
    loss = algo.objective(logprobs, credited)
    loss.total.backward()
    assert float(loss.total.detach()) == 0
    assert (logprobs.grad == 0).all()


def test_no_refills_is_no_dynamic_sampling(make_batch, rows):
    fake, batch = sampled(make_batch, rows, {1}, refills=0)
    assert fake.asked == [[0, 1]]
    assert kept(batch) == [0, 1]
    assert batch.probe_tokens == 0


def test_refill_with_a_real_policy(ragged_policy, rows):
    """Draws of different widths are joined: each kept response still has the log-probabilities of its own tokens."""
    algo = DAPO(k=3, prompts_per_step=2, refills=2, max_new_tokens=5)

    def reward(batch):
        live = torch.tensor([row["id"] % 2 == 1 for row in batch.rows])
        return torch.where(live, torch.arange(len(batch)) % 3, 1).float()

    batch = algo.sample(ragged_policy, rows(6), reward, seeded())
    assert kept(batch) == [1, 3]
    torch.testing.assert_close(batch.logprobs * batch.mask, ragged_policy.forward(batch).detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([1.0, 0.0, 0.0, 1.0], [0.865875, -0.865875, -0.865875, 0.865875]),
        ([1.0, 0.0, 0.0, 0.0], [1.4997, -0.4999, -0.4999, -0.4999]),
        ([0.7] * 4, [0.0] * 4),
    ],
)
def test_advantage_vectors(make_batch, scores, wanted):
    batch = DAPO(k=4).credit(make_batch([4], [1, 2, 3, 1], scores=scores))
    assert batch.advantages[:, 0].tolist() == pytest.approx(wanted, abs=1e-4)


def test_token_mean(make_batch):
    """Card, aggregation: token losses [1, 1] and [-1, -1, -1, -1] → -1/3."""
    batch = make_batch([2], [2, 4])
    batch = batch.with_(advantages=torch.tensor([[-1.0], [1.0]]) * batch.mask)
    loss = DAPO(k=2).objective(batch.logprobs, batch)
    assert float(loss.total) / loss.count == pytest.approx(-0.333333, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted"),
    [(1.3, 1, -1.28), (1.25, 1, -1.25), (1.3, -1, 1.3), (0.7, 1, -0.7), (0.7, -1, 0.8), (0.75, -1, 0.8)],
)
def test_clip_higher(make_batch, ratio, advantage, wanted):
    """Card: rho = 1.3, A = 1 → -1.28; the lower side stays at .2."""
    batch = make_batch([1], [1])
    batch = batch.with_(advantages=torch.full((1, 1), float(advantage)))
    logprobs = batch.logprobs.double() + torch.tensor(ratio, dtype=torch.float64).log()
    loss = DAPO().objective(logprobs, batch)
    assert float(loss.total) / loss.count == pytest.approx(wanted, abs=1e-5)


def test_overlong_penalty_shapes_the_reward(make_batch):
    """Cap 6, buffer 4: lengths 2, 4, 5 and 6 → 0, -.5, -.75, -1 on equal rewards; deviation of these: .4269563."""
    batch = make_batch([4], [2, 4, 5, 6], scores=[0.3] * 4)
    found = DAPO(k=4, max_new_tokens=6, overlong=4).credit(batch).advantages[:, 0].tolist()
    penalty = torch.tensor([0.0, -0.5, -0.75, -1.0], dtype=torch.float64)
    wanted = (penalty - penalty.mean()) / (penalty.std(correction=1) + 1e-4)
    assert found == pytest.approx(wanted.tolist(), abs=1e-5)
    assert (DAPO(k=4, max_new_tokens=6).credit(batch).advantages == 0).all()


def test_defaults_of_the_paper():
    """Card's table: low .2, high .28, no KL."""
    algo = DAPO()
    assert (algo.clip_low, algo.clip_high, algo.kl) == (0.2, 0.28, 0.0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 1}, "k"),
        ({"temperature": 0.0}, "temperature"),
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_high": 0.0}, "clip_high"),
        ({"eps": 0.0}, "eps"),
        ({"refills": -1}, "refills"),
        ({"overlong": -1}, "overlong"),
        ({"overlong": 64, "max_new_tokens": 64}, "overlong"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        DAPO(**settings)


def test_a_run_counts_what_it_dropped(tmp_path):
    """A constant reward: every draw is dead, all refills are used, and a third of the sampled tokens are trained."""
    words = ["+algo=dapo", "reward=constant", "algo.k=2", "algo.refills=2", "algo.steps=2", "algo.overlong=0"]
    result, directory = train(tmp_path, *words, *[w for w in SMALL_RL if "steps" not in w], *SMALL_CAUSAL)
    assert result["status"] == "finished"
    steps = [line for line in lines(directory / "metrics.jsonl") if "zero_advantage" in line]
    assert [line["zero_advantage"] for line in steps] == [1.0, 1.0]
    trained, sampled_tokens = result["tokens"]["trained"], result["tokens"]["sampled"]
    assert trained == round(sum(line["length"] * 8 for line in steps))
    assert sampled_tokens > 2 * trained
