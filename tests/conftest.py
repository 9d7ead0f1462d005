"""Tiny policies, built in memory, and data rows to feed them."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from alignkit.batch import Batch
from alignkit.cli import main
from alignkit.config import Model
from alignkit.policy import Policy, load

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


@pytest.fixture(autouse=True)
def forget_the_job() -> Iterator[None]:
    """Hydra's, which it keeps for the rest of the process: a run of the next test would take it for its own."""
    yield
    HydraConfig.instance().cfg = None


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
def ragged_policy(policy) -> Policy:
    """``policy`` for which a good share of the vocabulary ends a response: an untrained model's lengths then differ."""
    policy.eos = [policy.eos[0], *range(97, 160)]
    return policy


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


@pytest.fixture(scope="session")
def make_batch():
    """``make_batch(sizes, lengths, prompts)``: a batch without a model, every cell of it told apart by its value."""

    def make(
        sizes: list[int],
        lengths: list[int] | None = None,  # response tokens of each row; 3 everywhere
        prompts: list[int] | None = None,  # prompt tokens of each group; 2 everywhere
        side: str = "right",  # of the prompts' padding
        scores: list[float] | None = None,
    ) -> Batch:
        owner = [g for g, n in enumerate(sizes) for _ in range(n)]
        lengths = lengths or [3] * len(owner)
        prompts = prompts or [2] * len(sizes)
        width = max(prompts)
        prompt_mask = torch.zeros(len(owner), width, dtype=torch.bool)
        for i, g in enumerate(owner):
            prompt_mask[i, slice(width - prompts[g], width) if side == "left" else slice(prompts[g])] = True
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        response = 1 + torch.arange(mask.numel()).view(mask.shape)
        prompt = 1001 + torch.tensor(owner)[:, None] * width + torch.arange(width)
        rows = [{"prompt": f"p{g}", "response": f"y{g}", "references": [f"y{g}"], "id": g} for g in range(len(sizes))]
        return Batch(
            prompt_ids=prompt * prompt_mask,
            prompt_mask=prompt_mask,
            response_ids=response * mask,
            mask=mask,
            group=torch.tensor(owner),
            rows=[rows[g] for g in owner],
            responses=[f"r{i}" for i in range(len(owner))],
            logprobs=-response.float() * mask,
            scores=None if scores is None else torch.tensor(scores),
            extra={"row": torch.arange(len(owner))},
        )

    return make


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """``cli(*words)``: (exit code, output, errors) of a command run in this process, in a folder of its own."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = 0
        try:
            main([*words])
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
