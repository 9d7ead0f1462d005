"""Loading, saving, adapters, tokenization and padding of a policy."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from alignkit.config import Lora, Model
from alignkit.data import Data
from alignkit.decode import Decode
from alignkit.errors import UserError
from alignkit.loading import resolve, train_tokenizer
from alignkit.policy import Policy, load
from alignkit.rewards.rule import Answer

TEXTS = ["the cat sat", "a dog ran far", "birds sing", "we eat apples and bread", "rain", "open the old door slowly"]
PAD, BOS, EOS = 0, 1, 2

_ENCODER_DECODER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "init_std": 0.5,
}
_CAUSAL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "initializer_range": 0.5,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "m2m_100": _ENCODER_DECODER,
    "bart": _ENCODER_DECODER,
    "mbart": _ENCODER_DECODER,
    "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32, "initializer_factor": 2.0},
    "llama": _CAUSAL,
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.5},
    "qwen2": _CAUSAL,
    "mistral": _CAUSAL | {"sliding_window": 4},
    "gemma3_text": _CAUSAL | {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention"]},
}


def scratch(name: str, **more) -> Model:
    return Model(config={"model_type": name, **ARCHITECTURES[name]}, vocab_size=280, device="cpu", **more)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def scores(policy: Policy, batch) -> torch.Tensor:
    return policy.forward(batch)


# ---- what cannot be loaded


@pytest.fixture
def saved(tmp_path, tiny_causal):
    """A folder with a causal model."""
    tiny_causal.save(tmp_path / "model")
    return tmp_path / "model"


def refused(match: str, cfg: Model) -> None:
    with pytest.raises(UserError, match=match):
        load(cfg, 0, TEXTS)


def test_neither_path_nor_config():
    refused(r"model\.path.*model\.config", Model())


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_missing(path):
    refused("no such folder", Model(path=path))


def test_a_hub_id_that_is_not_there():
    refused("nobody/nothing.*cannot be loaded", Model(path="nobody/nothing"))


def test_an_unknown_bundled_name():
    refused("bundled:no-such-model.*not bundled", Model(path="bundled:no-such-model"))


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused("neither a model", Model(path=str(tmp_path)))


def test_a_folder_without_weights(saved):
    (saved / "model.safetensors").unlink()
    refused("no weights", Model(path=str(saved)))
    (saved / "pytorch_model.bin").write_bytes(b"x")
    refused("no weights", Model(path=str(saved)))


def test_weights_that_were_cut_short(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    refused(str(saved), Model(path=str(saved)))


def test_weights_of_which_some_are_missing(saved):
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    refused("norm", Model(path=str(saved)))


def test_weights_of_another_shape(saved):
    config = json.loads((saved / "config.json").read_text())
    config["intermediate_size"] *= 2
    (saved / "config.json").write_text(json.dumps(config))
    refused(str(saved), Model(path=str(saved)))


def test_a_config_that_is_not_json(saved):
    (saved / "config.json").write_text("{")
    refused("cannot be loaded", Model(path=str(saved)))


def test_a_model_of_the_other_kind(tmp_path, policy):
    policy.save(tmp_path)
    kind, other = ("seq2seq", "causal") if policy.model.config.is_encoder_decoder else ("causal", "seq2seq")
    refused(f"is a {kind} model", Model(path=str(tmp_path), kind=other))
    assert load(Model(path=str(tmp_path), kind=kind, device="cpu"), 0).is_encoder_decoder == (kind == "seq2seq")


def test_a_config_without_or_with_an_unknown_model_type():
    refused("model_type", Model(config={"hidden_size": 16}))
    refused("lama", Model(config={"model_type": "lama"}))


@pytest.mark.parametrize(
    "wrong",
    [{"model_type": "bart", "d_model": 15, "encoder_attention_heads": 2}, {"model_type": "llama", "hidden_size": "x"}],
)
def test_a_config_with_an_impossible_value(wrong):
    refused("model.config", Model(config=wrong, vocab_size=280, device="cpu"))


def tokenizer_folder(path, **special: str) -> str:
    """A tokenizer of four words that closes every text with token 2, with only these special tokens declared."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "the": 3, "cat": 4, "sat": 5, "<unk>": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(path)
    return str(path)


def test_a_tokenizer_without_an_end_of_sequence_token(tmp_path):
    refused("no end-of-sequence token", scratch("llama", tokenizer=tokenizer_folder(tmp_path, pad_token="<pad>")))


def test_a_tokenizer_that_is_missing():
    refused("nowhere", scratch("llama", tokenizer="./nowhere"))


# ---- which folder a path means


def fake_model(folder) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def test_a_run_means_its_last_checkpoint_or_its_final_weights(tmp_path):
    for step in (9, 100, 20):
        fake_model(tmp_path / f"checkpoint-{step}")
    assert resolve(str(tmp_path)) == str(tmp_path / "checkpoint-100")
    fake_model(tmp_path / "final")
    assert resolve(str(tmp_path)) == str(tmp_path / "final")
    assert resolve(str(tmp_path / "checkpoint-9")) == str(tmp_path / "checkpoint-9")
    assert resolve("someone/model") == "someone/model"


# ---- save, load, restore


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_saved_model_comes_back_the_same(name, tmp_path):
    policy = load(scratch(name), 3, TEXTS)
    batch = policy.generate([{"prompt": t, "id": 0} for t in TEXTS], 2, Decode(max_new_tokens=6), generator=seeded(0))
    policy.save(tmp_path)
    other = load(Model(path=str(tmp_path), device="cpu"), 99)
    assert torch.equal(scores(other, batch), scores(policy, batch))
    assert not torch.equal(scores(load(scratch(name), 4, TEXTS), batch), scores(policy, batch))
    texts = ["the cat", "  two  blanks ", "Größe, 12345 x", "tab\tand\nline", ""]
    assert other.tokenizer(texts)["input_ids"] == policy.tokenizer(texts)["input_ids"]
    assert other.eos == policy.eos == [EOS]
    assert other.pad == policy.pad == PAD


def test_restore_brings_the_weights_of_a_checkpoint_back(policy, rows, tmp_path):
    batch = policy.demonstrations(rows(4))
    before = scores(policy, batch)
    policy.save(tmp_path)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert not torch.allclose(scores(policy, batch), before, atol=1e-2)
    tensors = [id(p) for p in policy.model.parameters()]
    policy.restore(tmp_path)
    assert torch.equal(scores(policy, batch), before)
    assert tensors == [id(p) for p in policy.model.parameters()]  # in place: an optimizer keeps its parameters
    assert all(p.requires_grad for p in policy.model.parameters())


def test_dtype_is_that_of_the_weights_and_never_of_the_log_probabilities(saved, rows):
    policy = load(Model(path=str(saved), dtype="bfloat16", device="cpu"), 0)
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    batch = policy.generate(rows(2), 1, Decode(max_new_tokens=3), generator=seeded(0))
    assert batch.logprobs.dtype == scores(policy, batch).dtype == torch.float32


def test_dtype_holds_for_a_new_model_too():
    policy = load(scratch("llama", dtype="bfloat16"), 0, TEXTS)
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}


def test_the_seed_decides_the_weights_of_a_new_model():
    first, same, other = (load(scratch("llama"), seed, TEXTS).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_the_bundled_causal_model_solves_a_part_of_its_task():
    """Right often enough to have a signal, wrong often enough to have something to learn; a token a character."""
    policy = load(Model(path="bundled:arithmetic", device="cpu"), 0)
    rows = Data(test="bundled:arithmetic.test.jsonl", response="{response}").rows("test")[:200]
    assert not policy.is_encoder_decoder
    around = 2  # the space before a text, and the end of sequence
    assert policy.demonstrations(rows).lengths.tolist() == [len(row["response"]) + around for row in rows]
    right = Answer()(policy.generate(rows, 1, Decode(max_new_tokens=64, greedy=True)))
    assert 0.3 < float(right.mean()) < 0.9


# ---- adapters


def adapted(kind: str, folder=None) -> Policy:
    name, targets = ("m2m_100", ["q_proj", "v_proj"]) if kind == "seq2seq" else ("llama", None)
    lora = Lora(r=2, alpha=4, dropout=0.1, target_modules=targets)
    return load(scratch(name, lora=lora), 0, TEXTS, checkpoint=folder)


def trainable(policy: Policy) -> list[str]:
    return [name for name, p in policy.model.named_parameters() if p.requires_grad]


def shake(policy: Policy) -> None:
    """New adapter weights: at the start they change nothing."""
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                p.normal_(std=0.5, generator=seeded(p.numel()))


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_lora_trains_the_adapters_alone(kind, rows):
    policy = adapted(kind)
    names = trainable(policy)
    assert names and all("lora_" in name for name in names)
    assert policy.is_encoder_decoder == (kind == "seq2seq")
    batch = policy.demonstrations(rows(4))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    for _ in range(2):  # the second half of an adapter starts at zero, so the first moves a step later
        optimizer.zero_grad()
        policy.forward(batch).sum().backward()
        optimizer.step()
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(names)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_lora_is_saved_loaded_and_restored(kind, rows, tmp_path):
    policy = adapted(kind)
    batch = policy.demonstrations(rows(4))
    fresh = scores(policy, batch)
    shake(policy)
    before, names = scores(policy, batch), trainable(policy)
    assert not torch.allclose(fresh, before, atol=1e-2)
    policy.save(tmp_path)
    other = adapted(kind, tmp_path)
    assert torch.equal(scores(other, batch), before)
    assert trainable(other) == names
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                p.zero_()
    assert torch.allclose(scores(policy, batch), fresh, atol=1e-5)
    policy.restore(tmp_path)
    assert torch.equal(scores(policy, batch), before)
    assert trainable(policy) == names


@pytest.mark.parametrize("training", [True, False])
def test_restoring_adapters_leaves_the_mode(training, tmp_path):
    policy = adapted("causal")
    policy.save(tmp_path)
    policy.model.train(training)
    policy.restore(tmp_path)
    assert all(m.training == training for m in policy.model.modules())


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_lora_generates_what_transformers_generates(kind, rows):
    policy, data = adapted(kind), rows(5)
    shake(policy)
    out = policy.generate(data, 1, Decode(max_new_tokens=8, greedy=True))
    torch.testing.assert_close(scores(policy, out), out.logprobs, atol=1e-4, rtol=0)
    for row, ids, mask in zip(data, out.response_ids, out.mask, strict=True):
        prompt = torch.tensor([policy.tokenizer(row["prompt"])["input_ids"]])
        prompt = prompt if kind == "seq2seq" else prompt[:, :-1]
        found = policy.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=PAD)[0]
        found = found[1 if kind == "seq2seq" else prompt.shape[1] :].tolist()
        assert ids[mask].tolist() == (found[: found.index(EOS) + 1] if EOS in found else found)


def test_lora_on_an_architecture_that_peft_does_not_know_takes_every_linear_layer():
    names = {n for n, p in load(scratch("m2m_100", lora=Lora(r=8)), 0).model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-4] for n in names} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def test_lora_on_layers_that_are_not_there_names_those_that_are():
    refused("fc1, fc2, k_proj", scratch("m2m_100", lora=Lora(r=8, target_modules=["query"])))


def test_adapters_are_drawn_from_the_seed():
    """... and not from where torch's own generator happens to stand."""

    def drawn(seed: int) -> torch.Tensor:
        torch.rand(3)
        model = load(scratch("llama", lora=Lora(r=2)), seed).model
        return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


# ---- special tokens


def test_nothing_is_wrong_with_the_special_tokens_of_a_new_model(policy):
    assert policy.lint() == []


def test_padding_with_the_end_of_sequence_token_is_reported_and_masked_by_position(tmp_path):
    cfg = scratch("llama", tokenizer=tokenizer_folder(tmp_path, eos_token="</s>"))
    policy = load(cfg, 0)
    assert policy.pad == policy.eos[0] == EOS
    assert len(policy.lint()) == 1 and "pad_token is eos_token" in policy.lint()[0]
    rows = [{"prompt": p, "response": r, "id": 0} for p, r in (("the", "cat"), ("the cat sat", "sat the cat cat"))]
    batch = policy.demonstrations(rows)
    assert batch.response_ids.tolist() == [[4, EOS, EOS, EOS, EOS], [5, 3, 4, 4, EOS]]
    assert batch.mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert batch.prompt_ids.tolist() == [[EOS, EOS, 3], [3, 4, 5]]
    assert batch.prompt_mask.tolist() == [[False, False, True], [True] * 3]
    alone = policy.demonstrations(rows[:1])
    torch.testing.assert_close(scores(policy, batch)[:1, :2], scores(policy, alone), atol=1e-5, rtol=0)


def test_a_tokenizer_with_a_padding_token_of_its_own_keeps_it(tmp_path):
    cfg = scratch("llama", tokenizer=tokenizer_folder(tmp_path, eos_token="</s>", pad_token="<pad>"))
    policy = load(cfg, 0)
    assert policy.pad == PAD and policy.lint() == []


def test_the_generation_config_adds_ends_of_sequence(tiny_causal):
    model = tiny_causal.model
    for given_ids, expected in ((7, [EOS, 7]), ([9, EOS, 7], [EOS, 9, 7]), (None, [EOS])):
        model.generation_config.eos_token_id = given_ids
        assert Policy(model, tiny_causal.tokenizer).eos == expected


# ---- prompts


def length_of(policy: Policy, text: str) -> int:
    return len(policy.tokenizer(text)["input_ids"]) - (not policy.model.config.is_encoder_decoder)


def test_a_prompt_longer_than_the_positions_is_refused(policy):
    fits = max(
        (("word " * n + "x" * m for n in range(20) for m in range(70))), key=lambda t: length_of(policy, t) == 64
    )
    assert length_of(policy, fits) == 64 == policy.model.config.max_position_embeddings
    assert len(policy.encode_prompts([{"prompt": fits, "id": 0}])[0]) == 64
    if not policy.is_encoder_decoder:
        with pytest.raises(UserError, match=r"max_new_tokens=1 .*room here: 0"):
            policy.generate([{"prompt": fits, "id": 0}], 1, Decode(max_new_tokens=1))
    with pytest.raises(UserError, match=r"row 17 has 6\d tokens; the model takes 64"):
        policy.encode_prompts([{"prompt": "rain", "id": 16}, {"prompt": fits + " qqq", "id": 17}])


def test_relative_positions_set_no_limit():
    cfg = scratch("t5")
    cfg.config["n_positions"] = 16  # published T5 configurations carry such a number, and it means nothing
    policy = load(cfg, 0, TEXTS)
    batch = policy.generate([{"prompt": "qx" * 400, "id": 0}], 1, Decode(max_new_tokens=1))
    assert batch.prompt_ids.shape[1] > 700


def test_a_chat_needs_a_template_and_is_rendered_by_it(policy):
    chat = [{"role": "user", "content": "the cat"}]
    rows = [{"prompt": "rain", "id": 0}, {"prompt": chat, "id": 1}, {"prompt": "birds sing", "id": 2}]
    with pytest.raises(UserError, match="no chat template"):
        policy.encode_prompts(rows)
    policy = Policy(policy.model, copy.deepcopy(policy.tokenizer))
    policy.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}"
    )
    first, second, third = policy.encode_prompts(rows)
    assert policy.tokenizer.decode(second, skip_special_tokens=True).strip() == "[user] the cat\n[answer]"
    end = [] if not policy.model.config.is_encoder_decoder else [EOS]
    for ids, text in ((first, "rain"), (third, "birds sing")):
        assert ids == policy.tokenizer(text, add_special_tokens=False)["input_ids"] + end


# ---- demonstrations


@pytest.mark.parametrize("name", ["m2m_100", "t5", "llama", "gpt2"])
def test_demonstrations_are_closed_exactly_once(name):
    policy = load(scratch(name), 0, TEXTS)
    rows = [
        {"prompt": "rain", "response": r, "id": i} for i, r in enumerate(["Regen", "", "a longer answer, in words"])
    ]
    batch = policy.demonstrations(rows)
    for ids, mask, row in zip(batch.response_ids, batch.mask, rows, strict=True):
        plain = policy.tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        assert EOS not in plain
        assert ids[mask].tolist() == [*plain, EOS]
        assert mask.tolist() == [t <= len(plain) for t in range(len(ids))]
        assert policy.tokenizer.decode(plain).strip() == row["response"]
    assert batch.responses == [row["response"] for row in rows]
    assert batch.group.tolist() == [0, 1, 2]
    cut = policy.demonstrations(rows, max_tokens=3)
    assert cut.response_ids.shape[1] == 3
    assert cut.response_ids[2].tolist() == batch.response_ids[2, :3].tolist()


@pytest.mark.parametrize("name", ["m2m_100", "llama"])
@pytest.mark.parametrize("text", ["<s>struck</s> out", "the tag </s>", "a <pad> b"])
def test_an_answer_that_spells_a_special_token_is_closed_once(name, text):
    policy = load(scratch(name), 0, TEXTS)
    batch = policy.demonstrations([{"prompt": "rain", "response": text, "id": 0}])
    ids = batch.response_ids[0].tolist()
    assert ids[-1] == EOS and not {PAD, BOS, EOS} & set(ids[:-1])
    assert policy.decode_text(batch.response_ids, batch.mask) == [text]


# ---- the tokenizer of a new model

TOKENIZER = train_tokenizer(TEXTS, 300)
SPECIAL = ("<pad>", "<s>", "</s>")


@given(st.text(max_size=60).filter(lambda text: not any(s in text for s in SPECIAL)))
@settings(max_examples=200, deadline=None, database=None)
def test_any_text_comes_back_from_the_tokenizer(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids[-1] == EOS and not {PAD, BOS, EOS} & set(ids[:-1])
    assert TOKENIZER.decode(ids, skip_special_tokens=True) in (text, " " + text)  # a first word is like any other
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) in (text, " " + text)


def test_the_tokenizer_learns_from_its_texts():
    assert [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id] == [PAD, BOS, EOS]
    many = train_tokenizer(["zebra zebra zebra"] * 5, 280)
    assert len(many("zebra", add_special_tokens=False)["input_ids"]) == 1
    assert len(TOKENIZER("zebra", add_special_tokens=False)["input_ids"]) > 1
    assert len(TOKENIZER) <= 300


# ---- padding


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_padding_does_not_change_log_probabilities(name):
    policy = load(scratch(name), 1, TEXTS)
    rows = [{"prompt": p, "response": r, "id": i} for i, (p, r) in enumerate(zip(TEXTS, TEXTS[::-1], strict=True))]
    together = policy.demonstrations(rows)
    alone = [policy.demonstrations([row]) for row in rows]
    wide = together.with_(
        prompt_ids=pad(together.prompt_ids, 5, PAD, left=not policy.model.config.is_encoder_decoder),
        prompt_mask=pad(together.prompt_mask, 5, False, left=not policy.model.config.is_encoder_decoder),
        response_ids=pad(together.response_ids, 3, PAD, left=False),
        mask=pad(together.mask, 3, False, left=False),
    )
    assert len({one.prompt_ids.shape[1] for one in alone}) > 3
    wanted = [scores(policy, one)[0] for one in alone]
    assert torch.cat(wanted).std() > 0.5
    for found in (scores(policy, together), scores(policy, wide)):
        for i, one in enumerate(wanted):
            torch.testing.assert_close(found[i, : len(one)], one, atol=1e-4, rtol=0)
            assert torch.all(found[i, len(one) :] == 0)


def pad(x: torch.Tensor, columns: int, value: float, left: bool) -> torch.Tensor:
    fill = torch.full((x.shape[0], columns), value, dtype=x.dtype)
    return torch.cat([fill, x] if left else [x, fill], 1)


def test_prompts_that_share_a_group_are_encoded_once(tiny_seq2seq, rows):
    batch = tiny_seq2seq.generate(rows(3), [2, 1, 3], Decode(max_new_tokens=4), generator=seeded(0))
    read = []
    hook = tiny_seq2seq.model.get_encoder().register_forward_hook(lambda _m, _a, out: read.append(len(out[0])))
    shared = scores(tiny_seq2seq, batch)
    single = scores(tiny_seq2seq, batch.with_(group=torch.arange(6)))
    hook.remove()
    assert read == [3, 6]
    torch.testing.assert_close(shared, single, atol=1e-5, rtol=0)
