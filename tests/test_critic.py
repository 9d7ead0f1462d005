"""The critic: HL-Gauss against its card, what the values depend on, and where the value loss sends gradients."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_model, save_model

from alignkit import losses, ops, reward_model
from alignkit.algos.ppo import PPO
from alignkit.config import Lora, Model
from alignkit.critic import Critic
from alignkit.decode import Decode
from alignkit.errors import UserError
from alignkit.policy import load

EDGES = torch.linspace(-1, 1, 9, dtype=torch.float64)  # the card's support: [-1, 1], 8 bins
SIGMA = 0.1875


def target(y: float, edges: torch.Tensor = EDGES, sigma: float = SIGMA) -> torch.Tensor:
    return ops.hl_gauss_target(torch.tensor(y, dtype=torch.float64), edges, sigma)


def decoded(y: float, edges: torch.Tensor = EDGES, sigma: float = SIGMA) -> float:
    """The value that a head has which puts out exactly the target."""
    return float(ops.hl_gauss_value(target(y, edges, sigma).clamp(min=1e-300).log(), edges))


# ---- HL-Gauss card, "Unit-test vectors" ------------------------------------------------------------------------------


def test_masses():
    wanted = [0, 0.00001, 0.001667, 0.053128, 0.340096, 0.462120, 0.134876, 0.008104]
    assert target(0.3).tolist() == pytest.approx(wanted, abs=1e-6)
    assert float(target(0.3).sum()) == pytest.approx(1.0)


def test_masses_at_the_border():
    assert target(0.95).tolist()[4:] == pytest.approx([0.000156, 0.013390, 0.222865, 0.763589], abs=1e-6)


def test_decoded_value():
    assert decoded(0.3) == pytest.approx(0.299923, abs=1e-6)


def test_entropy_and_cross_entropy():
    """H = 1.199472 is the least a head can reach; uniform logits pay log 8 = 2.079442."""
    p = target(0.3)
    assert float(ops.entropy(p.clamp(min=1e-300).log())) == pytest.approx(1.199472, abs=1e-5)
    y = torch.tensor([[0.3, 0.3]])
    logits = torch.stack([torch.zeros(8), p.clamp(min=1e-30).log().float()])[None]
    found = losses.hl_gauss(logits, y, EDGES.float(), SIGMA)
    assert found.shape == (1, 2)
    assert found[0].tolist() == pytest.approx([math.log(8), 1.199472], abs=1e-5)


@pytest.mark.parametrize("y", [0.0, 0.25, -0.25])
def test_a_target_on_an_edge_has_symmetric_masses(y):
    """On an edge inside, bins at equal distance to its left and right have equal mass."""
    p, at = target(y), int((y + 1) / 0.25)
    left, right = p[:at].flip(0), p[at:]
    n = min(len(left), len(right))
    torch.testing.assert_close(left[:n], right[:n], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("y", "same"), [(1e3, 1.0), (-1e3, -1.0), (1.5, 1.0)])
def test_far_outside_is_the_border(y, same):
    """In float32, as in training: masses and gradients are finite, and those of the border."""
    edges = EDGES.float()
    found = ops.hl_gauss_target(torch.tensor([y, same]), edges, SIGMA)
    assert torch.equal(found[0], found[1])
    assert float(found[0].sum()) == pytest.approx(1.0, abs=1e-5)
    logits = torch.zeros(1, 1, 8, requires_grad=True)
    losses.hl_gauss(logits, torch.tensor([[y]]), edges, SIGMA).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert float(logits.grad.abs().sum()) > 0.1


def test_boundary_bias():
    """Truncation pulls values inward: .95 on the card's support, and 0 and 1 on [0, 1] with 51 bins."""
    assert decoded(0.95) == pytest.approx(0.812471, abs=1e-6)
    tight = torch.linspace(0, 1, 52, dtype=torch.float64)
    assert decoded(0.0, tight, 0.75 / 51) == pytest.approx(0.0135, abs=1e-4)
    assert decoded(1.0, tight, 0.75 / 51) == pytest.approx(0.9865, abs=1e-4)


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_room_at_both_sides_mends_the_boundary(y):
    """[-.25, 1.25] with 51 bins decodes 0 and 1 to six decimals; so does the critic's default support."""
    wide = torch.linspace(-0.25, 1.25, 52, dtype=torch.float64)
    assert decoded(y, wide, 0.75 * 1.5 / 51) == pytest.approx(y, abs=1e-6)
    critic = Critic(loss="hl_gauss")
    edges = critic.edges.double()
    assert decoded(y, edges, critic.ratio * float(edges[1] - edges[0])) == pytest.approx(y, abs=1e-6)


# ---- the two kinds of head -------------------------------------------------------------------------------------------


def test_values_of_a_scalar_head(make_batch):
    raw = torch.tensor([[[0.5], [0.25]]])
    assert Critic().values(raw).tolist() == [[0.5, 0.25]]


def test_scalar_loss(make_batch):
    """1/2 max((V - R)², (clip(V, V_old ± .2) - R)²): the card's .045, then 1/2 .1² inside the clip."""
    batch = make_batch([1], [2]).with_(values=torch.tensor([[0.5, 0.8]]), returns=torch.ones(1, 2))
    assert Critic().token_losses(torch.tensor([[[0.9], [0.9]]]), batch)[0].tolist() == pytest.approx([0.045, 0.005])


def test_histogram_head(make_batch):
    """8 bins on [-1, 1] at ratio .75 are the card's sigma; the loss is a plain cross-entropy, whatever the old value."""
    critic = Critic(loss="hl_gauss", bins=8, low=-1.0, high=1.0, clip=0.01)
    assert critic.edges.tolist() == pytest.approx(EDGES.tolist())
    raw = target(0.3).clamp(min=1e-30).log().float().expand(1, 2, 8)
    assert critic.values(raw)[0].tolist() == pytest.approx([0.299923] * 2, abs=1e-5)
    batch = make_batch([1], [2]).with_(values=torch.tensor([[-0.9, 0.9]]), returns=torch.full((1, 2), 0.3))
    assert critic.token_losses(raw, batch)[0].tolist() == pytest.approx([1.199472] * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"weight": -0.1}, "weight"),
        ({"clip": 0.0}, "clip"),
        ({"bins": 1}, "bins"),
        ({"low": 1.0, "high": 1.0}, "low"),
        ({"ratio": 0.0}, "ratio"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        Critic(**settings)


# ---- beside a policy of either architecture --------------------------------------------------------------------------

KINDS = [(trunk, loss) for trunk in ("separate", "shared") for loss in ("mse", "hl_gauss")]
every = pytest.mark.parametrize(("trunk", "loss"), KINDS)


def beside(policy, trunk: str, loss: str = "mse") -> Critic:
    """A critic with weights in its head, which begins as 0."""
    critic = Critic(trunk=trunk, loss=loss, bins=7)
    policy.critic = critic.build(policy.model)
    generator = torch.Generator().manual_seed(3)
    torch.nn.init.normal_(policy.critic.head.weight, std=0.3, generator=generator)
    return critic


def sampled(policy, rows, n: int = 3, k: int = 2, tokens: int = 6):
    return policy.generate(rows(n), k, Decode(max_new_tokens=tokens), generator=torch.Generator().manual_seed(0))


@every
def test_an_untrained_critic_says_the_middle(policy, rows, trunk, loss):
    """A head of 0: the scalar 0, or the mean of a uniform histogram on [-.5, 1.5]."""
    critic = Critic(trunk=trunk, loss=loss)
    policy.critic = critic.build(policy.model)
    batch = sampled(policy, rows)
    values = critic.values(policy.value_outputs(batch))
    wanted = 0.0 if loss == "mse" else 0.5
    assert values[batch.mask].tolist() == pytest.approx([wanted] * int(batch.mask.sum()), abs=1e-6)


@every
def test_a_value_stands_before_its_token(ragged_policy, rows, trunk, loss):
    """Outputs at a position depend neither on its token nor on later ones, but on the token before."""
    beside(ragged_policy, trunk, loss)
    batch = sampled(ragged_policy, rows, n=1, k=1)
    batch = batch.with_(response_ids=torch.tensor([[5, 6, 7, 8]]), mask=torch.ones(1, 4, dtype=torch.bool))
    changed = batch.with_(response_ids=torch.tensor([[5, 6, 70, 80]]))
    one, other = (ragged_policy.value_outputs(b).detach() for b in (batch, changed))
    torch.testing.assert_close(one[:, :3], other[:, :3], atol=1e-5, rtol=0)
    assert float((one[:, 3] - other[:, 3]).abs().max()) > 1e-3


@every
def test_values_depend_on_their_row_alone(ragged_policy, rows, trunk, loss):
    """Neither other rows nor the padding that they bring; off the mask outputs are 0."""
    beside(ragged_policy, trunk, loss)
    batch = sampled(ragged_policy, rows, n=4)
    assert batch.lengths.unique().numel() > 1
    whole = ragged_policy.value_outputs(batch).detach()
    assert (whole[~batch.mask] == 0).all()
    for i in range(len(batch)):
        alone = batch.take(torch.tensor([i]))
        torch.testing.assert_close(
            whole[i : i + 1, : alone.mask.shape[1]], ragged_policy.value_outputs(alone).detach(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("loss", ["mse", "hl_gauss"])
def test_score_gives_the_values_of_a_shared_trunk(ragged_policy, rows, loss):
    """From the same pass as the log-probabilities, which do not change by it."""
    batch = sampled(ragged_policy, rows)
    wanted = ragged_policy.forward(batch).detach()
    beside(ragged_policy, "shared", loss)
    logprobs, raw = ragged_policy.score(batch)
    torch.testing.assert_close(raw, ragged_policy.value_outputs(batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logprobs, wanted, atol=1e-5, rtol=1e-5)
    assert raw.shape == (*batch.mask.shape, 1 if loss == "mse" else 7)


def test_score_gives_no_values_of_a_separate_trunk(policy, rows):
    beside(policy, "separate")
    assert policy.score(sampled(policy, rows))[1] is None


def value_step(policy, rows, trunk: str, loss: str) -> tuple[float, float]:
    """Norms of the gradient of the value loss on the policy's weights and on the critic's own."""
    algo = PPO(kl=0.0, critic=beside(policy, trunk, loss), max_new_tokens=6)
    batch = sampled(policy, rows).with_(scores=torch.linspace(0, 1, 6))
    batch = batch.with_(values=algo.critic.values(policy.value_outputs(batch)).detach() * batch.mask)
    batch = algo.credit(batch)
    batch = batch.with_(advantages=torch.zeros_like(batch.advantages))  # no policy gradient
    algo.loss(policy, batch).total.backward()
    return tuple(
        sum(float(p.grad.norm()) for p in module.parameters() if p.grad is not None)
        for module in (policy.model, policy.critic)
    )


@every
def test_where_the_value_loss_goes(policy, rows, trunk, loss):
    """Into the policy's weights only where they are the critic's trunk too."""
    of_policy, of_critic = value_step(policy, rows, trunk, loss)
    assert of_critic > 1e-4
    if trunk == "separate":
        assert of_policy == 0.0
    else:
        assert of_policy > 1e-4


@pytest.mark.parametrize("loss", ["mse", "hl_gauss"])
def test_a_separate_trunk_is_trained_and_apart(policy, rows, loss):
    """It begins as a copy of the policy, its own weights have gradients, and moving them leaves the policy alone."""
    beside(policy, "separate", loss)
    own = dict(policy.critic.trunk.named_parameters())
    for name, p in policy.model.named_parameters():
        assert torch.equal(own[name], p)
        assert own[name].data_ptr() != p.data_ptr()
    batch = sampled(policy, rows)
    before = policy.forward(batch).detach()
    policy.value_outputs(batch)[batch.mask].square().sum().backward()
    assert sum(float(p.grad.norm()) for p in own.values() if p.grad is not None) > 1e-4
    with torch.no_grad():
        for p in own.values():
            p.add_(0.1)
    assert torch.equal(policy.forward(batch).detach(), before)


@pytest.mark.parametrize(("trunk", "loss"), [("separate", "hl_gauss"), ("shared", "mse")])
def test_a_critic_learns_returns(policy, rows, trunk, loss):
    """Scores 0 and 1 to two responses of a prompt, which begin alike: 6 first tokens and a pair of second ones of 36
    cannot be told apart, so the best is 1 - 8 / 36 = .778; 60 steps on one batch come near."""
    critic = Critic(trunk=trunk, loss=loss, clip=None)
    policy.critic = critic.build(policy.model)
    algo = PPO(kl=0.0, lam=1.0, critic=critic, max_new_tokens=6)
    batch = sampled(policy, rows).with_(scores=torch.tensor([0.0, 1.0] * 3))
    batch = algo.credit(batch.with_(values=torch.zeros(batch.mask.shape)))
    weights = {id(p): p for p in [*policy.model.parameters(), *policy.critic.parameters()]}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        critic.token_losses(policy.value_outputs(batch), batch)[batch.mask].mean().backward()
        optimizer.step()
    values = critic.values(policy.value_outputs(batch)).detach() * batch.mask
    assert ops.explained_variance(batch.with_(values=values)) == pytest.approx(1 - 8 / 36, abs=0.02)


@every
def test_state_survives_a_file(policy, rows, tmp_path, trunk, loss):
    """Tied weights included: what was saved gives the same values beside the same policy."""
    critic = beside(policy, trunk, loss)
    with torch.no_grad():
        for p in policy.critic.parameters():
            p.add_(0.05)
    batch = sampled(policy, rows)
    wanted = policy.value_outputs(batch).detach()
    save_model(policy.critic, str(tmp_path / "critic.safetensors"))
    policy.critic = critic.build(policy.model)
    assert not torch.equal(policy.value_outputs(batch).detach(), wanted)
    load_model(policy.critic, tmp_path / "critic.safetensors")
    assert torch.equal(policy.value_outputs(batch).detach(), wanted)


def test_dropout_is_off_in_the_copy_too(tiny_seq2seq, rows):
    """Where the policy's is dropped, values in training mode are those of evaluation mode."""
    tiny_seq2seq.drop_dropout()
    beside(tiny_seq2seq, "separate")
    batch = sampled(tiny_seq2seq, rows)
    wanted = tiny_seq2seq.value_outputs(batch).detach()
    tiny_seq2seq.critic.train()
    assert torch.equal(tiny_seq2seq.value_outputs(batch).detach(), wanted)


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_values_in_bfloat16(policy, rows, trunk):
    """The trunk runs in bfloat16, the head and the gradients stay float32."""
    beside(policy, trunk)
    batch = sampled(policy, rows)
    wanted = policy.value_outputs(batch).detach()
    policy.compute = torch.bfloat16
    found = policy.value_outputs(batch)
    assert found.dtype == torch.float32
    assert not torch.equal(found.detach(), wanted)
    torch.testing.assert_close(found.detach(), wanted, atol=0.1, rtol=0.05)
    found.sum().backward()
    body = policy.model if trunk == "shared" else policy.critic.trunk
    assert {p.grad.dtype for p in body.parameters() if p.grad is not None} == {torch.float32}


# ---- a reward model as the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_critic_that_begins_as_a_reward_model_gives_its_scores(tmp_path, build_policy, rows, kind) -> None:
    """The value before a token is the score that the response so far would have: before the last one, that without it."""
    policy = build_policy(kind)
    policy.export(tmp_path / "policy")
    model = reward_model.build(Model(path=str(tmp_path / "policy"), device="cpu"), reward_model.Reading(), 3, [])
    model.mean, model.std = 0.25, 2.0
    model.save(tmp_path / "rm")
    policy.critic = Critic(path=str(tmp_path / "rm")).build(policy.model)
    batch = policy.demonstrations(rows(3))
    with torch.no_grad():
        values = policy.value_outputs(batch)[..., 0]
        tokens = model.head.scores(model.outputs(batch, tokens=True)[1])
    wanted = (tokens - 0.25) / 2
    for i, n in enumerate(batch.lengths.tolist()):
        torch.testing.assert_close(values[i, 1:n], wanted[i, : n - 1], atol=1e-5, rtol=1e-4)


def test_a_critic_of_another_shape_is_refused(tmp_path, build_policy) -> None:
    policy = build_policy("causal")
    policy.export(tmp_path / "policy")
    model = reward_model.build(Model(path=str(tmp_path / "policy"), device="cpu"), reward_model.Reading(), 3, [])
    model.save(tmp_path / "rm")
    other = build_policy("causal", hidden_size=32)
    with pytest.raises(UserError, match=r"critic\.path=.*on the policy's own architecture"):
        Critic(path=str(tmp_path / "rm")).build(other.model)
    with pytest.raises(ValueError, match="trunk=separate"):
        Critic(path="x", trunk="shared")


def test_a_policy_whose_padding_is_its_end_token_has_its_critic_too(tmp_path, build_policy, rows) -> None:
    """The reward model has a padding token of its own, a row more than the policy."""
    policy = build_policy("causal")
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    policy.export(tmp_path / "policy")
    model = reward_model.build(Model(path=str(tmp_path / "policy"), device="cpu"), reward_model.Reading(), 3, [])
    model.save(tmp_path / "rm")
    added = len(model.model.backbone.get_input_embeddings().weight) - len(policy.model.get_input_embeddings().weight)
    assert added == 1
    policy.critic = Critic(path=str(tmp_path / "rm")).build(policy.model)
    with torch.no_grad():
        assert policy.value_outputs(policy.demonstrations(rows(2))).abs().max() > 0


def test_a_critic_beside_adapters_is_refused(tmp_path, build_policy) -> None:
    build_policy("causal").export(tmp_path / "policy")
    start = Model(path=str(tmp_path / "policy"), device="cpu")
    reward_model.build(start, reward_model.Reading(), 3, []).save(tmp_path / "rm")
    policy = load(Model(path=str(tmp_path / "policy"), device="cpu", lora=Lora(r=2)), 0)
    with pytest.raises(UserError, match=r"critic\.path needs a policy whose weights are all trained"):
        Critic(path=str(tmp_path / "rm")).build(policy.model)
