"""ReMax against the method card (baselines.md, "ReMax") and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from running import SMALL_RL, SMALL_SEQ2SEQ, lines, train

from alignkit.algos.remax import ReMax
from alignkit.stages.rl import score


class Fake:
    """Stands in for a policy; responses are named after the row and how they were decoded: ``greedy 0``, ``sample 0.1``."""

    is_encoder_decoder = False
    device = torch.device("cpu")

    def __init__(self, make_batch, ref: float = 0.0) -> None:
        self.make_batch, self.ref = make_batch, ref

    def generate(self, rows, n, how, *, temperature=None, generator=None):
        if how.greedy:
            batch, texts = self.make_batch([1] * len(rows), [4] * len(rows)), [f"greedy {r['id']}" for r in rows]
        else:
            batch = self.make_batch([n] * len(rows), [2, 3][:n] * len(rows))
            texts = [f"sample {r['id']}.{j}" for r in rows for j in range(n)]
        return batch.with_(rows=[r for r in rows for _ in range(len(batch) // len(rows))], responses=texts)


def credited(make_batch, rows, scores: dict[str, float], n: int, **settings):
    """The batch that is trained, and every response that the reward was asked for."""
    algo, seen = ReMax(**settings), []
    fake = Fake(make_batch)

    def reward(batch):
        seen.extend(batch.responses)
        return torch.tensor([scores[text] for text in batch.responses])

    batch = algo.sample(fake, rows(n), reward, torch.Generator().manual_seed(0))
    return algo.credit(score(algo, fake, reward, None, batch)), seen


def test_card_vector(make_batch, rows):
    """R = [1, 0, 0, 1], greedy 1 → [0, -1, -1, 0]; the greedy rows are scored, then gone."""
    scores = {f"sample {i}.0": r for i, r in enumerate([1.0, 0.0, 0.0, 1.0])} | {f"greedy {i}": 1.0 for i in range(4)}
    batch, seen = credited(make_batch, rows, scores, 4)
    assert batch.advantages[:, 0].tolist() == [0.0, -1.0, -1.0, 0.0]
    assert sorted(seen) == sorted(scores)
    assert batch.responses == [f"sample {i}.0" for i in range(4)]
    assert batch.advantages.shape[1] == 2, "the greedy rows' width is trimmed away with them"


def test_each_prompt_has_its_own_greedy_baseline(make_batch, rows):
    """Two samples each: (3, 1) against 2, (0, 5) against 4."""
    scores = {
        "sample 0.0": 3.0,
        "sample 0.1": 1.0,
        "greedy 0": 2.0,
        "sample 1.0": 0.0,
        "sample 1.1": 5.0,
        "greedy 1": 4,
    }
    batch, _ = credited(make_batch, rows, scores, 2, k=2)
    assert batch.responses == ["sample 0.0", "sample 0.1", "sample 1.0", "sample 1.1"]
    assert batch.group.tolist() == [0, 0, 1, 1]
    assert batch.advantages[:, 0].tolist() == [1.0, -1.0, -4.0, 1.0]


def test_the_difference_is_clipped_not_the_rewards(make_batch, rows):
    """Card: the difference is cut to ± 5. 19 - 12 = 7 → 5 (rewards cut to ± 5 would leave 0); 8 - 12 = -4; 0 - 12 → -5."""
    scores = {"sample 0.0": 19.0, "sample 1.0": 8.0, "sample 2.0": 0.0} | {f"greedy {i}": 12.0 for i in range(3)}
    batch, _ = credited(make_batch, rows, scores, 3, difference_clip=5.0)
    assert batch.advantages[:, 0].tolist() == [5.0, -4.0, -5.0]
    batch, _ = credited(make_batch, rows, scores, 3)
    assert batch.advantages[:, 0].tolist() == [7.0, -4.0, -12.0]


def test_loss_is_over_the_number_of_tokens(make_batch, rows):
    """-sum A_t log pi / #tokens: advantages 2 and -1 on 2 and 3 tokens, lp -1 a token: (4 - 3) / 5."""
    scores = {"sample 0.0": 3.0, "sample 0.1": 0.0, "greedy 0": 1.0}
    batch, _ = credited(make_batch, rows, scores, 1, k=2)
    loss = ReMax(k=2).objective(torch.full((2, 3), -1.0), batch)
    assert float(loss.total) / loss.count == pytest.approx((4 - 3) / 5)


def test_kl_of_the_whole_response_in_both_rewards(make_batch, rows):
    """Default reading of the card: full sequence KL in R of both. .1 nats a token below: a sample of 2 tokens pays .2,
    the greedy one of 4 pays .4, at a coefficient of 1: 1 - .2 - (1 - .4) = .2."""
    algo, fake = ReMax(kl=1.0), Fake(make_batch)
    batch = algo.sample(fake, rows(1), None, torch.Generator().manual_seed(0))
    batch = algo.credit(score(algo, fake, lambda b: torch.ones(len(b)), lambda b: (b.logprobs - 0.1) * b.mask, batch))
    assert batch.advantages[0, 0] == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_kl_to_oneself_is_nothing(policy, rows, temperature):
    """The start model itself has KL 0 for sampled and greedy responses alike: A = R - R_greedy, whatever the temperature."""
    algo = ReMax(k=2, kl=1.0, temperature=temperature, max_new_tokens=5)
    batch = algo.sample(policy, rows(3), None, torch.Generator().manual_seed(0))

    @torch.no_grad()
    def start(part):
        return policy.forward(part, part.extra.get("logprob_temperature"))

    batch = algo.credit(score(algo, policy, lambda b: torch.ones(len(b)), start, batch))
    assert len(batch) == 6
    assert batch.advantages.abs().max() < 1e-3


def test_greedy_is_greedy(policy, rows):
    """Near temperature 0 a sample is the greedy response; so with any reward of the text the advantage is 0."""
    algo = ReMax(temperature=1e-4, max_new_tokens=4)
    batch = algo.sample(policy, rows(3), None, torch.Generator().manual_seed(0))
    reward = lambda b: torch.tensor([float(sum(map(ord, t))) for t in b.responses])  # noqa: E731
    batch = algo.credit(score(algo, policy, reward, None, batch))
    assert len(batch) == 3
    assert (batch.advantages == 0).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"k": 0}, "k"), ({"temperature": 0.0}, "temperature"), ({"difference_clip": 0.0}, "difference_clip")],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        ReMax(**settings)


def test_a_run_trains_the_samples_and_counts_the_greedy(tmp_path):
    """4 prompts, 2 samples each: what is trained is the samples' tokens; the greedy ones are sampled beside them."""
    words = ["+algo=remax", "algo.k=2", "algo.steps=2", "algo.kl=0.05"]
    result, directory = train(tmp_path, *words, *[w for w in SMALL_RL if "steps" not in w], *SMALL_SEQ2SEQ)
    assert result["status"] == "finished"
    steps = [line for line in lines(directory / "metrics.jsonl") if "zero_advantage" in line]
    assert len(steps) == 2
    trained = round(sum(line["length"] * 8 for line in steps))
    assert result["tokens"]["sampled"] > trained
    assert result["tokens"]["trained"] == trained
