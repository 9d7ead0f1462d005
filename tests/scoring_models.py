"""Tiny reward models of every architecture, and their scores worked out a row at a time with transformers alone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from conftest import ANSWERS, CAUSAL, SEQ2SEQ, WORDS
from torch import Tensor

from alignkit import heads, reward_model
from alignkit.config import Model
from alignkit.reward_model import Reading, RewardModel

ENCODER = {
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
CONFIGS = {"causal": CAUSAL, "seq2seq": SEQ2SEQ, "encoder": ENCODER}
KINDS = list(CONFIGS)
POOLINGS = ["last", "eos", "mean", "all", "pattern"]
EXAMPLES: dict[str, dict[str, Any]] = {  # settings of each head
    "Scalar": {},
    "Attributes": {"names": ["help", "tone", "length"], "weights": [0.65, 0.8, -0.45]},
}
TEMPLATE = "{prompt} #"  # a sign that stands in no text, for pooling=pattern


def subclasses(cls: type) -> list[type]:
    return [one for sub in cls.__subclasses__() for one in (sub, *subclasses(sub))]


HEADS = [cls.__name__ for cls in subclasses(heads.Head) if cls.__module__.startswith("alignkit.")]


def cfg(kind: str, **settings: Any) -> Model:
    return Model(config=dict(CONFIGS[kind]), vocab_size=300, device="cpu", **settings)


def new(kind: str, pooling: str = "last", head: str = "Scalar", seed: int = 0, **reading: Any) -> RewardModel:
    """A reward model built from scratch."""
    made = Reading(
        head=getattr(heads, head)(**EXAMPLES[head]),
        pooling=pooling,  # type: ignore[arg-type]
        pattern=[2] if pooling == "pattern" else [],
        **{"template": TEMPLATE, **reading},
    )
    model = reward_model.build(cfg(kind), made, seed, WORDS + ANSWERS)
    if pooling == "pattern" and kind != "seq2seq":  # of which only the response is seen
        made.pattern = model.tokenizer("#", add_special_tokens=False)["input_ids"][-1:]
    return model


_built = cache(new)


def model_of(kind: str, pooling: str = "last", head: str = "Scalar") -> RewardModel:
    """As ``new``, built once: one's own weights."""
    built = _built(kind, pooling, head)
    return RewardModel(copy.deepcopy(built.model), built.tokenizer, built.compute, copy.deepcopy(built.reading))


def rows(n: int = 6) -> list[dict[str, Any]]:
    """Pairs that are single responses too, of different lengths."""
    return [
        {
            "id": i,
            "prompt": WORDS[i % 6],
            "response": ANSWERS[i % 6],
            "chosen": ANSWERS[i % 6],
            "rejected": ANSWERS[(i + 2) % 6] + " " + WORDS[(i + 1) % 6],
            "references": [ANSWERS[(i + 1) % 6]],
        }
        for i in range(n)
    ]


@torch.no_grad()
def alone(model: RewardModel, row: dict[str, Any]) -> Tensor:
    """(k,) what the head gives to one response: its backbone on one unpadded sequence."""
    encode, backbone, pooling = model.tokenizer, model.model.backbone, model.reading.pooling
    prompt = encode(model.reading.template.format(prompt=row["prompt"]))["input_ids"]  # closed with </s>
    response = [*encode(row["response"], add_special_tokens=False)["input_ids"], 2]
    if model.kind == "seq2seq":
        ids = response
        states = backbone(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[1, *response]]))
        seen = states.last_hidden_state[0, 1:]
        own = seen
    else:
        ids = (prompt[:-1] if model.kind == "causal" else prompt) + response
        seen = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
        own = seen[-len(response) :]
    head = model.model.head.weight
    if pooling == "all":
        return (own @ head.T).sum(0)
    if pooling == "mean":
        return head @ own.mean(0)
    if pooling == "pattern":
        return head @ seen[max(i for i, one in enumerate(ids) if one == model.reading.pattern[0])]
    return head @ own[-1]


def score_of(model: RewardModel, z: Tensor) -> Tensor:
    """The score that its settings make of outputs (k,)."""
    weights = getattr(model.head, "weights", [1.0])
    return sum(w * one for w, one in zip(weights, z, strict=True))  # type: ignore[return-value]
