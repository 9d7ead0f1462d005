"""``model.layers``: a model that begins as some of the layers of another."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWERS, WORDS
from running import SMALL_RUN, composed, train
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from alignkit import policy
from alignkit.config import Model, check
from alignkit.errors import UserError
from alignkit.loading import read, train_tokenizer

WIDE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
STACKS = {"encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16,
          "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
T5 = {"d_model": 16, "d_ff": 32, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 2, "d_kv": 8}
MODELS: dict[str, tuple[Any, str, dict[str, Any]]] = {  # transformers' class, what precedes a layer's number, settings
    "bert": (AutoModel, "encoder.layer.", {**WIDE, "num_hidden_layers": 4}),
    "roberta": (AutoModel, "encoder.layer.", {**WIDE, "num_hidden_layers": 4}),
    "longformer": (AutoModel, "encoder.layer.", {**WIDE, "num_hidden_layers": 4, "attention_window": [4, 4, 4, 8]}),
    "distilbert": (AutoModel, "transformer.layer.", {"dim": 16, "hidden_dim": 32, "n_layers": 4, "n_heads": 2}),
    "llama": (AutoModelForCausalLM, "model.layers.", {**WIDE, "num_hidden_layers": 4}),
    "gpt2": (AutoModelForCausalLM, "transformer.h.", {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}),
    "gemma3_text": (
        AutoModelForCausalLM,
        "model.layers.",
        {**WIDE, "num_hidden_layers": 4, "head_dim": 8, "num_key_value_heads": 1, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "m2m_100": (AutoModelForSeq2SeqLM, "model.encoder.layers.|model.decoder.layers.", STACKS),
    "bart": (AutoModelForSeq2SeqLM, "model.encoder.layers.|model.decoder.layers.", STACKS),
    "t5": (AutoModelForSeq2SeqLM, "encoder.block.|decoder.block.", T5),
    "umt5": (AutoModelForSeq2SeqLM, "encoder.block.|decoder.block.", T5),
}  # fmt: skip
REFUSED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "albert": (AutoModel, "", {**WIDE, "num_hidden_layers": 4, "embedding_size": 8}),
    "qwen3_moe": (
        AutoModelForCausalLM,
        "",
        {**WIDE, "num_hidden_layers": 2, "num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1,
         "moe_intermediate_size": 8, "mlp_only_layers": [0]},
    ),
}  # fmt: skip
EXPECTED = {("skip", 2): [1, 3], ("skip", 1): [3], ("first", 2): [0, 1], ("first", 3): [0, 1, 2]}  # counted from 0


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS + ANSWERS, 300)


def saved(name: str, folder: Path, tokenizer: Any, **settings: Any) -> str:
    """A folder with a random model, whose norms and biases are random too, so that no two layers are alike."""
    auto, _, given = {**MODELS, **REFUSED}[name]
    config = AutoConfig.for_model(name, **{
        "vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, **given,
        **settings,
    })  # fmt: skip
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def loaded(name: str, path: str, **settings: Any) -> Any:
    cfg = Model(path=path, device="cpu", **settings)
    return read(cfg, 0, [], None, lambda config: {**MODELS, **REFUSED}[name][0], lambda config: None)[0]


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 19).view(2, 8)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@pytest.mark.parametrize(("layers_from", "layers"), EXPECTED)
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_that_of_the_right_layer(
    name: str, layers_from: str, layers: int, tmp_path: Path, tokenizer: Any
) -> None:
    path = saved(name, tmp_path / "whole", tokenizer)
    whole, few = loaded(name, path), loaded(name, path, layers=layers, layers_from=layers_from)
    source, found = whole.state_dict(), few.state_dict()
    block = re.compile(rf"({MODELS[name][1].replace('.', '[.]')})(\d+)[.](.*)")
    seen: dict[str, set[int]] = {}
    for key, weight in found.items():
        match = re.fullmatch(block, key)
        if match is None:  # embeddings, last norm, head
            assert torch.equal(weight, source[key])
            continue
        stack, number, rest = match[1], int(match[2]), match[3]
        seen.setdefault(stack, set()).add(number)
        only_first = name == "t5" and "relative_attention_bias" in rest
        at = 0 if only_first else EXPECTED[layers_from, layers][number]
        assert torch.equal(weight, source[f"{stack}{at}.{rest}"]), key
    assert seen == {stack: set(range(layers)) for stack in MODELS[name][1].split("|")}
    # nothing is left over: what the whole model has outside its layers, or once for all of them, is there too
    assert {k for k in source if not re.fullmatch(block, k)} == {k for k in found if not re.fullmatch(block, k)}
    assert sum("relative_attention_bias" in k for k in found) == {"t5": 2, "umt5": 2 * layers}.get(name, 0)
    with torch.no_grad():
        assert few(**inputs(few))[0].isfinite().all()


@pytest.mark.parametrize("layers_from", ["skip", "first"])
@pytest.mark.parametrize("name", MODELS)
def test_all_layers_are_the_model_itself(name: str, layers_from: str, tmp_path: Path, tokenizer: Any) -> None:
    path = saved(name, tmp_path, tokenizer)
    whole, same = loaded(name, path), loaded(name, path, layers=4, layers_from=layers_from)
    assert same.config.to_dict() == whole.config.to_dict()
    with torch.no_grad():
        assert torch.equal(whole(**inputs(whole))[0], same(**inputs(same))[0])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_comes_back_the_same(name: str, tmp_path: Path, tokenizer: Any) -> None:
    """The configuration says the number of layers, in every place that it has for it, and tied weights stay tied."""
    few = loaded(name, saved(name, tmp_path / "whole", tokenizer), layers=2)
    few.save_pretrained(tmp_path / "few")
    tokenizer.save_pretrained(tmp_path / "few")
    again = loaded(name, str(tmp_path / "few"))
    assert again.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.equal(few(**inputs(few))[0], again(**inputs(again))[0])
    head, embedding = few.get_output_embeddings(), few.get_input_embeddings()
    if head is not None:
        assert (head.weight is embedding.weight) == few.config.tie_word_embeddings


def test_the_kind_of_a_layer_goes_with_it(tmp_path: Path, tokenizer: Any) -> None:
    path = saved("gemma3_text", tmp_path, tokenizer)
    assert loaded("gemma3_text", path, layers=2).config.layer_types == ["full_attention", "sliding_attention"]
    first = loaded("gemma3_text", path, layers=3, layers_from="first").config.layer_types
    assert first == ["sliding_attention", "full_attention", "sliding_attention"]


def test_skipping_by_hand(tmp_path: Path, tokenizer: Any) -> None:
    """12 layers to 6 are the 2nd, 4th, …, 12th; 12 to 3 the 4th, 8th and 12th: told by the output with the others taken out."""
    path = saved("bert", tmp_path, tokenizer, num_hidden_layers=12)
    for layers, kept in ((6, (1, 3, 5, 7, 9, 11)), (3, (3, 7, 11))):
        whole, few = loaded("bert", path), loaded("bert", path, layers=layers)
        whole.encoder.layer = torch.nn.ModuleList([whole.encoder.layer[i] for i in kept])
        whole.config.num_hidden_layers = layers
        with torch.no_grad():
            assert torch.equal(whole(**inputs(whole))[0], few(**inputs(few))[0])


def test_stacks_of_different_size(tmp_path: Path, tokenizer: Any) -> None:
    path = saved("m2m_100", tmp_path, tokenizer, encoder_layers=6)  # 6 and 4
    whole, few = loaded("m2m_100", path).model, loaded("m2m_100", path, layers=2).model
    for few_stack, stack, kept in ((few.encoder, whole.encoder, (2, 5)), (few.decoder, whole.decoder, (1, 3))):
        assert len(few_stack.layers) == 2
        for layer, i in zip(few_stack.layers, kept, strict=True):
            assert torch.equal(layer.fc1.weight, stack.layers[i].fc1.weight)
    with pytest.raises(UserError, match=r"model\.layers=3: the 4 layers .* Give one of 1, 2, 4,"):
        loaded("m2m_100", path, layers=3)


def test_the_precision_is_that_of_the_settings(tmp_path: Path, tokenizer: Any) -> None:
    few = loaded("llama", saved("llama", tmp_path, tokenizer), layers=2, dtype="bfloat16")
    assert {weight.dtype for weight in few.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": 3}, r"model\.layers=3: the 4 layers of .* over 3\. Give one of 1, 2, 4, .* model\.layers_from=first"),
        ({"layers": 5}, r"model\.layers=5: .* has 4 layers"),
        ({"layers": 5, "layers_from": "first"}, r"model\.layers=5: .* has 4 layers"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit(settings: dict[str, Any], said: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=said):
        loaded("bert", saved("bert", tmp_path, tokenizer), **settings)


def test_layers_that_are_one_and_the_same(tmp_path: Path, tokenizer: Any) -> None:
    """ALBERT's layers share their weights: there are none to choose from."""
    path = saved("albert", tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"model\.layers=2: .* albert model, whose layers cannot be told apart"):
        loaded("albert", path, layers=2)


def test_layers_of_different_make(tmp_path: Path, tokenizer: Any) -> None:
    """The first layer of this mixture of experts has none: the second cannot take its place."""
    path = saved("qwen3_moe", tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"model\.layers=1: layers .* differ in kind.*Try model\.layers_from=first"):
        loaded("qwen3_moe", path, layers=1)
    assert len(loaded("qwen3_moe", path, layers=1, layers_from="first").model.layers) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=tiny", "model.layers=0"], "model.layers: must be at least 1"),
        (["model=tiny_causal", "model.layers=2"], "model.layers: keeps layers of a model that is loaded"),
        (["model=tiny", "model.layers_from=last"], "model.layers_from: must be one of skip, first"),
    ],
)
def test_the_configuration_is_checked(words: list[str], said: str) -> None:
    check(composed(["+algo=sft", "model=tiny", "model.layers=1", "model.layers_from=first"]))
    with pytest.raises(UserError, match=re.escape(said)):
        check(composed(["+algo=sft", *words]))


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_goes_on_and_ends_with_the_layers_it_has(lora: int, tmp_path: Path) -> None:
    """A checkpoint has the fewer layers already, one of adapters belongs on them: a stopped run ends as an unbroken one."""
    words = [
        "+algo=sft",
        "model=tiny_lists",
        "data=lists",
        "model.layers=2",
        f"model.lora.r={lora}",
        *SMALL_RUN,
        "algo.batch_size=4",
    ]
    steps = ["algo.steps=4", "run.save_every=2", "evaluate.every=0"]
    _, unbroken = train(tmp_path / "unbroken", *words, *steps)
    _, broken = train(tmp_path / "broken", *words, *steps)
    for gone in ("final", "checkpoint-4"):
        shutil.rmtree(broken / gone)
    (broken / "result.json").unlink()
    assert (broken / "checkpoint-2").is_dir()
    train(tmp_path / "broken", *words, *steps)
    one, other = (policy.load(Model(path=str(run), device="cpu"), 0).model for run in (unbroken, broken))
    assert one.config.num_hidden_layers == other.config.num_hidden_layers == 2
    for key, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[key])
