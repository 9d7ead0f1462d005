"""ESRL: the method card's numeric checks, and that two-stage sampling has the gradient of sampling with a graph."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from alignkit import losses, ops
from alignkit.algos.esrl import ESRL
from alignkit.decode import Decode, cache_name


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Fake:
    """Stands in for a policy: it answers with a greedy batch made beforehand and records how it is asked."""

    def __init__(self, make_batch, greedy=None, vocab_size: int = 4) -> None:
        self.make_batch, self.greedy, self.asked = make_batch, greedy, None
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))
        self.device = torch.device("cpu")

    def generate(self, rows, n, how, *, temperature=None, generator=None):
        if how.greedy:
            return self.greedy
        self.asked = SimpleNamespace(k=n, tau=temperature)
        return self.make_batch(list(n))


def no_reward(batch):
    raise AssertionError("this source of capability needs no reward")


# ---- E-2: the FIFO baseline ------------------------------------------------------------------------------------------

E2_LOGPROBS = [[-10.0], [-12.0], [-20.0]]  # one token a response, so a row's sum is the vector's lp
E2_QUEUE, E2_SCORES = [0.2, 0.4, 0.6, 0.8], [0.9, 0.3, 0.1]


def e2_loss(advantages: torch.Tensor) -> tuple[float, list[float]]:
    """Loss and gradient of one prompt with three responses: the mean over 3."""
    logprobs = torch.tensor(E2_LOGPROBS, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 1, dtype=torch.bool)
    loss = losses.policy_gradient(logprobs, advantages.view(3, 1), mask, torch.zeros(3).long(), "groups")
    loss.total.backward()
    return float(loss.total.detach()) / loss.count, (logprobs.grad.flatten() / loss.count).tolist()


def credited(make_batch, scores: list[float], **settings) -> tuple[ESRL, torch.Tensor]:
    """The method after one step with the vector's queue, and the advantages of the responses."""
    algo = ESRL(queue=5, **settings)
    algo.load_state({"queue": list(E2_QUEUE), "previous": {}})
    batch = algo.credit(make_batch([len(scores)], [1] * len(scores), scores=scores))
    return algo, batch.advantages[:, 0].double()


def test_e2_push_before_read(make_batch):
    algo, advantages = credited(make_batch, E2_SCORES)
    assert algo.state()["queue"] == pytest.approx([0.6, 0.8, 0.9, 0.3, 0.1])
    assert advantages.tolist() == pytest.approx([0.9 - 0.54, 0.3 - 0.54, 0.1 - 0.54], abs=1e-6)
    loss, gradient = e2_loss(advantages)
    assert loss == pytest.approx(-2.6933333, abs=1e-5)
    assert gradient == pytest.approx([-0.12, 0.08, 0.1466667], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "baseline", "wanted"),
    [
        ("fifo", [0.5, 0.5, 0.5], -2.1333333),  # the queue as it was before the push
        ("none", [0.0, 0.0, 0.0], 4.8666667),
        ("leave_one_out", [0.2, 0.5, 0.6], -1.8),
    ],
)
def test_e2_other_baselines(kind, baseline, wanted):
    scores = torch.tensor(E2_SCORES, dtype=torch.float64)
    found = ops.baseline(kind, scores, torch.zeros(3).long(), E2_QUEUE)
    assert found.tolist() == pytest.approx(baseline, abs=1e-9)
    assert e2_loss(scores - found)[0] == pytest.approx(wanted, abs=1e-6)


def test_e2_rloo_through_credit(make_batch):
    _, advantages = credited(make_batch, E2_SCORES, baseline="leave_one_out")
    assert advantages.tolist() == pytest.approx([0.7, -0.2, -0.5], abs=1e-6)


def test_e2_standardized(make_batch):
    """Population deviation of the queue after the push: .3006659."""
    _, advantages = credited(make_batch, E2_SCORES, standardize=True)
    assert advantages.tolist() == pytest.approx([1.1973421, -0.7982281, -1.4634182], abs=1e-5)


def test_standardize_of_a_queue_without_spread(make_batch):
    """One reward, or equal ones: no NaN, and nothing to learn."""
    algo = ESRL(standardize=True)
    assert (algo.credit(make_batch([1], scores=[0.5])).advantages == 0).all()
    assert (algo.credit(make_batch([2], scores=[0.5, 0.5])).advantages == 0).all()


def test_advantages_lie_on_the_tokens_that_count(make_batch):
    """lengths 1 and 3, no baseline: the score on each real token, 0 on padding."""
    batch = ESRL(baseline="none").credit(make_batch([2], [1, 3], scores=[2.0, -1.0]))
    assert batch.advantages.tolist() == [[2.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]


# ---- E-3: capability -------------------------------------------------------------------------------------------------

Q = [[0.9, 0.8, 0.95], [0.4, 0.5, 0.3], [0.99, 0.99, 0.97], [0.2, 0.15, 0.25]]


def test_e3_max_prob(make_batch, rows):
    """Means of the rows of Q; k = floor(8 (1 - C) + .5): .93 + .5 -> 1, 4.8 + .5 -> 5, .13 + .5 -> 0 -> 1, 6.4 + .5 -> 6."""
    greedy = make_batch([1] * 4)
    greedy = greedy.with_(logprobs=torch.tensor(Q).log())
    fake = Fake(make_batch, greedy)
    algo = ESRL(capability="max_prob", k_min=1)
    batch = algo.sample(fake, rows(4), no_reward, seeded())
    means = [2.65 / 3, 0.4, 2.95 / 3, 0.2]
    assert batch.extra["capability"][batch.group_starts()].tolist() == pytest.approx(means, abs=1e-6)
    assert fake.asked.k == [1, 5, 1, 6]
    assert batch.probe_tokens == 12


def test_e3_max_prob_leaves_out_what_follows_the_end(make_batch, rows):
    """Lengths 2 and 3: (.9 + .8) / 2 and (.4 + .5 + .3) / 3; the log-probability 0 of padding is no probability 1."""
    greedy = make_batch([1, 1], [2, 3])
    greedy = greedy.with_(logprobs=torch.tensor(Q[:2]).log() * greedy.mask)
    c, tokens = ESRL(capability="max_prob")._capability(Fake(make_batch, greedy), rows(2), no_reward)
    assert c.tolist() == pytest.approx([0.85, 0.4], abs=1e-6)
    assert tokens == 5


def test_e3_entropy(make_batch, rows):
    """probs (.7, .1, .1, .1) -> .3216102; uniform -> 0; half the steps of each -> the mean, .1608051; padding left out."""
    peaked, uniform = [0.7, 0.1, 0.1, 0.1], [0.25] * 4
    probs = torch.tensor([[peaked, peaked], [uniform, uniform], [peaked, uniform], [peaked, uniform]])
    greedy = make_batch([1] * 4, [2, 2, 2, 1])
    greedy.extra["entropy"] = ops.entropy(probs.log()) * greedy.mask
    c, tokens = ESRL(capability="entropy")._capability(Fake(make_batch, greedy), rows(4), no_reward)
    assert c.tolist() == pytest.approx([0.3216102, 0.0, 0.1608051, 0.3216102], abs=1e-6)
    assert tokens == 7


@pytest.mark.parametrize("source", ["max_prob", "entropy"])
def test_confidence_of_a_real_model(ragged_policy, rows, source):
    """The same numbers from the teacher-forced logits of the greedy response, one prompt at a time."""
    data = rows(3)
    c, _ = ESRL(capability=source, max_new_tokens=5)._capability(ragged_policy, data, no_reward)
    for i, row in enumerate(data):
        greedy = ragged_policy.generate([row], 1, Decode(max_new_tokens=5, greedy=True))
        p = raw_logits(ragged_policy, greedy)[0].softmax(-1)
        wanted = (
            p.max(-1).values if source == "max_prob" else 1 + (p * p.log()).sum(-1) / torch.tensor(p.shape[-1]).log()
        )
        assert float(c[i]) == pytest.approx(float(wanted.mean()), abs=1e-5)


def raw_logits(policy, batch) -> torch.Tensor:
    """(B, T, V) of a batch without padding, from the model itself."""
    if policy.is_encoder_decoder:
        start = torch.full((len(batch), 1), policy.model.config.decoder_start_token_id)
        tokens = torch.cat([start, batch.response_ids[:, :-1]], 1)
        return policy.model(input_ids=batch.prompt_ids, decoder_input_ids=tokens).logits.detach()
    tokens = torch.cat([batch.prompt_ids, batch.response_ids[:, :-1]], 1)
    return policy.model(input_ids=tokens).logits[:, batch.prompt_ids.shape[1] - 1 :].detach()


def test_metric_capability(make_batch, rows):
    """Rewards 0, 1, 2 and 5 against reward_max 2: C = 0, .5, 1, 1 -> k = 8, 4, 2, 2 and tau = 1.2, .9, .6, .6."""
    fake = Fake(make_batch, make_batch([1] * 4, [1, 2, 3, 3]))
    algo = ESRL(capability="metric", reward_max=2.0, tau_min=0.6, tau_max=1.2)
    batch = algo.sample(fake, rows(4), lambda b: torch.tensor([0.0, 1.0, 2.0, 5.0]), seeded())
    assert fake.asked.k == [8, 4, 2, 2]
    assert fake.asked.tau.tolist() == pytest.approx([1.2, 0.9, 0.6, 0.6])
    assert batch.extra["capability"].tolist() == pytest.approx([0.0] * 8 + [0.5] * 4 + [1.0] * 4)
    assert batch.extra["tau"].tolist() == pytest.approx([1.2] * 8 + [0.9] * 4 + [0.6] * 4)
    assert batch.probe_tokens == 9
    # means over inputs, not over rows
    found = algo.metrics(batch)
    assert found == pytest.approx({"capability": 2.5 / 4, "tau": 3.3 / 4, "k": 16 / 4})


def test_negative_reward_is_no_capability(make_batch, rows):
    fake = Fake(make_batch, make_batch([1]))
    c, _ = ESRL(capability="metric")._capability(fake, rows(1), lambda b: torch.tensor([-3.0]))
    assert c.tolist() == [0.0]


def test_previous_capability(make_batch, rows):
    """Unseen inputs count as C = 0; then the mean reward of the last time, by the row's id."""
    algo, fake = ESRL(capability="previous", reward_max=2.0), Fake(make_batch)
    data = rows(3)
    first = algo.sample(fake, data, no_reward, seeded())
    assert fake.asked.k == [8, 8, 8]
    assert first.probe_tokens == 0

    drawn = make_batch([2, 1], scores=[0.5, 1.5, 2.0])  # ids 0 and 1: means 1 and 2, hence C = .5 and 1
    algo.credit(drawn)
    algo.sample(fake, data, no_reward, seeded())
    assert fake.asked.k == [4, 2, 8]
    algo.sample(fake, data[::-1], no_reward, seeded())
    assert fake.asked.k == [8, 2, 4]

    algo.credit(make_batch([1], scores=[2.0]))  # id 0 again: only the last time counts
    algo.sample(fake, data, no_reward, seeded())
    assert fake.asked.k == [2, 2, 8]


def test_the_policy_draws_as_many_as_the_rule_says(policy, rows):
    algo = ESRL(capability="previous", k_min=1, k_max=4, max_new_tokens=3)
    algo.load_state({"queue": [], "previous": {"0": 1.0, "1": 0.5, "2": 0.0}})
    batch = algo.sample(policy, rows(3), no_reward, seeded())
    assert batch.group.tolist() == [0, 1, 1, 2, 2, 2, 2]


# ---- E-4: k and tau --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_e4_samples_and_temperature(dtype):
    c = torch.tensor([0, 0.1, 0.25, 0.5, 0.8, 0.95, 1], dtype=dtype)
    assert ops.samples_by_capability(c, 1, 8).tolist() == [8, 7, 6, 4, 2, 1, 1]
    tau = [1.2, 1.14, 1.05, 0.9, 0.72, 0.63, 0.6]
    assert ops.temperature_by_capability(c, 0.6, 1.2).tolist() == pytest.approx(tau, abs=1e-6)


def test_temperature_is_off_by_default(make_batch, rows):
    fake = Fake(make_batch)
    ESRL().sample(fake, rows(2), no_reward, seeded())
    assert fake.asked.tau.tolist() == [1.0, 1.0]


# ---- E-5: weighting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("normalize", "wanted"), [("groups", 1.1666667), ("sequences", 0.75)])
def test_e5_weighting(normalize, wanted):
    logprobs = torch.tensor([[-2.0], [-3.0], [-4.0], [-1.0]])
    advantages = torch.tensor([[1.0], [-1.0], [0.5], [2.0]])
    mask, group = torch.ones(4, 1, dtype=torch.bool), torch.tensor([0, 0, 0, 1])
    loss = losses.policy_gradient(logprobs, advantages, mask, group, normalize)
    assert float(loss.total) / loss.count == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("normalize", "wanted"), [("groups", 3.5 / 3), ("sequences", 0.75), ("tokens", 3 / 7)])
def test_e5_weighting_by_the_setting(make_batch, normalize, wanted):
    """The vector as responses of 2, 1, 3 and 1 tokens, whose sums are its lp: row losses 2, -3, 2 and 2, 7 tokens."""
    logprobs = [[-1.5, -0.5, 0.0], [-3.0, 0.0, 0.0], [-2.0, -1.0, -1.0], [-1.0, 0.0, 0.0]]
    batch = make_batch([3, 1], [2, 1, 3, 1])
    batch = batch.with_(advantages=torch.tensor([1.0, -1.0, 0.5, 2.0])[:, None] * batch.mask)
    loss = ESRL(normalize=normalize).loss(Scripted(make_batch, logprobs, [[0.0]]), batch)
    assert float(loss.total) / loss.count == pytest.approx(wanted, abs=1e-6)


def test_e5_negative_advantages_have_a_gradient():
    """The released critic-free loss is flat at A = -1, logp = -2; ours has gradient -A = 1."""
    logprobs = torch.tensor([[-2.0]], requires_grad=True)
    one = torch.ones(1, 1)
    losses.policy_gradient(logprobs, -one, one.bool(), torch.zeros(1).long(), "groups").total.backward()
    assert logprobs.grad.tolist() == [[1.0]]


# ---- E-6: two-stage sampling -----------------------------------------------------------------------------------------


def single_stage(
    policy, batch, advantages: torch.Tensor, uniform: torch.Tensor
) -> tuple[list[list[int]], torch.Tensor]:
    """Sample token by token with the graph kept, one response at a time and without padding; the ids and the loss.

    The loss is the card's F2 by hand: -(1/B) sum_i (1/k_i) sum_j A_ij lp_ij.
    """
    model, drawn, loss = policy.model, [], 0.0
    sizes = torch.bincount(batch.group)
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row : row + 1, batch.prompt_mask[row]]
        if policy.is_encoder_decoder:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            fixed = {"encoder_outputs": model.get_encoder()(input_ids=prompt)}
            name, tokens = "decoder_input_ids", torch.tensor([[model.config.decoder_start_token_id]])
        else:
            cache, fixed, name, tokens = DynamicCache(), {}, "input_ids", prompt
        ids, lp = [], 0.0
        for t in range(uniform.shape[1]):
            logits = model(**{name: tokens}, **fixed, **{cache_name(model): cache}, use_cache=True).logits[0, -1]
            with torch.no_grad():
                token = int((logits.float().softmax(-1).cumsum(-1) <= uniform[row, t]).sum())
            lp = lp + logits.log_softmax(-1)[token]
            ids.append(token)
            if token in policy.eos:
                break
            tokens = torch.tensor([[token]])
        drawn.append(ids)
        i = batch.group[row]
        loss = loss - advantages[row] * lp / sizes[i] / len(sizes)
    return drawn, loss


def gradient(policy, loss: torch.Tensor) -> torch.Tensor:
    policy.model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_e6_two_stages_have_the_gradient_of_one(ragged_policy, rows, dtype, tolerance):
    ragged_policy.model.to(dtype)
    counts, width = [3, 1, 2], 6
    batch = ragged_policy.generate(rows(3), counts, Decode(max_new_tokens=width), generator=seeded(3))
    assert batch.lengths.unique().numel() > 1, "responses of different lengths, so that padding takes part"
    advantages = torch.tensor([0.7, -0.2, -0.5, 1.0, 0.3, -0.4])

    uniform = torch.rand(sum(counts), width, generator=seeded(3))  # what `decode` draws from
    ids, one_stage = single_stage(ragged_policy, batch, advantages, uniform)
    assert ids == [row[m].tolist() for row, m in zip(batch.response_ids, batch.mask, strict=True)]
    wanted = gradient(ragged_policy, one_stage)

    loss = losses.policy_gradient(
        ragged_policy.forward(batch), advantages[:, None] * batch.mask, batch.mask, batch.group, "groups"
    )
    found = gradient(ragged_policy, loss.total / loss.count)
    assert float(wanted.norm()) > 1e-3
    assert float((found - wanted).norm() / wanted.norm()) < tolerance
    assert float(loss.total.detach()) / loss.count == pytest.approx(float(one_stage.detach()), rel=tolerance)


def test_e6_first_stage_has_no_graph(policy, rows):
    batch = policy.generate(rows(3), [2, 1, 2], Decode(max_new_tokens=4, entropy=True), generator=seeded())
    tensors = [batch.logprobs, batch.response_ids, batch.prompt_ids, batch.mask, *batch.extra.values()]
    assert not any(t.requires_grad or t.grad_fn is not None for t in tensors)
    assert policy.forward(batch).requires_grad, "the second stage has"


def test_e6_stages_agree_on_the_log_probabilities(ragged_policy, rows):
    batch = ragged_policy.generate(rows(4), [4, 1, 2, 3], Decode(max_new_tokens=8), generator=seeded(1))
    assert batch.lengths.unique().numel() > 1
    again = ragged_policy.forward(batch).detach()
    torch.testing.assert_close((again * batch.mask).sum(1), (batch.logprobs * batch.mask).sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(again, batch.logprobs, atol=1e-4, rtol=0)


def test_e6_padding_a_row_does_not_change_it(ragged_policy, rows):
    """Alone, each row has no padding at all; in the batch it may have some on either end."""
    batch = ragged_policy.generate(rows(4), 2, Decode(max_new_tokens=6), generator=seeded(2))
    together = ragged_policy.forward(batch).detach()
    assert not batch.mask.all() and not batch.prompt_mask.all()
    for i in range(len(batch)):
        alone = ragged_policy.forward(batch.take(torch.tensor([i]))).detach()[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-4, rtol=0)
        assert (together[i, len(alone) :] == 0).all()


def test_e6_dropout_stays_out_of_the_first_stage(tiny_seq2seq, rows):
    """A policy in training mode samples without dropout and is in training mode afterwards."""
    policy = tiny_seq2seq
    policy.model.train()
    batch = policy.generate(rows(3), 2, Decode(max_new_tokens=4), generator=seeded())
    assert policy.model.training
    assert float((policy.forward(batch).detach() - batch.logprobs).abs().max()) > 1e-2, "dropout is on"
    policy.model.eval()
    torch.testing.assert_close(policy.forward(batch).detach(), batch.logprobs, atol=1e-4, rtol=0)


def test_e6_mask_vector():
    """lp = (-.5, -1, -.2, -9): -1.7 with the last token masked, -10.7 without."""
    logprobs, one = torch.tensor([[-0.5, -1.0, -0.2, -9.0]]), torch.ones(1, 4)
    mask = torch.tensor([[True, True, True, False]])
    group = torch.zeros(1).long()
    assert float(losses.policy_gradient(logprobs, one, mask, group, "groups").total) == pytest.approx(1.7)
    assert float(losses.policy_gradient(logprobs, one, one.bool(), group, "groups").total) == pytest.approx(10.7)


# ---- E-7: the mixed loss ---------------------------------------------------------------------------------------------


class Scripted:
    """A policy that returns prepared log-probabilities: ``samples`` for drawn responses, ``gold`` for references."""

    def __init__(self, make_batch, samples, gold) -> None:
        self.samples, self.gold, self.asked = torch.tensor(samples), torch.tensor(gold), None
        self.references = make_batch([1] * len(gold), [len(g) for g in gold])

    def demonstrations(self, rows, max_tokens=None):
        self.asked = [row["id"] for row in rows]
        return self.references

    def forward(self, batch, temperature=None):
        return self.gold if batch is self.references else self.samples

    def score(self, batch, temperature=None):
        return self.forward(batch), None


def test_e7_mixing(make_batch):
    """L_RL -.70015, MLE 2.0 and lambda .7 -> .109895: lambda times the loss with mle_weight = .3 / .7.

    One response with lp = -.70015 and advantage -1 has the vector's L_RL (there a minimum-risk loss).
    """
    batch = make_batch([1], [1]).with_(advantages=torch.tensor([[-1.0]]))
    scripted = Scripted(make_batch, [[-0.70015]], [[-0.5, -1.5]])
    loss = ESRL(mle_weight=0.3 / 0.7).loss(scripted, batch)
    assert 0.7 * float(loss.total) / loss.count == pytest.approx(0.1098950, abs=1e-6)
    assert loss.metrics["nll"] == pytest.approx(1.0)  # 2.0 over two tokens


def test_mixing_counts_each_reference_once(make_batch):
    """Inputs with 3 and 1 samples: RL (1 + 2 + 3) / 3 and 5, references 2 and 4; (2 + 5) / 2 + .5 (2 + 4) / 2 = 5."""
    batch = make_batch([3, 1], [1] * 4).with_(advantages=torch.ones(4, 1))
    scripted = Scripted(make_batch, [[-1.0], [-2.0], [-3.0], [-5.0]], [[-2.0], [-4.0]])
    loss = ESRL(mle_weight=0.5).loss(scripted, batch)
    assert scripted.asked == [0, 1]
    assert loss.count == 2.0
    assert float(loss.total) / loss.count == pytest.approx(5.0)


# ---- temperature of the log-probabilities ----------------------------------------------------------------------------


def tempered(policy, rows, how: str):
    """A step with C = 0 and 1, hence k = 2 and 1 and tau = 2 and .5, advantages 1."""
    algo = ESRL(k_min=1, k_max=2, tau_min=0.5, tau_max=2.0, max_new_tokens=4, logprob_temperature=how)
    algo.load_state({"queue": [], "previous": {"1": 1.0}})
    batch = algo.sample(policy, rows(2), no_reward, seeded())
    return algo, batch.with_(advantages=batch.mask.float())


@pytest.mark.parametrize(("how", "taus"), [("sampling", [2.0, 2.0, 0.5]), ("one", [1.0, 1.0, 1.0])])
def test_logprob_temperature(policy, rows, how, taus):
    """``sampling`` divides each row's logits by its temperature; by hand, row after row. Either way micro-batches agree."""
    algo, batch = tempered(policy, rows, how)
    assert batch.extra["tau"].tolist() == [2.0, 2.0, 0.5]
    wanted = 0.0
    for i, weight in enumerate([0.5, 0.5, 1.0]):
        one = batch.take(torch.tensor([i]))
        one = one.with_(prompt_ids=one.prompt_ids[:, one.prompt_mask[0]])
        logp = (raw_logits(policy, one)[0] / taus[i]).log_softmax(-1)
        wanted -= weight * float(logp.gather(1, one.response_ids.T).sum())
    loss = algo.loss(policy, batch)
    assert loss.count == 2.0
    assert float(loss.total.detach()) == pytest.approx(wanted, rel=1e-5)
    parts = batch.split(1)
    assert len(parts) == 2
    assert sum(float(algo.loss(policy, part).total.detach()) for part in parts) == pytest.approx(wanted, rel=1e-5)


def test_sampled_log_probabilities_have_the_temperature_of_the_gradient(policy, rows):
    _, batch = tempered(policy, rows, "one")
    torch.testing.assert_close(batch.logprobs, policy.forward(batch).detach(), atol=1e-4, rtol=0)
    _, batch = tempered(policy, rows, "sampling")
    tau = batch.extra["logprob_temperature"]
    torch.testing.assert_close(batch.logprobs, policy.forward(batch, tau).detach(), atol=1e-4, rtol=0)


# ---- settings and state ----------------------------------------------------------------------------------------------


def test_state_survives_json(make_batch, rows):
    """A resumed method draws and credits as the unbroken one does."""
    unbroken, resumed, data = ESRL(queue=3), ESRL(queue=3), rows(3)
    unbroken.credit(make_batch([2, 1], [1] * 3, scores=[0.25, 0.75, 1.0]))
    resumed.load_state(json.loads(json.dumps(unbroken.state())))
    for algo in (unbroken, resumed):
        fake = Fake(make_batch)
        algo.sample(fake, data, no_reward, seeded())
        assert fake.asked.k == [4, 2, 8]  # C = .5, 1 and unseen
        after = algo.credit(make_batch([1], [1], scores=[0.25]))
        assert after.advantages[0].tolist() == pytest.approx([0.25 - 2.0 / 3])  # of (.75, 1, .25)
    assert resumed.state() == unbroken.state()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k_min": 5, "k_max": 4}, "k_min"),
        ({"k_min": 0}, "k_min"),
        ({"tau_min": -0.5}, "tau_min"),
        ({"tau_min": 0.0}, "tau_min"),
        ({"tau_min": 1.2, "tau_max": 0.6}, "tau_max"),
        ({"k_min": 1, "baseline": "leave_one_out"}, "k_min"),
        ({"reward_max": 0.0}, "reward_max"),
        ({"queue": 0}, "queue"),
        ({"standardize": True, "baseline": "batch"}, "standardize"),
        ({"mle_weight": -0.1}, "mle_weight"),
        ({"mle_weight": 0.5, "normalize": "tokens"}, "mle_weight"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"lr": -1e-5}, "lr"),
        ({"steps": 0}, "steps"),
        ({"prompts_per_step": 0}, "prompts_per_step"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"epochs": 0}, "epochs"),
        ({"minibatches": 0}, "minibatches"),
        ({"micro_tokens": 0}, "micro_tokens"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        ESRL(**settings)


def test_edges_of_the_settings_are_allowed():
    ESRL(k_min=1, k_max=1, tau_min=0.1, tau_max=0.1, queue=1, top_p=1.0, lr=0.0)
    ESRL(baseline="leave_one_out", k_min=2, k_max=2)
