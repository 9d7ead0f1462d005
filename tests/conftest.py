"""Tiny policies, built in memory, and data rows to feed them."""

from __future__ import annotations

import copy
import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402
import torch  # noqa: E402

from alignkit.config import Model  # noqa: E402
from alignkit.policy import Policy, load  # noqa: E402

torch.set_num_threads(1)

WORDS = ["the cat sat", "a dog ran far", "birds sing", "we eat apples and bread", "rain", "open the old door slowly"]
ANSWERS = ["die Katze sass", "ein Hund", "Lieder", "wir essen Brot", "Regen", "langsam"]

SEQ2SEQ = {
    "model_type": "m2m_100",
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "init_std": 0.3,  # far from uniform, so that a wrong position or mask shows
}
CAUSAL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="session")
def build_policy():
    """``build_policy(kind, **settings)``: a new policy, ``kind`` being ``seq2seq`` or ``causal``."""

    def build(kind: str, seed: int = 0, **settings: object) -> Policy:
        config = {**(SEQ2SEQ if kind == "seq2seq" else CAUSAL), **settings}
        return load(Model(config=config, vocab_size=300, device="cpu"), seed, WORDS + ANSWERS)

    return build


@pytest.fixture(scope="session")
def _built(build_policy):
    return {kind: build_policy(kind) for kind in ("seq2seq", "causal")}


def _fresh(built: Policy) -> Policy:
    """A policy of one's own: weights copied, tokenizer shared."""
    return Policy(copy.deepcopy(built.model), built.tokenizer)


@pytest.fixture
def tiny_seq2seq(_built) -> Policy:
    """A fresh encoder–decoder policy (m2m_100, dropout 0.1), in eval mode."""
    return _fresh(_built["seq2seq"])


@pytest.fixture
def tiny_causal(_built) -> Policy:
    """A fresh causal policy (llama), in eval mode."""
    return _fresh(_built["causal"])


@pytest.fixture(params=["seq2seq", "causal"])
def policy(request, _built) -> Policy:
    """A fresh policy of either architecture: a test that takes it runs twice."""
    return _fresh(_built[request.param])


@pytest.fixture
def rows():
    """``rows(n)``: n data rows with prompts of different lengths."""

    def make(n: int = 4, **columns: object) -> list[dict]:
        return [
            {
                "prompt": WORDS[i % len(WORDS)],
                "response": ANSWERS[i % len(ANSWERS)],
                "references": [ANSWERS[i % len(ANSWERS)]],
                "id": i,
                **columns,
            }
            for i in range(n)
        ]

    return make
