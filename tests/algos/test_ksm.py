"""Knowledge selection (arXiv 2302.00444): what is remembered of a phase, what critic and actor learn from it, noise, bonuses,
and a state that goes on where it stopped."""

from __future__ import annotations

import copy
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import BERT, TEXTS, rows_of, teacher_in
from torch import Tensor
from torch.nn import functional as F

from alignkit import selector
from alignkit.algos.ksm import KSM
from alignkit.batch import Batch
from alignkit.config import Model

ROWS = rows_of(24)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return teacher_in(tmp_path_factory.mktemp("teacher") / "t")


@pytest.fixture
def begun(teacher: str) -> Any:
    """``begun(**settings)``: (the method at the start of its first episode of three, the student)."""

    def make(**settings: Any) -> tuple[KSM, Any]:
        algo = KSM(
            **{"teacher": teacher, "hidden": 8, "updates": 2, "replay_batch": 4, "loss_scale": "none", **settings}
        )
        algo.prepare(ROWS, ("response",))
        student = algo.build(Model(config=BERT, vocab_size=300, device="cpu"), 0, TEXTS, None)
        algo.start(student, 0)
        algo.begin_episode(0, 3)
        return algo, student

    return make


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighed(algo: KSM, student: Any, first: int, seed: int) -> tuple[Batch, Tensor]:
    """A step's batch of three rows and the weights that were executed."""
    batch = algo.whole(student, algo.collate(student)(ROWS[first : first + 3]), random(seed))
    assert (batch.extra["weights"] == batch.extra["weights"][0]).all(), "one action a step"
    return batch, batch.extra["weights"][0]


def cls(reader: Any, first: int) -> Tensor:
    """Mean last state of [CLS] of three rows, each read by itself."""
    with torch.no_grad():
        ids = [torch.tensor([reader.tokenizer(row["prompt"])["input_ids"]]) for row in ROWS[first : first + 3]]
        return torch.stack(
            [reader.model(input_ids=x, output_hidden_states=True).hidden_states[-1][0, 0] for x in ids]
        ).mean(0)


def mlp(net: torch.nn.Sequential, x: Tensor) -> Tensor:
    """Linear layers with ReLU between them."""
    linear = [m for m in net if isinstance(m, torch.nn.Linear)]
    for layer in linear[:-1]:
        x = F.relu(F.linear(x, layer.weight, layer.bias))
    return F.linear(x, linear[-1].weight, linear[-1].bias)


def actor(module: selector.KSM, ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.sigmoid(
        mlp(module.actor, torch.cat([mlp(module.of_student, ours), mlp(module.of_teacher, theirs)], -1))
    )


def critic(module: selector.KSM, ours: Tensor, theirs: Tensor, action: Tensor) -> Tensor:
    state = torch.cat([mlp(module.of_student, ours), mlp(module.of_teacher, theirs), action], -1)
    return mlp(module.critic, state)[..., 0]


# ---- actions ---------------------------------------------------------------------------------------------------------


def test_depths_and_widths_are_the_cards() -> None:
    """Two layers of each map, three of actor and critic."""
    module = selector.KSM(selector.Shape(student=5, teacher=7, hidden=11, size=3))
    shapes = {
        k: [tuple(m.weight.shape) for m in net if isinstance(m, torch.nn.Linear)] for k, net in module.named_children()
    }
    assert shapes == {
        "of_student": [(11, 5), (3, 11)], "of_teacher": [(11, 7), (3, 11)],
        "actor": [(11, 6), (11, 11), (4, 11)], "critic": [(11, 10), (11, 11), (1, 11)],
    }  # fmt: skip
    action = module.mu(100 * torch.randn(50, 5), 100 * torch.randn(50, 7))
    assert action.shape == (50, 4) and action.min() >= 0 and action.max() <= 1


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_an_action_is_the_actors_with_noise_of_the_episode(begun: Any, kind: str) -> None:
    """mu of the mean [CLS] states, plus the generator's normal numbers times sigma, cut to [0, 1], then the threshold."""
    algo, student = begun(action=kind, threshold=0.45, sigma=0.8)
    for seed in range(4):
        _, found = weighed(algo, student, 3 * seed, seed)
        with torch.no_grad():
            mu = actor(algo.module, cls(student, 3 * seed), cls(algo.teacher_model, 3 * seed))
        noisy = (mu + 0.8 * torch.randn(4, generator=random(seed))).clamp(0, 1)
        if kind == "hard":
            noisy = (noisy > 0.45).float()
            noisy = noisy if noisy.any() else torch.tensor([1.0, 0, 0, 0])
        torch.testing.assert_close(found, noisy, atol=2e-5, rtol=0)


def test_noise_falls_geometrically_over_the_episodes(begun: Any) -> None:
    """0.2 to 0.02 over three: 0.2, sqrt(0.2 * 0.02), 0.02."""
    algo, student = begun()
    found = []
    for episode in range(3):
        algo.begin_episode(episode, 3)
        weighed(algo, student, 0, 0)
        found.append(algo.end_phase(1.0, 1.0, True, random(0))["sigma"])
    assert found == pytest.approx([0.2, math.sqrt(0.004), 0.02])
    algo.begin_episode(0, 1)
    weighed(algo, student, 0, 0)
    assert algo.end_phase(1.0, 1.0, True, random(0))["sigma"] == pytest.approx(0.2)


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_the_reward_is_how_far_the_loss_fell_and_the_bonus(begun: Any) -> None:
    """Soft: 1 - cos of the mean actions of two phases; 0 in the first of an episode."""
    algo, student = begun(exploration=0.5)
    means, found = [], []
    for phase in range(3):
        if phase == 2:
            algo.begin_episode(1, 3)
        means.append(sum(weighed(algo, student, 6 * phase + 3 * i, 2 * phase + i)[1] for i in range(2)) / 2)
        found.append(algo.end_phase(0.693, 0.650, phase == 1, random(0)))
    a, b = (m.tolist() for m in means[:2])
    cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
    assert 1 - cosine > 1e-4
    assert [m["bonus"] for m in found] == pytest.approx([0, 1 - cosine, 0], abs=1e-6)
    assert [m["reward"] for m in found] == pytest.approx([0.043, 0.043 + 0.5 * (1 - cosine), 0.043], abs=1e-6)


def test_a_hard_action_that_is_repeated_gives_less(begun: Any) -> None:
    """Counted over the episode, the use itself included, and anew in the next one."""
    algo, student = begun(action="hard", exploration=0.1, sigma=0.6)
    counts: dict[tuple[float, ...], int] = {}
    bonuses = []
    seeds = iter(range(100))
    for phase in range(4):
        if phase == 2:
            algo.begin_episode(1, 3)
            counts = {}
        terms = []
        for i in range(5):
            key = tuple(weighed(algo, student, 3 * i, next(seeds))[1].tolist())
            counts[key] = counts.get(key, 0) + 1
            terms.append(1 / math.sqrt(counts[key]))
        found = algo.end_phase(1.0, 0.8, phase == 1, random(0))
        assert found["bonus"] == pytest.approx(sum(terms) / 5)
        assert found["reward"] == pytest.approx(0.2 + 0.1 * sum(terms) / 5)
        bonuses.append(found["bonus"])
    assert bonuses[1] < bonuses[0] and bonuses[3] < bonuses[2], "some are repeated"


# ---- what is remembered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["phase", "uniform"])
def test_transitions(begun: Any, credit: str) -> None:
    """Two phases of two steps: the states of a phase's first step, its mean action, its reward, the next phase's first
    state; with uniform credit each step, half of the reward, the next step's state. The episode's last one is done."""
    algo, student = begun(credit=credit, exploration=0.0, updates=1)
    actions = []
    for phase, (before, after) in enumerate([(1.0, 0.7), (0.7, 0.8)]):
        actions += [weighed(algo, student, 6 * phase + 3 * i, 2 * phase + i)[1] for i in range(2)]
        algo.end_phase(before, after, phase == 1, random(0))
    ours, theirs = ([cls(r, 3 * i) for i in range(4)] for r in (student, algo.teacher_model))
    m = algo.tensors()["memory"]
    if credit == "phase":
        first, following, rewards = [0, 2], [2], [0.3, -0.1]
        acted = [(actions[0] + actions[1]) / 2, (actions[2] + actions[3]) / 2]
    else:
        first, following, rewards, acted = [0, 1, 2, 3], [1, 2, 3], [0.15, 0.15, -0.05, -0.05], actions
    torch.testing.assert_close(m["student"], torch.stack([ours[i] for i in first]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m["teacher"], torch.stack([theirs[i] for i in first]), rtol=1e-4, atol=1e-5)
    n = len(following)
    torch.testing.assert_close(m["next_student"][:n], torch.stack([ours[i] for i in following]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m["next_teacher"][:n], torch.stack([theirs[i] for i in following]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m["action"], torch.stack(acted))
    assert m["reward"].tolist() == pytest.approx(rewards)
    assert m["done"].tolist() == [0.0] * n + [1.0]


def test_what_an_episode_leaves_waiting_does_not_reach_the_next(begun: Any) -> None:
    """A transition waits for the state that follows; the replay keeps the episodes before."""
    algo, student = begun(exploration=0.0)
    sizes = []
    for episode in range(2):
        algo.begin_episode(episode, 2)
        for phase in range(3):
            weighed(algo, student, 3 * phase, 10 * episode + phase)
            algo.end_phase(1.0, 0.9, phase == 2, random(0))
            sizes.append(len(algo.tensors()["memory"].get("reward", [])))
    assert sizes == [0, 1, 3, 3, 4, 6]
    assert algo.tensors()["memory"]["done"].tolist() == [0, 0, 1, 0, 0, 1]


# ---- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "gamma"), [("standard", 0.9), ("as_summarised", 0.8)])
def test_an_update_is_that_of_the_card(begun: Any, form: str, gamma: float) -> None:
    """Written out with Adam's own first step, -lr * g / (|g| + 1e-8): the critic and the maps down the squared error, then
    the actor and the maps up Q(s, mu(s)), then the targets by tau of the way. With one transition, nothing is drawn twice."""
    algo, student = begun(
        credit="phase", td_form=form, gamma=gamma, tau=0.25, updates=1, replay_batch=1, exploration=0.0, hidden=8
    )
    weighed(algo, student, 0, 0)
    algo.end_phase(1.0, 0.7, False, random(0))  # waits: nothing is learned yet
    plain, slow = copy.deepcopy(algo.module), copy.deepcopy(algo.target)
    with torch.no_grad():  # a target that differs
        for p in (*algo.target.parameters(),):
            p += 0.1
        for p in (*slow.parameters(),):
            p += 0.1
    weighed(algo, student, 3, 1)
    seen = algo.tensors()
    first, second = (
        (seen["waiting"]["student"], seen["waiting"]["teacher"]),
        tuple(x[None] for x in seen["phase"][0][:2]),
    )
    mean_action = seen["waiting"]["action"]
    found = algo.end_phase(
        0.7, 0.6, False, random(5)
    )  # completes the first phase's transition, keeps the second waiting

    follows = critic(slow, *second, actor(slow, *second)).detach()
    wanted = 0.3 + gamma * follows if form == "standard" else gamma * 0.3 + follows
    error = (critic(plain, *first, mean_action) - wanted).square().mean()
    assert found["critic_loss"] == pytest.approx(float(error.detach()), rel=1e-4)
    maps = [*plain.of_student.parameters(), *plain.of_teacher.parameters()]
    descend(error, [*plain.critic.parameters(), *maps], algo.critic_lr)
    pick = random(5)
    torch.randint(1, (1,), generator=pick)
    states = first if int(torch.randint(2, (1,), generator=pick)) == 0 else second
    value = critic(plain, *states, actor(plain, *states)).mean()
    assert found["actor_value"] == pytest.approx(float(value.detach()), rel=1e-4, abs=1e-6)
    descend(-value, [*plain.actor.parameters(), *maps], algo.actor_lr)
    for a, b in zip(algo.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b, c in zip(algo.target.parameters(), slow.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, 0.75 * b + 0.25 * c, rtol=1e-4, atol=1e-6)


def descend(loss: Tensor, parameters: list[Any], lr: float) -> None:
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p -= lr * g / (g.abs() + 1e-8)


def test_a_critic_finds_out_which_action_pays(begun: Any) -> None:
    """Rewards that are higher the more the second kind counts: after a while the actor gives it more."""
    algo, student = begun(updates=12, replay_batch=32, actor_lr=3e-3, critic_lr=1e-2, gamma=0.0, exploration=0.0, sigma=0.3,
                          sigma_end=0.3)  # fmt: skip
    states = cls(student, 0), cls(algo.teacher_model, 0)
    before = algo.module.weights(*states)
    for step in range(30):
        _, action = weighed(algo, student, 0, step)
        algo.end_phase(float(action[1]), 0.0, True, random(step))
    after = algo.module.weights(*states)
    assert after[1] > before[1] + 0.1


# ---- a state that goes on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "credit"), list(product(["soft", "hard"], ["phase", "uniform"])))
def test_one_that_goes_on_acts_and_learns_exactly_as_the_unbroken_one(
    begun: Any, tmp_path: Path, action: str, credit: str
) -> None:
    """Broken off in the middle of a phase, with a transition waiting: through JSON and a file of tensors."""
    settings = {"action": action, "credit": credit, "sigma": 0.5, "loss_scale": "init_mean", "scale_steps": 4}
    algo, student = begun(**settings)

    def phase(one: KSM, number: int, steps: range) -> list[Any]:
        return [weighed(one, student, 3 * i, 10 * number + i)[1].tolist() for i in steps]

    for number in range(2):
        phase(algo, number, range(3))
        algo.end_phase(1.0, 0.9, False, random(number))
    algo.keep()
    phase(algo, 2, range(2))
    state = json.loads(json.dumps(algo.state()))
    torch.save(algo.tensors(), tmp_path / "algo.pt")

    def rest(one: KSM) -> Any:
        found = [phase(one, 2, range(2, 4)), one.end_phase(0.9, 0.95, True, random(2))]
        one.begin_episode(1, 3)
        found += [phase(one, 3, range(3)), one.end_phase(1.0, 0.8, False, random(3))]
        return found, one._sums, one._steps

    other, _ = begun(**settings)
    other.load_state(state)
    other.load_tensors(torch.load(tmp_path / "algo.pt", weights_only=True))
    assert rest(other) == rest(algo)
    for a, b in ((other.module, algo.module), (other.target, algo.target), (other.selector(), algo.selector())):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert any(
        not torch.equal(x, y)
        for x, y in zip(algo.module.state_dict().values(), algo.selector().state_dict().values(), strict=True)
    ), "what was kept is not what is now"


def test_what_is_saved_is_what_was_kept(begun: Any, tmp_path: Path) -> None:
    algo, student = begun(action="hard", threshold=0.4)
    states = cls(student, 0), cls(algo.teacher_model, 0)
    algo.keep()
    kept = algo.module.mu(states[0][None], states[1][None])[0].detach()
    for step in range(2):
        weighed(algo, student, 0, step)
        algo.end_phase(1.0, 0.5, False, random(0))
    algo.selector().save(tmp_path)
    loaded = selector.load(str(tmp_path))
    assert isinstance(loaded, selector.KSM)
    assert torch.equal(loaded.mu(states[0][None], states[1][None])[0], kept)
    assert not any(p.requires_grad for p in loaded.parameters())
    wanted = (kept > 0.4).float()
    assert torch.equal(loaded.weights(*states), wanted if wanted.any() else torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize(
    "settings",
    [{"gamma": 1.1}, {"tau": 0.0}, {"phases": 0}, {"episodes": 0}, {"sigma": 0.0}, {"exploration": -0.1}, {"reward_rows": 0}],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_ranges(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        KSM(**settings)
