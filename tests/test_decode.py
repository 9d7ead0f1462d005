"""Decoding against transformers' generate, against exact probabilities, and against unpadded forward passes."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import alignkit.decode
from alignkit.config import Model
from alignkit.decode import Decode, _fill_gaps, _filter, _InPlace, _inverse_cdf, begin, decode
from alignkit.policy import Policy, load

WORDS = ["the cat sat", "a dog ran far", "birds sing", "we eat apples and bread", "rain", "open the old door slowly"]
MAX_NEW = 12

_ENCODER_DECODER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "init_std": 0.8,
    "forced_eos_token_id": None,  # BART's default makes generate end every sequence at the length limit
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
_CAUSAL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "initializer_range": 0.5,
}
_T5 = {
    "d_model": 16,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "d_kv": 16,
    "d_ff": 32,
    "initializer_factor": 2.0,
}
_GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,  # shorter than most prompts
    "layer_types": ["sliding_attention", "full_attention"],
}
# name → (settings, seed with which greedy responses differ in length)
ARCHITECTURES = {
    "m2m_100": (_ENCODER_DECODER, 8),
    "bart": (_ENCODER_DECODER, 8),
    "mbart": (_ENCODER_DECODER, 0),
    "t5": (_T5, 6),
    "llama": (_CAUSAL, 8),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}, 4),
    "qwen2": (_CAUSAL, 4),
    "gemma3_text": (_CAUSAL | _GEMMA, 3),
    "mistral": (_CAUSAL | {"sliding_window": 4}, 11),
    "marian": (_ENCODER_DECODER, 13),
}


@functools.cache
def built(name: str) -> Policy:
    """A random policy of some architecture. Forty ids end a sequence, so that responses end at all lengths."""
    settings, seed = ARCHITECTURES[name]
    config = {"model_type": name, "tie_word_embeddings": False, **settings}
    policy = load(Model(config=config, vocab_size=280, device="cpu"), seed, WORDS)
    policy.model.generation_config.eos_token_id = list(range(2, 42))
    return Policy(policy.model, policy.tokenizer)


@pytest.fixture(params=list(ARCHITECTURES))
def any_policy(request) -> Policy:
    """One architecture after the other; shared, so a test must not change it."""
    return built(request.param)


def make_rows(texts: list[str]) -> list[dict]:
    return [{"prompt": text, "id": i} for i, text in enumerate(texts)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompt_of(policy: Policy, text: str) -> Tensor:
    """(1, P) ids of one prompt without padding: an encoder sees the closing token, a causal model does not."""
    ids = policy.tokenizer(text)["input_ids"]
    assert ids[-1] == policy.tokenizer.eos_token_id
    return torch.tensor([ids if policy.model.config.is_encoder_decoder else ids[:-1]])


@torch.no_grad()
def reference_logits(policy: Policy, prompt: Tensor, response: Tensor) -> Tensor:
    """(T, V) logits behind each response token: one row, no padding, no cache."""
    model = policy.model
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id]])
        logits = model(input_ids=prompt, decoder_input_ids=torch.cat([start, response[None, :-1]], 1)).logits[0]
    else:
        logits = model(torch.cat([prompt, response[None]], 1)).logits[0, prompt.shape[1] - 1 : -1]
    return logits.double()


def ended(sequence: list[int], eos: set[int]) -> list[int]:
    """Up to and with the first end-of-sequence token."""
    for i, token in enumerate(sequence):
        if token in eos:
            return sequence[: i + 1]
    return sequence


def responses_of(out) -> list[list[int]]:
    ids = out.response_ids if hasattr(out, "response_ids") else out.ids
    return [row[m].tolist() for row, m in zip(ids, out.mask, strict=True)]


# ---- against generate


def generated(policy: Policy, text: str, max_new: int = MAX_NEW, **how) -> list[int]:
    """What transformers makes of one unpadded prompt."""
    prompt = prompt_of(policy, text)
    eos = policy.model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    out = policy.model.generate(prompt, do_sample=False, max_new_tokens=max_new, pad_token_id=0, **how)[0].tolist()
    return ended(out[1 if policy.model.config.is_encoder_decoder else prompt.shape[1] :], set(eos))


def test_greedy_gives_the_tokens_of_generate(any_policy):
    expected = [generated(any_policy, text, num_beams=1) for text in WORDS]
    assert len({len(r) for r in expected}) >= 4  # rows end at different steps …
    assert len({prompt_of(any_policy, text).shape[1] for text in WORDS}) >= 4  # … and prompts are padded
    out = any_policy.generate(make_rows(WORDS), 1, Decode(max_new_tokens=MAX_NEW, greedy=True))
    assert responses_of(out) == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_a_forced_first_token_belongs_to_the_prefix(tiny_seq2seq, rows, beams):
    model, forced = tiny_seq2seq.model, 77
    model.generation_config.forced_bos_token_id = forced
    policy, data = Policy(model, tiny_seq2seq.tokenizer), rows(6)
    expected = []
    for row in data:  # generate counts the forced token as one of the new ones
        found = generated(policy, row["prompt"], 9, num_beams=beams)
        assert found[0] == forced
        expected.append(found[1:])
    if beams == 1:
        out = policy.generate(data, 1, Decode(max_new_tokens=8, greedy=True))
        with torch.no_grad():
            torch.testing.assert_close(policy.forward(out), out.logprobs, atol=1e-4, rtol=0)
    else:
        out = policy.beam(data, beams, 8)
    assert responses_of(out) == expected


@pytest.mark.parametrize("name", ["m2m_100", "bart", "t5", "llama", "gpt2"])
def test_beam_gives_the_tokens_of_generate_without_padding(name):
    policy = built(name)
    expected = [generated(policy, text, num_beams=3) for text in WORDS]
    assert expected != [generated(policy, text, num_beams=1) for text in WORDS]
    assert responses_of(policy.beam(make_rows(WORDS), 3, MAX_NEW)) == expected


def test_beam_does_not_use_dropout_when_called_while_training(tiny_seq2seq, rows):
    model = tiny_seq2seq.model
    assert model.config.dropout > 0
    expected = tiny_seq2seq.beam(rows(6), 3, 8).response_ids
    model.train()
    for seed in range(3):
        torch.manual_seed(seed)
        assert torch.equal(tiny_seq2seq.beam(rows(6), 3, 8).response_ids, expected)
        assert model.training


# ---- the distribution that is sampled, against exact probabilities

VOCAB, STEPS, DRAWS, EOS = 5, 3, 20_000, 2
PROMPTS = [[3, 4, 3, 1], [4, 1]]
TAUS = [0.6, 1.7]


@functools.cache
def small(kind: str):
    """A model of five tokens, far from uniform."""
    common = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
    torch.manual_seed(3)
    if kind == "causal":
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **common, **_CAUSAL)).eval()
    config = AutoConfig.for_model("bart", decoder_start_token_id=1, **common, **{**_ENCODER_DECODER, "init_std": 0.4})
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def warped(logits: Tensor, tau: float, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) after generate's own warpers, in its order."""
    logits = TemperatureLogitsWarper(tau)(None, logits)
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    return TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits


@functools.cache
@torch.no_grad()
def exact(kind: str, which: int, tau: float, top_k: int = 0, top_p: float = 1.0) -> dict[tuple[int, ...], float]:
    """Probability of every response: all sequences of ``STEPS`` tokens, teacher-forced, cut after their end."""
    model = small(kind)
    every = torch.tensor(list(itertools.product(range(VOCAB), repeat=STEPS)))
    prompt = torch.tensor([PROMPTS[which]]).expand(len(every), -1)
    if kind == "causal":
        logits = model(torch.cat([prompt, every], 1)).logits[:, prompt.shape[1] - 1 : -1]
    else:
        start = torch.ones(len(every), 1, dtype=torch.long)
        logits = model(input_ids=prompt, decoder_input_ids=torch.cat([start, every[:, :-1]], 1)).logits
    flat = warped(logits.double().flatten(0, 1), tau, top_k, top_p)
    probs = flat.softmax(-1).view(logits.shape).gather(-1, every[..., None]).squeeze(-1)
    found = {}
    for sequence, p in zip(every.tolist(), probs.tolist(), strict=True):
        response = tuple(ended(sequence, {EOS}))
        found[response] = functools.reduce(lambda a, b: a * b, p[: len(response)], 1.0)
    assert abs(sum(found.values()) - 1) < 1e-9
    return found


def p_value(drawn: list[list[int]], probabilities: dict[tuple[int, ...], float]) -> float:
    """Chi-square test of goodness of fit; outcomes expected fewer than five times are pooled."""
    counts = dict.fromkeys(probabilities, 0)
    for response in drawn:
        counts[tuple(response)] += 1
    assert all(counts[r] == 0 for r, p in probabilities.items() if p == 0)
    cells = [(counts[r], p * len(drawn)) for r, p in probabilities.items() if p > 0]
    large = [cell for cell in cells if cell[1] >= 5]
    rest = [cell for cell in cells if cell[1] < 5]
    if sum(e for _, e in rest) >= 5:
        large.append((sum(o for o, _ in rest), sum(e for _, e in rest)))
    assert len(large) >= 4
    statistic = sum((o - e) ** 2 / e for o, e in large)
    return float(torch.special.gammaincc(torch.tensor((len(large) - 1) / 2.0), torch.tensor(statistic / 2)))


def draw(kind: str, seed: int, taus: list[float], top_k: int = 0, top_p: float = 1.0) -> list[list[list[int]]]:
    """``DRAWS`` responses to each prompt in one padded batch, by alignkit."""
    width = max(map(len, PROMPTS))
    ids, mask = [], []
    for p in PROMPTS:
        fill, off, on = [0] * (width - len(p)), [False] * (width - len(p)), [True] * len(p)
        ids.append(fill + p if kind == "causal" else p + fill)
        mask.append(off + on if kind == "causal" else on + off)
    state = begin(small(kind), torch.tensor(ids), torch.tensor(mask), [] if kind == "causal" else [1])
    out = decode(
        state, torch.tensor([DRAWS, DRAWS]), Decode(max_new_tokens=STEPS, top_k=top_k, top_p=top_p), eos=[EOS], pad=0,
        temperature=torch.tensor(taus), generator=seeded(seed),
    )  # fmt: skip
    drawn = responses_of(out)
    return [drawn[:DRAWS], drawn[DRAWS:]]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_samples_follow_the_exact_distribution_with_a_temperature_per_prompt(kind):
    drawn = draw(kind, 0, TAUS)
    for i, tau in enumerate(TAUS):
        assert p_value(drawn[i], exact(kind, i, tau)) > 1e-4
        assert p_value(drawn[i], exact(kind, i, tau * 1.1)) < 1e-4  # the test sees a temperature 10 % off
        assert p_value(drawn[i], exact(kind, 1 - i, tau)) < 1e-4  # … and the other prompt


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_samples_of_generate_pass_the_same_test(kind):
    torch.manual_seed(0)
    for i, tau in enumerate(TAUS):
        out = small(kind).generate(
            torch.tensor([PROMPTS[i]]), do_sample=True, top_k=0, temperature=tau, max_new_tokens=STEPS,
            num_return_sequences=DRAWS, pad_token_id=0, eos_token_id=EOS,
        )  # fmt: skip
        skip = len(PROMPTS[i]) if kind == "causal" else 1
        drawn = [ended(row, {EOS}) for row in out[:, skip:].tolist()]
        assert p_value(drawn, exact(kind, i, tau)) > 1e-4


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.7), (3, 0.8)])
def test_filtered_samples_follow_the_distribution_of_generates_warpers(kind, top_k, top_p):
    taus = [1.0, 1.7]
    drawn = draw(kind, 1, taus, top_k, top_p)
    for i, tau in enumerate(taus):
        probabilities = exact(kind, i, tau, top_k, top_p)
        assert 0 in probabilities.values()
        assert p_value(drawn[i], probabilities) > 1e-4


@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 80])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_filters_keep_what_the_warpers_keep(top_k, top_p):
    logits = 3 * torch.randn(300, 50, generator=seeded(0))
    if top_p == 1:
        logits[:, 10] = logits[:, 20]  # a tie; which of the two ends a nucleus is left to the sort
    expected = warped(logits, 1.0, top_k, top_p)
    filtered = _filter(logits, top_k, top_p)
    assert torch.equal(filtered.isfinite(), expected.isfinite())
    kept = expected.isfinite()
    assert torch.equal(filtered[kept], logits[kept])


# ---- the inverse of the cumulative sum


@st.composite
def distributions(draw):
    weights = draw(st.lists(st.sampled_from([0.0, 0.0, 1e-9, 1e-4, 0.3, 1.0, 7.0]), min_size=1, max_size=40))
    weights[draw(st.integers(0, len(weights) - 1))] = 1.0
    return torch.tensor(weights) / sum(weights)


LARGEST = 1 - 2**-24  # the largest number that torch.rand gives


@given(distributions(), st.one_of(st.sampled_from([0.0, LARGEST, 0.5]), st.floats(0, LARGEST, width=32)))
@settings(max_examples=200, deadline=None, database=None)
def test_inverse_cdf_finds_the_interval_and_never_a_zero(probs, u):
    token = int(_inverse_cdf(probs[None], torch.tensor([u])))
    assert probs[token] > 0
    exact_cdf = probs.double().cumsum(0) / probs.double().sum()
    assert exact_cdf[token] >= u - 1e-6
    assert token == 0 or exact_cdf[token - 1] <= u + 1e-6


@pytest.mark.parametrize("u", [LARGEST, 1.0])
def test_inverse_cdf_at_the_top_takes_the_last_token_that_has_mass(u):
    probs = torch.tensor([[0.1, 0.2, 0.7, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0], [0.25, 0.0, 0.25, 0.25, 0.25]])
    assert _inverse_cdf(probs, torch.full((3,), u)).tolist() == [2, 3, 4]
    assert _inverse_cdf(probs, torch.zeros(3)).tolist() == [0, 3, 0]


@pytest.mark.parametrize("total", [1 - 1e-4, 1 + 1e-4])
def test_inverse_cdf_stays_inside_a_sum_that_is_not_one(total):
    probs = torch.full((1, 1000), total / 1000)
    probs[0, -10:] = 0
    assert int(_inverse_cdf(probs, torch.tensor([LARGEST]))) == 989


def test_inverse_cdf_on_a_grid_gives_every_token_its_share():
    probs = torch.rand(12, generator=seeded(0)) ** 3
    probs[[2, 5, 11]] = 0
    probs /= probs.sum()
    n = 5000
    grid = (torch.arange(n) + 0.5) / n
    counts = torch.bincount(_inverse_cdf(probs.expand(n, -1), grid), minlength=12)
    assert torch.all((counts - n * probs).abs() <= 1)
    assert counts[[2, 5, 11]].tolist() == [0, 0, 0]


@st.composite
def peaked(draw):
    """Probabilities over several blocks, most of them zero: (V,), V no multiple of a block."""
    size = draw(st.sampled_from([63, 64, 65, 128, 200, 1000]))
    weights = torch.zeros(size)
    for _ in range(draw(st.integers(1, 6))):
        weights[draw(st.integers(0, size - 1))] = draw(st.sampled_from([1e-9, 1e-4, 0.3, 1.0, 7.0]))
    return weights / weights.sum()


@given(peaked(), st.one_of(st.sampled_from([0.0, LARGEST, 0.5]), st.floats(0, LARGEST, width=32)))
@settings(max_examples=300, deadline=None, database=None)
def test_inverse_cdf_over_several_blocks_finds_the_interval_and_never_a_zero(probs, u):
    token = int(_inverse_cdf(probs[None], torch.tensor([u])))
    assert probs[token] > 0
    exact_cdf = probs.double().cumsum(0) / probs.double().sum()
    assert exact_cdf[token] >= u - 1e-6
    assert token == 0 or exact_cdf[token - 1] <= u + 1e-6


def test_inverse_cdf_over_a_large_vocabulary_follows_float64():
    probs = (2 * torch.randn(64, 150_001, generator=seeded(0))).softmax(-1)
    u = torch.rand(64, generator=seeded(1))
    cdf = probs.double().cumsum(-1)
    cdf = torch.cat([torch.zeros(64, 1), cdf / cdf[:, -1:]], dim=-1)
    token = _inverse_cdf(probs, u)[:, None]
    assert torch.all(cdf.gather(1, token)[:, 0] <= u + 2e-7)
    assert torch.all(cdf.gather(1, token + 1)[:, 0] >= u - 2e-7)


# ---- groups and independence


def test_ragged_counts_keep_the_order_of_the_prompts(policy, rows):
    data, counts = rows(4), [2, 0, 3, 1]
    out = policy.generate(data, counts, Decode(max_new_tokens=4), generator=seeded(0))
    owner = [0, 0, 2, 2, 2, 3]
    assert out.group.tolist() == owner
    assert all(row is data[i] for row, i in zip(out.rows, owner, strict=True))
    for ids, mask, i in zip(out.prompt_ids, out.prompt_mask, owner, strict=True):
        assert ids[mask].tolist() == prompt_of(policy, data[i]["prompt"])[0].tolist()
    assert len(out) == len(out.responses) == out.response_ids.shape[0] == out.mask.shape[0] == 6
    # the rows do answer those prompts: their log-probabilities are those of an unpadded pass
    for response, logprobs, mask, i in zip(out.response_ids, out.logprobs, out.mask, owner, strict=True):
        logp = reference_logits(policy, prompt_of(policy, data[i]["prompt"]), response[mask]).log_softmax(-1)
        expected = logp.gather(1, response[mask][:, None])[:, 0]
        torch.testing.assert_close(logprobs[mask].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["m2m_100", "t5", "llama", "mistral"])
@pytest.mark.parametrize("greedy", [True, False])
def test_the_other_prompts_of_a_batch_make_no_difference(name, greedy):
    policy, how = built(name), Decode(max_new_tokens=MAX_NEW, greedy=greedy)
    short = [WORDS[3], "x", "y", "z"]
    long = [WORDS[3], "much more text than before stands here", WORDS[5] * 2, WORDS[1] * 2]
    a, b = (policy.generate(make_rows(texts), 3, how, generator=seeded(5)) for texts in (short, long))
    assert a.prompt_ids.shape[1] < b.prompt_ids.shape[1]
    assert responses_of(a)[3:] != responses_of(b)[3:]
    assert responses_of(a)[:3] == responses_of(b)[:3]
    for x, y in zip(a.logprobs[:3], b.logprobs[:3], strict=True):
        n = min(len(x), len(y))
        torch.testing.assert_close(x[:n], y[:n], atol=1e-4, rtol=0)


@pytest.mark.parametrize("greedy", [True, False])
def test_dropping_finished_rows_makes_no_difference(any_policy, greedy, monkeypatch):
    sizes: list[int] = []
    watched = any_policy.model.get_output_embeddings()
    hook = watched.register_forward_hook(lambda _m, args, _out: sizes.append(args[0].shape[0]))
    outs, seen = {}, {}
    for stride in (100, 3, 1):
        monkeypatch.setattr(alignkit.decode, "STRIDE", stride)
        sizes.clear()
        how = Decode(max_new_tokens=MAX_NEW, greedy=greedy, entropy=True)
        tau = torch.linspace(0.5, 1.5, len(WORDS))
        outs[stride] = any_policy.generate(make_rows(WORDS), 2, how, temperature=tau, generator=seeded(9))
        seen[stride] = sizes[1:]  # the first pass reads each prompt once
    hook.remove()
    lengths = outs[100].mask.sum(1)
    left = [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]
    assert set(seen[100]) == {12}
    assert seen[1] == left and left[-1] < 12  # only rows that go on
    assert seen[3] == [-(-n // 3) * 3 for n in left]
    for stride in (3, 1):
        assert torch.equal(outs[stride].response_ids, outs[100].response_ids)
        assert torch.equal(outs[stride].mask, outs[100].mask)
        torch.testing.assert_close(outs[stride].logprobs, outs[100].logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(outs[stride].extra["entropy"], outs[100].extra["entropy"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("greedy", [True, False])
def test_writing_in_place_makes_no_difference(any_policy, greedy, monkeypatch):
    """… nor does a generation far past a sliding window of 4, in which the buffers grow more than once."""
    monkeypatch.setattr(alignkit.decode, "STRIDE", 1)
    how = Decode(max_new_tokens=30, greedy=greedy)
    for counts in ([5, 0, 1, 3, 1, 2], [1, 0, 1, 0, 1, 1]):  # more rows than prompts, and fewer
        place = any_policy.generate(make_rows(WORDS), counts, how, generator=seeded(7))
        with monkeypatch.context() as patch:
            patch.setattr(alignkit.decode, "_write_in_place", lambda cache, length, dtype: None)
            plain = any_policy.generate(make_rows(WORDS), counts, how, generator=seeded(7))
        assert torch.equal(place.response_ids, plain.response_ids) and torch.equal(place.mask, plain.mask)
        torch.testing.assert_close(place.logprobs, plain.logprobs, atol=1e-5, rtol=0)
        assert len(set(place.mask.sum(1).tolist())) > 1  # rows left in between


@pytest.mark.parametrize("length", [59, 20, None])
@pytest.mark.parametrize("window", [2, 5, None])
def test_a_layer_in_place_holds_what_a_dynamic_layer_holds(window, length):
    """Passes of several lengths, rows repeated, thinned out and reordered, at every fill of the buffers.

    ``length`` is what the layer is told to expect: what comes (59), less, or that it will not grow.
    """
    torch.manual_seed(0)
    plain = DynamicSlidingWindowLayer(window) if window else DynamicLayer()
    place = _InPlace(length, window)
    place.reorder_cache(torch.arange(3))  # nothing to reorder yet
    rows, keeps = 3, {0: [0, 0, 1, 1, 1, 2], 5: [0, 1, 5, 3, 4], 19: [4, 1, 2], 20: [0, 2], 41: [1]}
    for t, new in enumerate([6, *[1] * 20, 3, *[1] * 30]):
        keys, values = torch.randn(rows, 2, new, 4), torch.randn(rows, 2, new, 3)
        assert place.get_mask_sizes(new) == plain.get_mask_sizes(new)
        for found, expected in zip(place.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(found, expected)
        assert place.get_seq_length() == plain.get_seq_length()
        if t in keeps:
            keep = torch.tensor(keeps[t])
            place.reorder_cache(keep)
            plain.reorder_cache(keep)
            rows = len(keep)
    room = place.buffers[0].shape[-2]
    assert room <= 59 if window is None else room < 59  # what has left the window takes no room


@given(st.lists(st.booleans(), min_size=1, max_size=20).filter(any), st.integers(0, 5))
@settings(max_examples=100, deadline=None, database=None)
def test_gaps_are_filled_from_the_end(going, more):
    """All rows that go on are kept, and some that have ended where more are asked for."""
    size = min(sum(going) + more, len(going))
    keep = _fill_gaps(torch.tensor(going), sum(going), size).tolist()
    assert len(set(keep)) == len(keep) == size
    assert {i for i, alive in enumerate(going) if alive} <= set(keep)
    assert all(i == row for i, row in enumerate(keep) if going[i])  # who can stay, stays


def test_the_generator_alone_decides_the_samples(policy, rows):
    how = Decode(max_new_tokens=8)
    torch.manual_seed(1)
    first = policy.generate(rows(4), 2, how, generator=seeded(0))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = policy.generate(rows(4), 2, how, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.response_ids, again.response_ids)
    other = policy.generate(rows(4), 2, how, generator=seeded(1))
    assert responses_of(other) != responses_of(first)
    same_prompt = responses_of(first)[:2]
    assert same_prompt[0] != same_prompt[1]


# ---- log-probabilities and entropy


def test_logprobs_and_entropy_equal_an_unpadded_pass(any_policy):
    how = Decode(max_new_tokens=MAX_NEW, entropy=True, top_k=100, top_p=0.95)
    counts = [2, 1, 3, 0, 1, 2]
    tau = torch.linspace(0.7, 1.4, len(WORDS))
    out = any_policy.generate(make_rows(WORDS), counts, how, temperature=tau, generator=seeded(4))
    assert len(set(out.mask.sum(1).tolist())) >= 4
    row_tau = tau.repeat_interleave(torch.tensor(counts))
    with torch.no_grad():
        scored, tempered = any_policy.forward(out), any_policy.forward(out, temperature=row_tau)
    assert scored.dtype == tempered.dtype == torch.float32
    for i in range(len(out)):
        n = int(out.mask[i].sum())
        response = out.response_ids[i, :n]
        logits = reference_logits(any_policy, prompt_of(any_policy, out.rows[i]["prompt"]), response)
        logp = logits.log_softmax(-1)
        expected = logp.gather(1, response[:, None])[:, 0]
        hot = (logits / float(row_tau[i])).log_softmax(-1).gather(1, response[:, None])[:, 0]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        for found, wanted in (
            (out.logprobs, expected),  # of the unfiltered model at temperature 1, however it was sampled
            (scored, expected),
            (tempered, hot),
            (out.extra["entropy"], entropy),
        ):
            torch.testing.assert_close(found[i, :n].double(), wanted, atol=1e-4, rtol=0)
            assert torch.all(found[i, n:] == 0)


@pytest.mark.parametrize("name", ["m2m_100", "llama"])
@pytest.mark.parametrize(("greedy", "top_k"), [(True, 0), (False, 0), (False, 20)])
def test_tempered_logprobs_are_those_at_the_sampling_temperature(name, greedy, top_k):
    policy, tau = built(name), torch.linspace(0.6, 1.6, len(WORDS))
    how = Decode(max_new_tokens=8, greedy=greedy, top_k=top_k)
    plain = policy.generate(make_rows(WORDS), 2, how, temperature=tau, generator=seeded(3))
    out = policy.generate(make_rows(WORDS), 2, replace(how, tempered=True), temperature=tau, generator=seeded(3))
    assert torch.equal(out.response_ids, plain.response_ids)
    with torch.no_grad():
        expected = policy.forward(out, temperature=tau.repeat_interleave(2))
        torch.testing.assert_close(out.logprobs, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(plain.logprobs, policy.forward(out), atol=1e-4, rtol=0)
    assert (out.logprobs - plain.logprobs).abs().max() > 0.01


@pytest.mark.parametrize("name", ["t5", "llama", "mistral"])
def test_a_model_in_bfloat16_gives_probabilities_in_float32(name):
    policy = built(name)
    half = Policy(copy.deepcopy(policy.model).bfloat16(), policy.tokenizer)
    out = half.generate(make_rows(WORDS), 3, Decode(max_new_tokens=8, entropy=True), generator=seeded(0))
    assert out.logprobs.dtype == out.extra["entropy"].dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(half.forward(out), out.logprobs, atol=0.4, rtol=0)


_WHY = "transformers gives the tokens after a padding id other positions with a cache than without"
_COUNTS_PADDING = pytest.mark.xfail(reason=_WHY, strict=True)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=_COUNTS_PADDING if n == "m2m_100" else []) for n in ARCHITECTURES]
)
def test_logprobs_agree_where_the_padding_token_is_drawn(name):
    policy = built(name)
    head = policy.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[policy.pad] = 12.0
    hook = head.register_forward_hook(lambda _m, _a, out: out + bias)
    try:
        out = policy.generate(make_rows(WORDS), 2, Decode(max_new_tokens=8), generator=seeded(0))
        assert torch.any((out.response_ids == policy.pad)[:, :-1] & out.mask[:, 1:])  # drawn, and not as the last
        with torch.no_grad():
            torch.testing.assert_close(policy.forward(out), out.logprobs, atol=1e-4, rtol=0)
    finally:
        hook.remove()


def test_entropy_is_returned_only_where_asked_for(policy, rows):
    assert "entropy" not in policy.generate(rows(2), 1, Decode(max_new_tokens=3), generator=seeded(0)).extra


# ---- masks, limits, modes


@pytest.mark.parametrize("name", ["m2m_100", "llama"])
@pytest.mark.parametrize("max_new", [1, 5, MAX_NEW])
def test_the_mask_ends_with_the_first_end_of_sequence_token(name, max_new):
    policy, eos = built(name), set(range(2, 42))
    out = policy.generate(make_rows(WORDS), 3, Decode(max_new_tokens=max_new), generator=seeded(2))
    assert out.response_ids.shape[1] <= max_new
    lengths, closing = [], set()
    for ids, mask in zip(out.response_ids.tolist(), out.mask.tolist(), strict=True):
        n = len(ended(ids, eos)) if set(ids) & eos else max_new
        assert mask == [t < n for t in range(len(ids))]
        assert ids[n:] == [0] * (len(ids) - n)
        lengths.append(n)
        closing |= {ids[n - 1]} & eos
    assert max_new == 1 or len(closing) > 1  # several ids end a sequence
    assert max(lengths) == out.response_ids.shape[1]
    assert max_new in lengths and (max_new == 1 or min(lengths) < max_new)


def test_no_column_is_left_when_every_row_ends_early():
    policy = built("llama")
    head = policy.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[2:42] = 6.0
    hook = head.register_forward_hook(lambda _m, _a, out: out + bias)
    try:
        out = policy.generate(make_rows(WORDS), 1, Decode(max_new_tokens=50, entropy=True), generator=seeded(0))
    finally:
        hook.remove()
    longest = int(out.mask.sum(1).max())
    assert longest < 50
    assert out.response_ids.shape[1] == out.logprobs.shape[1] == out.extra["entropy"].shape[1] == longest


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was_and_nothing_records_gradients(policy, rows, training):
    how = Decode(max_new_tokens=6, entropy=True)
    expected = policy.generate(rows(4), 2, how, generator=seeded(0))
    policy.model.train(training)
    with torch.enable_grad():
        out = policy.generate(rows(4), 2, how, generator=seeded(0))
    assert all(m.training == training for m in policy.model.modules())
    assert not out.logprobs.requires_grad and not out.extra["entropy"].requires_grad
    assert all(p.grad is None for p in policy.model.parameters())
    assert torch.equal(out.response_ids, expected.response_ids)  # no dropout, whatever the mode
    torch.testing.assert_close(out.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_forward_records_gradients(policy, rows):
    out = policy.generate(rows(2), 2, Decode(max_new_tokens=4), generator=seeded(0))
    policy.forward(out).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.model.parameters())
