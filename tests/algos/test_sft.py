"""Supervised fine-tuning: what is trained, and what the loss is the mean of."""

from __future__ import annotations

import copy

import pytest
import torch

from alignkit.algos.sft import SFT
from alignkit.policy import Policy

ROWS = [
    {"id": 0, "prompt": "a b", "response": "c", "references": ["c"]},
    {"id": 1, "prompt": "b", "response": "c a b a", "references": ["c a b a"]},
]


@pytest.mark.parametrize("which", ["tiny_seq2seq", "tiny_causal"])
def test_the_loss_is_the_mean_over_response_tokens(which: str, request: pytest.FixtureRequest) -> None:
    """Against transformers' own loss, which averages over the labels that are not -100: the response, its end included."""
    policy: Policy = copy.deepcopy(request.getfixturevalue(which))
    batch = policy.demonstrations(ROWS)
    loss = SFT().loss(policy, batch)
    labels = batch.response_ids.masked_fill(~batch.mask, -100)
    if policy.is_encoder_decoder:
        start = torch.full((2, 1), policy.model.config.decoder_start_token_id)
        shifted = torch.cat([start, batch.response_ids[:, :-1]], dim=1)
        out = policy.model(
            input_ids=batch.prompt_ids,
            attention_mask=batch.prompt_mask.long(),
            decoder_input_ids=shifted,
            labels=labels,
        )
    else:
        prompt_labels = torch.full_like(batch.prompt_ids, -100)
        mask = torch.cat([batch.prompt_mask, batch.mask], dim=1).long()
        out = policy.model(
            input_ids=torch.cat([batch.prompt_ids, batch.response_ids], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            labels=torch.cat([prompt_labels, labels], dim=1),
        )
    assert loss.count == float(batch.mask.sum())
    assert float(loss.total.detach()) / loss.count == pytest.approx(out.loss.item(), rel=1e-5)


@pytest.mark.parametrize("which", ["tiny_seq2seq", "tiny_causal"])
def test_the_end_of_sequence_is_trained(which: str, request: pytest.FixtureRequest) -> None:
    batch = request.getfixturevalue(which).demonstrations(ROWS)
    last = batch.lengths - 1
    assert batch.response_ids[torch.arange(2), last].tolist() == [2, 2]
    assert batch.mask[torch.arange(2), last].all()
