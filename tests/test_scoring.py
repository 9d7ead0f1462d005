"""The teacher-forced pass against a plain forward of one row at a time, on architectures that differ in kind."""

from __future__ import annotations

import copy

import pytest
import torch

from alignkit.batch import Batch
from alignkit.config import Lora, Model
from alignkit.decode import Decode
from alignkit.policy import Policy, load
from alignkit.reader import compute_in, layers_of
from alignkit.scoring import by_parts, teacher_forced

TEXTS = ["the cat sat", "a dog ran far", "birds sing", "we eat apples and bread", "rain"]

_CAUSAL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}
ARCHITECTURES = {
    "llama": _CAUSAL,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3},
    "mistral": _CAUSAL | {"sliding_window": 4},
    "gemma3_text": _CAUSAL
    | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": _CAUSAL | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "t5": {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32, "initializer_factor": 1.5},
    "bart": _BART,
    "marian": _BART,
    "m2m_100": _BART,
}
CAUSAL = [name for name in ARCHITECTURES if name not in ("t5", "bart", "marian", "m2m_100")]


def built(name: str, **more: object) -> Policy:
    model = Model(config={"model_type": name, **ARCHITECTURES[name]}, vocab_size=280, device="cpu", **more)
    policy = load(model, 0, TEXTS)
    policy.drop_dropout()
    return policy


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    return {}


@pytest.fixture
def scored(request, policies) -> Policy:
    """A policy of the architecture ``request.param``; it is built once, and left in evaluation mode."""
    if request.param not in policies:
        policies[request.param] = built(request.param)
    policies[request.param].model.zero_grad(set_to_none=True)
    return policies[request.param]


every = pytest.mark.parametrize("scored", ARCHITECTURES, indirect=True)
causal = pytest.mark.parametrize("scored", CAUSAL, indirect=True)


def ragged(policy: Policy, sizes=(3, 1, 2), prompts=(5, 2, 7), lengths=(1, 6, 3, 4, 1, 5), seed: int = 0) -> Batch:
    """Groups of 3, 1 and 2 rows, prompts of 5, 2 and 7 tokens, responses of 1 to 6, all of random ids.

    Windows of four tokens end inside prompts, at their border and inside responses.
    """
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    n, width = len(owner), max(prompts)
    places = torch.arange(width)
    wide = torch.tensor(prompts)[:, None]
    prompt_mask = places < wide if policy.is_encoder_decoder else places >= width - wide
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    prompt_ids = torch.randint(3, 280, (len(sizes), width), generator=generator)
    response_ids = torch.randint(3, 280, mask.shape, generator=generator)
    return Batch(
        prompt_ids=prompt_ids.where(prompt_mask, policy.pad)[owner],
        prompt_mask=prompt_mask[owner],
        response_ids=response_ids.where(mask, policy.pad),
        mask=mask,
        group=owner,
        rows=[{}] * n,
        responses=[""] * n,
    )


def plain(policy: Policy, batch: Batch, temperature: torch.Tensor | None = None, model=None) -> torch.Tensor:
    """(B, T) log-probabilities by the model's own forward: each row alone, without padding or cache."""
    model = policy.model if model is None else model
    found = torch.zeros(batch.mask.shape)
    for i in range(len(batch)):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i]][None]
        response = batch.response_ids[i][batch.mask[i]][None]
        if policy.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id]])
            fed = torch.cat([start, response[:, :-1]], 1)
            logits = model(input_ids=prompt, decoder_input_ids=fed, use_cache=False).logits[0]
        else:
            logits = model(input_ids=torch.cat([prompt, response], 1), use_cache=False).logits[
                0, prompt.shape[1] - 1 : -1
            ]
        tau = 1.0 if temperature is None else temperature[i]
        row = (logits / tau).log_softmax(-1).gather(-1, response[0][:, None])[:, 0]
        found = found.index_put((torch.full_like(response[0], i), torch.arange(len(row))), row)
    return found


def gradient(policy: Policy, logprobs: torch.Tensor) -> torch.Tensor:
    """Of a weighted sum with another weight at each token."""
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    policy.model.zero_grad(set_to_none=True)
    (logprobs * weights).sum().backward()
    return torch.cat([p.grad.float().flatten() for p in policy.model.parameters() if p.grad is not None])


def agree(policy: Policy, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Log-probabilities to 1e-5, gradients to 1e-4 of their norm."""
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    one, other = gradient(policy, found), gradient(policy, wanted)
    assert float(other.norm()) > 0
    assert float((one - other).norm()) <= 1e-4 * float(other.norm())


# ---- against one row at a time ---------------------------------------------------------------------------------------


@every
def test_ragged_groups(scored):
    batch = ragged(scored)
    agree(scored, scored.forward(batch), plain(scored, batch))


@every
def test_each_row_at_its_own_temperature(scored):
    batch, taus = ragged(scored), torch.tensor([0.5, 1.0, 2.0, 0.7, 1.3, 4.0])
    agree(scored, scored.forward(batch, taus), plain(scored, batch, taus))


@every
def test_rows_of_one_token(scored):
    batch = ragged(scored, sizes=(2, 1), prompts=(3, 6), lengths=(1, 1, 1))
    agree(scored, scored.forward(batch), plain(scored, batch))


@every
def test_one_response_a_prompt(scored):
    batch = ragged(scored, sizes=(1, 1, 1), prompts=(1, 6, 3), lengths=(2, 5, 1))
    agree(scored, scored.forward(batch), plain(scored, batch))


@pytest.mark.parametrize("scored", ["llama", "mistral", "t5"], indirect=True)
def test_parts_of_different_length(scored):
    """So many tokens that short rows are computed apart from the long ones; every token comes once."""
    lengths = [40] * 14 + [3, 20, 1, 2, 30, 5]
    batch = ragged(scored, sizes=(7, 7, 6), prompts=(5, 2, 7), lengths=lengths)
    pieces = list(teacher_forced(scored.model, batch, [0] if scored.is_encoder_decoder else []))
    assert len(pieces) > 1
    where = torch.cat([piece.where for piece in pieces]).sort().values
    assert torch.equal(where, batch.mask.flatten().nonzero()[:, 0])
    torch.testing.assert_close(scored.forward(batch), plain(scored, batch), atol=1e-5, rtol=1e-5)


# ---- the paths agree -------------------------------------------------------------------------------------------------


@causal
def test_sharing_a_prompt_changes_nothing(scored):
    """Rows of one group read the prompt's cache; rows that are groups of their own are read whole."""
    shared = ragged(scored)
    alone = shared.with_(group=torch.arange(len(shared)))
    agree(scored, scored.forward(shared), scored.forward(alone))


@pytest.mark.parametrize("scored", ["llama"], indirect=True)
def test_a_causal_prompt_is_read_once(scored):
    """3 prompts of 7 columns, and the 4 responses that have a second token, up to the 5th of 6 tokens.

    Row by row it would be 6 * (7 + 5) = 72.
    """
    read = []
    hook = scored.model.get_input_embeddings().register_forward_pre_hook(lambda m, args: read.append(args[0].numel()))
    try:
        scored.forward(ragged(scored))
    finally:
        hook.remove()
    assert sum(read) == 3 * 7 + 4 * 5


@pytest.mark.parametrize("scored", ["t5", "bart"], indirect=True)
def test_an_encoder_reads_a_prompt_once(scored):
    read = []
    encoder = scored.model.get_encoder()
    hook = encoder.register_forward_pre_hook(
        lambda m, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        scored.forward(ragged(scored))
    finally:
        hook.remove()
    assert read == [(3, 7)]


@every
def test_gradient_checkpointing_changes_nothing(scored):
    model, batch = scored.model, ragged(scored)
    wanted = scored.forward(batch)
    grads = gradient(scored, wanted)
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        found = scored.forward(batch)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        again = gradient(scored, found)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert float((again - grads).norm()) <= 1e-4 * float(grads.norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_that_are_computed_anew_are_cast_anew(name: str):
    """In bfloat16 the gradient is bit for bit that of layers whose states are kept, and reaches the float32 weights."""
    policy = built(name, compute="bfloat16")
    model, batch = policy.model.train(), ragged(policy)
    words = {"input_ids": batch.prompt_ids, "attention_mask": batch.prompt_mask.long(), "use_cache": False}
    if policy.is_encoder_decoder:
        words["decoder_input_ids"] = batch.response_ids

    def passed() -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = policy._computed(lambda: model(**words).logits)
        assert logits.dtype == torch.bfloat16
        logits.float().square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    kept = passed()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers, casts = layers_of([model]), []
    for layer in layers:
        compute_in(layer, torch.bfloat16)
        once = layer.forward
        compute_in(layer, torch.bfloat16)
        assert layer.forward is once  # stage select asks again in each episode
        layer.register_forward_pre_hook(lambda layer, _: casts.append(next(layer.parameters()).dtype))
    anew = passed()
    assert len(layers) >= 2 and casts == [torch.float32] * len(layers)  # no copy of them lies in the whole model's cast
    assert kept.keys() == anew.keys()
    for name, grad in anew.items():
        assert grad.dtype == torch.float32 and torch.equal(grad, kept[name]), name


@every
def test_a_row_does_not_see_the_others(scored):
    """Other prompts, other responses and wider padding around a row leave its numbers alone."""
    batch = ragged(scored)
    alone = scored.forward(batch.take(torch.tensor([3])))
    torch.testing.assert_close(scored.forward(batch)[3:4, : alone.shape[1]], alone, atol=1e-5, rtol=1e-5)


@every
def test_off_the_mask_is_zero(scored):
    batch = ragged(scored)
    assert (scored.forward(batch)[~batch.mask] == 0).all()


@pytest.mark.parametrize("scored", ["llama", "m2m_100"], indirect=True)
def test_by_parts_keeps_the_order(scored):
    """Micro-batches are sorted by length; what is put together again is in the order of the batch."""
    batch = ragged(scored)
    assert len(batch.split(12)) == 3
    with torch.no_grad():
        torch.testing.assert_close(by_parts(batch, 12, scored.forward), scored.forward(batch), atol=1e-5, rtol=1e-5)


@every
def test_nothing_stays_on_the_model(scored):
    """After a scoring pass, even one that failed, the model's own forward gives the logits of every position."""
    batch = ragged(scored)
    with pytest.raises((IndexError, RuntimeError)):
        scored.forward(batch.with_(response_ids=batch.response_ids + 10**6))
    scored.forward(batch)
    more = {"decoder_input_ids": batch.response_ids[:1]} if scored.is_encoder_decoder else {}
    shape = scored.model(input_ids=batch.prompt_ids[:1], **more).logits.shape
    assert shape[1] == (batch.response_ids if more else batch.prompt_ids).shape[1]


# ---- adapters and half precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "m2m_100", "t5"])
def test_lora(name):
    """Scored as the wrapped model's own forward; only adapters have gradients; without them it is the base model."""
    targets = ["q_proj", "v_proj"] if name == "m2m_100" else None  # what peft knows for the architecture
    policy = built(name, lora=Lora(r=2, alpha=4, target_modules=targets))
    base = copy.deepcopy(policy)  # adapters begin as 0
    batch = ragged(policy)
    for parameter_name, p in policy.model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(2))
    agree(policy, policy.forward(batch), plain(policy, batch))
    trained = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in n for n in trained)
    wanted = base.forward(batch).detach()
    assert float((policy.forward(batch).detach() - wanted).abs().max()) > 0.01
    with policy.model.disable_adapter():
        torch.testing.assert_close(policy.forward(batch).detach(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scored", ["llama", "gpt2", "gemma3_text", "t5", "m2m_100"], indirect=True)
def test_bfloat16_computes_on_float32_weights(scored):
    """Gradients are float32 on the float32 weights, and point where those of a float32 pass do."""
    batch = ragged(scored)
    half = Policy(copy.deepcopy(scored.model), scored.tokenizer, torch.bfloat16)
    wanted, found = scored.forward(batch), half.forward(batch)
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted), "the pass is in bfloat16"
    torch.testing.assert_close(found, wanted, atol=0.3, rtol=0.05)
    exact, rounded = gradient(scored, wanted), gradient(half, found)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in half.model.parameters() if p.grad is not None} == {torch.float32}
    assert float(torch.cosine_similarity(exact, rounded, dim=0)) > 0.99


@pytest.mark.parametrize("scored", ["llama", "mistral", "t5", "m2m_100"], indirect=True)
def test_bfloat16_generates(scored, rows):
    """Sampling and scoring are of one model: the drawn tokens have the log-probabilities that scoring gives them."""
    half = Policy(copy.deepcopy(scored.model), scored.tokenizer, torch.bfloat16)
    batch = half.generate(rows(3), 2, Decode(max_new_tokens=6), generator=torch.Generator().manual_seed(0))
    assert batch.logprobs.dtype == torch.float32
    found = half.forward(batch).detach()
    assert float((found - batch.logprobs)[batch.mask].abs().mean()) < 0.05
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_bfloat16_with_lora():
    """The cast reaches the adapters, and only they are trained."""
    exact = built("llama", lora=Lora(r=2, alpha=4))
    half = Policy(copy.deepcopy(exact.model), exact.tokenizer, torch.bfloat16)
    batch = ragged(exact)
    one, other = gradient(exact, exact.forward(batch)), gradient(half, half.forward(batch))
    assert len(one) == len(other) == sum(p.numel() for p in exact.model.parameters() if p.requires_grad)
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.99


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2", "t5", "bart", "m2m_100"])
def test_bfloat16_samples_and_scores_agree(name):
    """Attention is computed in float32 on a processor, from a cache that holds float32: the two passes stay close."""
    policy = built(name, compute="bfloat16")
    rows = [{"prompt": text, "response": None, "references": [], "id": i} for i, text in enumerate(TEXTS)]
    batch = policy.generate(rows, 3, Decode(max_new_tokens=12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = (policy.forward(batch) - batch.logprobs).abs() * batch.mask
    assert batch.logprobs.dtype == torch.float32
    assert float(apart.sum() / batch.mask.sum()) < 0.03
    assert next(policy.model.parameters()).dtype == torch.float32
