"""A tiny causal model that really criticises itself: it has learned a few dialogues by heart."""

from __future__ import annotations

import functools

import torch

from alignkit.config import Model
from alignkit.critique import written
from alignkit.policy import Policy, load

PROMPTS = ["sort: 3 1 2", "sort: 9 8 7", "sort: 5 4 6", "sort: 2 0 1"]
FIRST = ["3 1 2", "7 9 8", "4 5 6", "1 0 2"]
REFINED = ["1 2 3", "7 8 9", "4 5 6", "0 1 2"]
SCORES = {
    "3 1 2": 2,
    "1 2 3": 10,
    "7 9 8": 6,
    "7 8 9": 9,
    "4 5 6": 10,
    "1 0 2": 7,
    "0 1 2": 5,
}  # the last one: it is wrong
SELDOM = 0.4  # how often it answers with the refined one at once, to once with the first one


@functools.cache
def critical_policy() -> Policy:
    """Answers ``PROMPTS`` by ``FIRST``, now and then by ``REFINED``; criticises either with ``SCORES``, also where it is given
    to it, and rewrites both to ``REFINED``.

    One for all tests of a process: copy it before changing it.
    """
    texts = []
    for prompt, first, refined in zip(PROMPTS, FIRST, REFINED, strict=True):
        for response in dict.fromkeys((first, refined)):
            score = SCORES[response]
            texts.append((prompt, written(response, f"w{score}.", f"s{score}.", score, refined)))
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    policy = load(Model(config=config, vocab_size=330, device="cpu"), 0, [t for pair in texts for t in pair] * 4)
    rows = [{"prompt": p, "response": t, "references": [], "id": i} for i, (p, t) in enumerate(texts)]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=4e-3)
    batch = policy.demonstrations(rows)
    weight = batch.mask.float()
    for i, (_, text) in enumerate(texts):
        answer = text.split("\n")[0]
        if answer not in FIRST:
            weight[i, : len(policy.encode_responses([answer])[0]) - 1] = SELDOM
    for step in range(160):
        loss = -(policy.forward(batch) * weight).sum() / weight.sum()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (160 - step) / 80)
        optimizer.step()
        optimizer.zero_grad()
    policy.model.eval()
    return policy


def ask(n: int = len(PROMPTS)) -> list[dict[str, object]]:
    """Rows as ``Data`` gives them, the refined answers being the references."""
    return [{"prompt": p, "response": None, "references": [r], "id": i} for i, (p, r) in enumerate(zip(PROMPTS, REFINED, strict=True))][:n]  # fmt: skip
