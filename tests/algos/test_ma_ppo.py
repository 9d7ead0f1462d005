"""MA-PPO against the worked examples of the ma_rlhf card."""

from __future__ import annotations

import pytest
import torch

from alignkit.algos.ma_ppo import MAPPO
from alignkit.algos.ppo import PPO


def rollout(make_batch, values: list[float], score: float = 1.0):
    """One response; each token costs kl * 1 nat, the last also earns the score."""
    n = len(values)
    batch = make_batch([1], [n], scores=[score])
    return batch.with_(logprobs=torch.ones(1, n), ref_logprobs=torch.zeros(1, n), values=torch.tensor([values]))


def macros(batch) -> list[int]:
    """Sizes of the first row's macros, in order."""
    index = batch.extra["macro"][0][batch.mask[0]]
    return torch.unique_consecutive(index, return_counts=True)[1].tolist()


def laid_out(per_macro: list[float], sizes: list[int]) -> list[float]:
    return [a for a, n in zip(per_macro, sizes, strict=True) for _ in range(n)]


E1 = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
E1_TOKENS = [0.406413, 0.375172, 0.342286, 0.30767, 0.271231, 0.232875, 0.1925, 0.15]


@pytest.mark.parametrize(
    ("reading", "wanted"),
    [("mean", [0.566231, 0.332875, 0.1925, 0.15]), ("sum", [0.371231, 0.232875, 0.1925, 0.15])],
)
def test_e1(make_batch, reading, wanted):
    """L = 8, n = 3 -> sizes 3, 3, 1, 1; V_k = (.2, .5, .7, .8); returns are A_k + V_k, one a macro."""
    batch = MAPPO(n=3, kl=0.05, macro_reward=reading).credit(rollout(make_batch, E1))
    sizes = [3, 3, 1, 1]
    assert macros(batch) == sizes
    assert batch.advantages[0].tolist() == pytest.approx(laid_out(wanted, sizes), abs=1e-6)
    returns = [a + v for a, v in zip(wanted, [0.2, 0.5, 0.7, 0.8], strict=True)]
    assert batch.returns[0].tolist() == pytest.approx(laid_out(returns, sizes), abs=1e-6)


@pytest.mark.parametrize("reading", ["mean", "sum"])
def test_e1_of_single_tokens(make_batch, reading):
    batch = MAPPO(n=1, kl=0.05, macro_reward=reading).credit(rollout(make_batch, E1))
    assert batch.advantages[0].tolist() == pytest.approx(E1_TOKENS, abs=1e-6)


def test_e2_has_no_empty_macro(make_batch):
    """L = 7, n = 3: the last boundary falls on the last token; sizes 3, 3, 1, not 3, 3, 0, 1."""
    batch = MAPPO(n=3, kl=0.05, macro_reward="mean").credit(rollout(make_batch, E1[:7]))
    assert macros(batch) == [3, 3, 1]
    assert batch.advantages[0].tolist() == pytest.approx(laid_out([0.618125, 0.3875, 0.25], [3, 3, 1]), abs=1e-6)


def test_e3_actor_loss(make_batch):
    """Ratios 1.10517, .90484, 1.64872; the second macro is its last token."""
    old, advantages = torch.tensor([[-1.1, -0.4, -2.5]]), torch.tensor([[0.5, 0.5, -1.0]])
    batch = make_batch([1]).with_(logprobs=old, advantages=advantages)
    loss = MAPPO().objective(torch.tensor([[-1.0, -0.5, -2.0]]), batch)
    assert float(loss.total) / loss.count == pytest.approx(0.214572, abs=1e-6)


def test_e4_perplexity(make_batch):
    """Perplexities (5, 3, 2, 4, 3.5, 6, 1): a macro starts at the token that rises, 3 and 5; then the last token."""
    batch = rollout(make_batch, [0.0] * 7)
    batch = batch.with_(ref_logprobs=-torch.tensor([[5, 3, 2, 4, 3.5, 6, 1]]).log())
    assert macros(MAPPO(termination="perplexity").credit(batch)) == [3, 2, 1, 1]


def test_perplexity_asks_for_the_start_model():
    """Its token perplexity decides where macros end, also where no KL is taken."""
    assert MAPPO(termination="perplexity", kl=0.0).wants_reference
    assert not MAPPO(termination="fixed", kl=0.0).wants_reference


@pytest.mark.parametrize("reading", ["mean", "sum"])
@pytest.mark.parametrize("value", ["equal", "unit", "position"])
def test_one_token_a_macro_is_ppo_exactly(make_batch, value, reading):
    """Ragged rows, gamma and lambda below 1, random numbers: the same floats, and the same loss."""
    generator = torch.Generator().manual_seed(0)
    batch = make_batch([2, 1, 1], [5, 1, 2, 4], scores=[0.3, -1.0, 0.7, 2.0])
    lp, ref, values, new = (torch.randn(4, 5, generator=generator) for _ in range(4))
    batch = batch.with_(logprobs=lp, ref_logprobs=ref, values=values * batch.mask)
    shared = {"kl": 0.1, "gamma": 0.9, "lam": 0.8}
    token = PPO(whiten="none", **shared)
    macro = MAPPO(n=1, macro_value=value, macro_reward=reading, **shared)
    wanted, found = token.credit(batch), macro.credit(batch)
    assert torch.equal(found.advantages, wanted.advantages)
    assert torch.equal(found.returns, wanted.returns)
    assert torch.equal(macro.objective(new, found).total, token.objective(new, wanted).total)


def test_rows_have_their_own_macros(make_batch):
    """Rows of 1, 2 and 5 tokens at n = 2: each has its last token alone, and a value of its own."""
    batch = make_batch([1] * 3, [1, 2, 5], scores=[1.0, 1.0, 1.0]).with_(values=torch.zeros(3, 5))
    batch = MAPPO(n=2, kl=0.0, lam=0.5).credit(batch)
    wanted = [[1, 0, 0, 0, 0], [0.5, 1, 0, 0, 0], [0.25, 0.25, 0.5, 0.5, 1]]
    assert batch.advantages.tolist() == wanted
    assert batch.returns.tolist() == wanted


def test_a_whole_response_is_one_macro_and_its_last_token(make_batch):
    assert macros(MAPPO(n=100).credit(rollout(make_batch, [0.0] * 6))) == [5, 1]


@pytest.mark.parametrize(("kind", "value"), [("equal", 0.45), ("unit", 0.3), ("position", 0.5)])
def test_value_of_a_macro(make_batch, kind, value):
    """Values .6 and .3: their mean, the last, or weights 1 and 1/2 normalised, (2 * .6 + .3) / 3. A = R - V + V_2."""
    batch = MAPPO(n=2, macro_value=kind, kl=0.0, lam=0.0).credit(rollout(make_batch, [0.6, 0.3, 0.1]))
    assert batch.advantages[0].tolist() == pytest.approx([0.1 - value, 0.1 - value, 0.9], abs=1e-6)


def test_rewards_inside_a_macro_are_discounted(make_batch):
    """R_k = sum_j gamma^j r_{b+j}: tokens cost 1 each, gamma .5: 1 + .5 + .25; the last token -1 + 4."""
    batch = MAPPO(n=3, kl=1.0, gamma=0.5, lam=0.0).credit(rollout(make_batch, [0.0] * 4, score=4.0))
    assert batch.advantages[0].tolist() == pytest.approx([-1.75] * 3 + [3.0])


def test_advantages_are_not_whitened(make_batch):
    batch = MAPPO(n=2, kl=0.0, lam=1.0).credit(rollout(make_batch, [0.0] * 5, score=7.0))
    assert batch.advantages[0].tolist() == [7.0] * 5


# ---- randomized macros -----------------------------------------------------------------------------------------------


class Fake:
    """Gives the same batch whenever it is asked to generate."""

    device = torch.device("cpu")

    def __init__(self, batch) -> None:
        self.batch = batch

    def generate(self, rows, n, how, *, temperature=None, generator=None):
        return self.batch.with_(extra={})


def sampled(make_batch, lengths: list[int], seed: int, **settings):
    algo = MAPPO(termination="randomized", **settings)
    fake = Fake(make_batch([1] * len(lengths), lengths, scores=[0.0] * len(lengths)))
    return algo.sample(fake, [{}] * len(lengths), None, torch.Generator().manual_seed(seed))


def test_randomized_macros_shuffle_the_list(make_batch):
    """repeat_times 1: 1, 2, 3, 5, 10 in some order are 21 tokens; of 24 two are left over, and the last is alone."""
    batch = sampled(make_batch, [24] * 6, 0, repeat_times=1)
    orders = set()
    for i in range(6):
        sizes = macros(batch.take(torch.tensor([i])).with_(extra={"macro": batch.extra["macro"][i : i + 1]}))
        assert sorted(sizes[:5]) == [1, 2, 3, 5, 10]
        assert sizes[5:] == [2, 1]
        orders.add(tuple(sizes))
    assert len(orders) > 1, "each response has an order of its own"


def test_randomized_macros_repeat_the_list(make_batch):
    """Twice 21 tokens and the last: each size stands there twice."""
    assert sorted(macros(sampled(make_batch, [43], 0, repeat_times=2))[:-1]) == [1, 1, 2, 2, 3, 3, 5, 5, 10, 10]


def test_randomized_macros_follow_the_generator(make_batch):
    draws = [sampled(make_batch, [24] * 3, seed).extra["macro"] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_randomized_macros_are_what_credit_uses(make_batch):
    """The macros that were drawn, not the fixed ones: advantages of one macro are equal, lam .5 halves at each border."""
    batch = sampled(make_batch, [24], 0).with_(values=torch.zeros(1, 24), scores=torch.ones(1))
    sizes = macros(batch)
    credited = MAPPO(termination="randomized", kl=0.0, lam=0.5).credit(batch)
    wanted = laid_out([0.5 ** (len(sizes) - 1 - i) for i in range(len(sizes))], sizes)
    assert credited.advantages[0].tolist() == wanted


def test_metrics_count_macros(make_batch):
    """Rows of 5 and 1 tokens at n = 2: 3 and 1 macros."""
    algo = MAPPO(n=2, kl=0.0)
    batch = algo.credit(make_batch([1, 1], [5, 1], scores=[1.0, 0.0]).with_(values=torch.zeros(2, 5)))
    assert algo.metrics(batch)["macros"] == 2.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 0}, "k"),
        ({"n": 0}, "n"),
        ({"repeat_times": 0}, "repeat_times"),
        ({"temperature": 0.0}, "temperature"),
        ({"clip": 0.0}, "clip"),
        ({"gamma": 1.5}, "gamma"),
        ({"lam": -0.5}, "lam"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        MAPPO(**settings)
