"""What must hold for every RL method: the tests find the methods in ``conf/algo``."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from alignkit.algos._rl import RL
from alignkit.config import conf_dir
from alignkit.policy import Policy
from alignkit.stages.rl import score

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


SPREAD_OUT = {  # or too few responses of too few lengths are left; and the likelihood wants normalize=groups
    "esrl_released": {"top_k": 0, "top_p": 1.0, "k": 4},
    "mrt_two_stage": {"mle_weight": 0.0},
}
PAIRS = ("rebel", "online_dpo")  # whose mean is over pairs, not over inputs, where rewards are equal


def test_methods_are_found():
    assert {"esrl", "reinforce"} <= set(METHODS)
    assert "sft" not in METHODS


def letters(batch) -> torch.Tensor:
    """Share of a response's tokens that are printable ASCII: dense, and about a third for an untrained model."""
    hit = (batch.response_ids >= LETTERS.start) & (batch.response_ids < LETTERS.stop) & batch.mask
    return hit.sum(1) / batch.lengths


def step(algo: RL, policy, data, seed: int = 0, reward=letters):
    """A batch that is sampled and credited as the stage does it; the first call fixes the start model and the critic."""
    if not hasattr(policy, "start"):
        frozen = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        policy.start = torch.no_grad()(lambda b: frozen.forward(b, b.extra.get("logprob_temperature")))
        policy.critic = algo.critic.build(policy.model) if algo.critic else None
    batch = algo.sample(policy, data, reward, torch.Generator().manual_seed(seed))
    return algo.credit(score(algo, policy, reward, policy.start if algo.wants_reference else None, batch))


def backward(algo: RL, policy, parts) -> None:
    """Leave the gradient of the mean over all parts at the weights of policy and critic."""
    modules = [m for m in (policy.model, policy.critic) if m is not None]
    count = 0.0
    for module in modules:
        module.zero_grad(set_to_none=True)
    for part in parts:
        loss = algo.loss(policy, part)
        loss.total.backward()
        count += loss.count
    for module in modules:
        for p in module.parameters():
            if p.grad is not None:
                p.grad.div_(count or 1.0)


def gradient(algo: RL, policy, parts) -> torch.Tensor:
    """The policy's gradient of the mean over all parts."""
    backward(algo, policy, parts)
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


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
        **{
            name: behind(getattr(batch, name))
            for name in ("logprobs", "ref_logprobs", "values", "returns", "advantages")
        },
    )


@pytest.mark.parametrize("name", METHODS)
def test_zero_advantages_give_exactly_no_gradient(name, policy, rows):
    """With the KL left out and old log-probabilities that are the current ones to the last bit."""
    algo = method(name, kl=0.0)
    batch = step(algo, policy, rows(3))
    with torch.no_grad():
        batch = batch.with_(logprobs=policy.forward(batch, batch.extra.get("logprob_temperature")))
    algo.mle_weight = 0.0
    assert float(gradient(algo, policy, [batch]).abs().max()) > 0, "the same batch with its own advantages has one"
    batch = batch.with_(advantages=torch.zeros_like(batch.advantages))
    assert float(gradient(algo, policy, [batch]).abs().max()) == 0.0


@pytest.mark.parametrize(
    ("name", "normalize"),
    [
        (name, normalize)
        for name in METHODS
        for normalize in ("groups", "sequences", "responses", "tokens", "constant")
        if normalize == "groups" or name not in ("mrt", "mrt_two_stage", *PAIRS)  # whose mean is fixed
    ],
)
def test_micro_batches_do_not_change_the_gradient(name, normalize, ragged_policy, rows):
    """In float64, where the order of sums is no excuse; groups of different lengths are sorted into other parts."""
    ragged_policy.model.double()
    ragged_policy.compute = torch.float64  # a critic is built from the model
    algo = method(name, normalize=normalize, **SPREAD_OUT.get(name, {}))
    batch = step(algo, ragged_policy, rows(4))
    assert batch.lengths.unique().numel() > 1
    whole = gradient(algo, ragged_policy, [batch])
    for budget in (1, 35):
        parts = batch.split(budget)
        assert len(parts) > 1
        found = gradient(algo, ragged_policy, parts)
        assert float((found - whole).norm()) <= 1e-6 * float(whole.norm())


@pytest.mark.parametrize("name", [n for n in METHODS if n not in PAIRS])
def test_micro_batches_do_not_change_the_mixed_gradient(name, policy, rows):
    """With references in the loss each input's is read once, whatever the parts."""
    policy.model.double()
    policy.compute = torch.float64
    algo = method(name, normalize="groups", mle_weight=0.5)
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


RELATIVE = [n for n in METHODS if not takes(n, "critic")]  # methods that compare responses with each other


def credited(algo: RL, policy, data, change) -> torch.Tensor:
    return step(algo, policy, data, reward=lambda batch: change(letters(batch))).advantages


@pytest.mark.parametrize("name", RELATIVE)
def test_a_constant_added_to_the_rewards_changes_no_advantage(name, policy, rows):
    settings = {"baseline": "leave_one_out"} if takes(name, "baseline") else {}
    settings |= {"capability": "max_prob"} if takes(name, "capability") else {}  # else the shift is the capability
    plain = credited(method(name, **settings), policy, rows(4), lambda r: r)
    moved = credited(method(name, **settings), policy, rows(4), lambda r: r + 2.5)
    assert float(plain.abs().max()) > 0.05
    torch.testing.assert_close(moved, plain, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_a_factor_on_the_rewards_changes_no_standardised_advantage(name, policy, rows):
    """Up to eps; what is not standardised grows with the factor."""
    plain = credited(method(name, eps=1e-8), policy, rows(4), lambda r: r)
    scaled = credited(method(name, eps=1e-8), policy, rows(4), lambda r: 10 * r)
    torch.testing.assert_close(scaled, plain, atol=1e-4, rtol=1e-4)
    other = credited(method("dr_grpo"), policy, rows(4), lambda r: 10 * r)
    torch.testing.assert_close(other, 10 * credited(method("dr_grpo"), policy, rows(4), lambda r: r), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_no_advantage_outside_the_mask(name, ragged_policy, rows):
    batch = step(method(name, **SPREAD_OUT.get(name, {})), ragged_policy, rows(4))
    assert not batch.mask.all()
    assert (batch.advantages[~batch.mask] == 0).all()
    assert torch.isfinite(batch.advantages).all()


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("name", [n for n in METHODS if takes(n, "temperature") and n != "reinforce"])
def test_samples_and_loss_speak_of_the_same_policy(name, temperature, policy, rows):
    """Log-probabilities have the sampling temperature, in the samples as in the loss: every ratio is 1 before an update.

    REINFORCE's stay at temperature 1.
    """
    algo = method(name, temperature=temperature)
    batch = step(algo, policy, rows(3))
    assert algo.loss(policy, batch).metrics["log_ratio"] < 1e-4
    hook = policy.model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits / temperature)
    with torch.no_grad():
        tempered = policy.forward(batch)  # the tempered policy itself, at temperature 1
    hook.remove()
    torch.testing.assert_close(batch.logprobs * batch.mask, tempered, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_state_survives_json(name, tiny_causal, rows):
    """A method that takes back its state draws and credits as the one that went on."""
    unbroken, resumed = method(name), method(name)
    unbroken.adapt(step(unbroken, tiny_causal, rows(3), seed=0))
    resumed.load_state(json.loads(json.dumps(unbroken.state())))
    wanted, found = step(unbroken, tiny_causal, rows(3), seed=1), step(resumed, tiny_causal, rows(3), seed=1)
    assert torch.equal(found.response_ids, wanted.response_ids)
    assert torch.equal(found.advantages, wanted.advantages)
    assert resumed.state() == unbroken.state()


@pytest.mark.parametrize("name", METHODS)
def test_reward_rises(name, policy, rows):
    """A dense toy reward, about .3 at the start, passes .55 within 40 steps of AdamW, one update a step."""
    algo, data = method(name, **EASED.get(name, {})), rows(6)
    step(algo, policy, data)  # builds the critic
    modules = [m for m in (policy.model, policy.critic) if m is not None]
    weights = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    rewards = []
    for i in range(40):
        batch = step(algo, policy, data, seed=i)
        rewards.append(float(batch.scores.mean()))
        backward(algo, policy, [batch])
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    assert rewards[0] < 0.45
    assert sum(rewards[-5:]) / 5 > 0.55, [round(r, 2) for r in rewards]


# Few samples, no reference worth staying near, no likelihood beside the reward, no narrow sampling: what is shown is that
# the objective points up.
EASED = {
    "ppo": {"k": 8, "kl": 0.0},
    "ma_ppo": {"k": 8, "kl": 0.0, "n": 2},
    "esrl_released": {"k": 8, "kl": 0.0, "top_k": 0, "top_p": 1.0, "drop": 0.0},
    "mrt": {"gold": False, "alpha": 0.1},
    "mrt_two_stage": {"k": 8, "mle_weight": 0.0, "top_k": 0, "alpha": 0.1},
    "remax": {"k": 8},
    "rebel": {"pairs": "best_worst", "k": 8, "kl": 0.0},
    "online_dpo": {"k": 8},
    "rloo": {"k": 8, "kl": 0.0},
}
