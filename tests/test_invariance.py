"""What must hold for every RL method: the tests find the methods in ``conf/algo``."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from alignkit.algos._rl import RL
from alignkit.config import conf_dir

LETTERS = range(3, 97)  # ids of the printable ASCII bytes of the test tokenizer


def _merged(name: str) -> dict:
    """``stage`` and ``algo`` of a method's YAML on top of what it builds on."""
    cfg = OmegaConf.load(conf_dir() / "algo" / f"{name}.yaml")
    below = [d for d in cfg.get("defaults", []) if isinstance(d, str) and d != "_self_"]
    found: dict = {}
    for one in [*(_merged(d) for d in below), OmegaConf.to_container(cfg)]:
        found = {
            "stage": one.get("stage", found.get("stage")),
            "algo": {**found.get("algo", {}), **(one.get("algo") or {})},
        }
    return found


NAMES = sorted(p.stem for p in (conf_dir() / "algo").glob("*.yaml") if not p.stem.startswith("_"))
METHODS = [name for name in NAMES if _merged(name)["stage"] == "rl"]


def method(name: str, **settings: object) -> RL:
    return instantiate({**_merged(name)["algo"], "max_new_tokens": 5, **settings})


def takes(name: str, setting: str) -> bool:
    return setting in inspect.signature(get_class(_merged(name)["algo"]["_target_"])).parameters


def test_methods_are_found():
    assert {"esrl", "reinforce"} <= set(METHODS)
    assert "sft" not in METHODS


def letters(batch) -> torch.Tensor:
    """Share of a response's tokens that are printable ASCII: dense, and about a third for an untrained model."""
    hit = (batch.response_ids >= LETTERS.start) & (batch.response_ids < LETTERS.stop) & batch.mask
    return hit.sum(1) / batch.lengths


def step(algo: RL, policy, data, seed: int = 0):
    """A batch that is sampled, scored and credited."""
    batch = algo.sample(policy, data, letters, torch.Generator().manual_seed(seed))
    return algo.credit(batch.with_(scores=letters(batch)))


def gradient(algo: RL, policy, parts) -> torch.Tensor:
    """The gradient of the mean over all parts."""
    policy.model.zero_grad(set_to_none=True)
    count = 0.0
    for part in parts:
        loss = algo.loss(policy, part)
        loss.total.backward()
        count += loss.count
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]) / count


def pad(batch, policy):
    """Two more columns of padding at the prompts' side and three behind the responses, filled with a real token."""
    n = len(batch)
    more_ids, more_mask = torch.full((n, 2), policy.pad), torch.zeros(n, 2, dtype=torch.bool)
    side = (lambda more, x: [x, more]) if policy.is_encoder_decoder else (lambda more, x: [more, x])
    zeros = torch.zeros(n, 3)

    def behind(x, fill=zeros):
        return None if x is None else torch.cat([x, fill.to(x.dtype)], 1)

    return batch.with_(
        prompt_ids=torch.cat(side(more_ids, batch.prompt_ids), 1),
        prompt_mask=torch.cat(side(more_mask, batch.prompt_mask), 1),
        response_ids=behind(batch.response_ids, zeros + 7),
        mask=behind(batch.mask),
        logprobs=behind(batch.logprobs),
        advantages=behind(batch.advantages),
    )


@pytest.mark.parametrize("name", METHODS)
def test_zero_advantages_give_exactly_no_gradient(name, policy, rows):
    algo = method(name)
    batch = step(algo, policy, rows(3))
    assert float(gradient(algo, policy, [batch]).abs().max()) > 0, "the same batch with its own advantages has one"
    batch = batch.with_(advantages=torch.zeros_like(batch.advantages))
    assert float(gradient(algo, policy, [batch]).abs().max()) == 0.0


@pytest.mark.parametrize("normalize", ["groups", "sequences", "tokens"])
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_do_not_change_the_gradient(name, normalize, ragged_policy, rows):
    """In float64, where the order of sums is no excuse; groups of different lengths are sorted into other parts."""
    ragged_policy.model.double()
    algo = method(name, normalize=normalize)
    batch = step(algo, ragged_policy, rows(4))
    assert batch.lengths.unique().numel() > 1
    whole = gradient(algo, ragged_policy, [batch])
    for budget in (1, 150):
        parts = batch.split(budget)
        assert len(parts) > 1
        found = gradient(algo, ragged_policy, parts)
        assert float((found - whole).norm()) <= 1e-6 * float(whole.norm())


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_do_not_change_the_mixed_gradient(name, policy, rows):
    """With references in the loss each input's is read once, whatever the parts."""
    policy.model.double()
    algo = method(name, mle_weight=0.5)
    batch = step(algo, policy, rows(4))
    whole = gradient(algo, policy, [batch])
    found = gradient(algo, policy, batch.split(1))
    assert float((found - whole).norm()) <= 1e-6 * float(whole.norm())
    algo.mle_weight = 0.0
    assert float((gradient(algo, policy, [batch]) - whole).norm()) > 1e-3 * float(whole.norm())


@pytest.mark.parametrize("name", METHODS)
def test_padding_changes_nothing(name, ragged_policy, rows):
    algo = method(name)
    batch = step(algo, ragged_policy, rows(3))
    padded = pad(batch, ragged_policy)
    wanted, found = ragged_policy.forward(batch).detach(), ragged_policy.forward(padded).detach()
    width = wanted.shape[1]
    torch.testing.assert_close(found[:, :width], wanted, atol=1e-5, rtol=0)
    assert (found[:, width:] == 0).all()
    wanted, found = gradient(algo, ragged_policy, [batch]), gradient(algo, ragged_policy, [padded])
    assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.mark.parametrize("kind", ["leave_one_out", "batch"])
@pytest.mark.parametrize("name", [n for n in METHODS if takes(n, "baseline")])
def test_a_constant_added_to_the_rewards_changes_no_advantage(name, kind, make_batch):
    batch = make_batch([3, 2, 4], [1, 2, 3, 2, 2, 1, 3, 1, 2])
    scores = torch.tensor([0.1, 0.9, 0.4, 1.0, 0.0, 0.3, 0.3, 0.8, 0.6])
    plain = method(name, baseline=kind).credit(batch.with_(scores=scores)).advantages
    moved = method(name, baseline=kind).credit(batch.with_(scores=scores + 2.5)).advantages
    assert float(plain.abs().max()) > 0.1
    torch.testing.assert_close(moved, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_state_survives_json(name, tiny_causal, rows):
    """A method that takes back its state draws and credits as the one that went on."""
    unbroken, resumed = method(name), method(name)
    step(unbroken, tiny_causal, rows(3), seed=0)
    resumed.load_state(json.loads(json.dumps(unbroken.state())))
    wanted, found = step(unbroken, tiny_causal, rows(3), seed=1), step(resumed, tiny_causal, rows(3), seed=1)
    assert torch.equal(found.response_ids, wanted.response_ids)
    assert torch.equal(found.advantages, wanted.advantages)
    assert resumed.state() == unbroken.state()


@pytest.mark.parametrize("name", METHODS)
def test_reward_rises(name, policy, rows):
    """A dense toy reward, about .3 at the start, passes .6 within 30 steps of AdamW."""
    algo, data = method(name), rows(6)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2, weight_decay=0.0)
    rewards = []
    for i in range(30):
        batch = step(algo, policy, data, seed=i)
        rewards.append(float(batch.scores.mean()))
        gradient(algo, policy, [batch])
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
    assert rewards[0] < 0.45
    assert sum(rewards[-5:]) / 5 > 0.6, [round(r, 2) for r in rewards]
