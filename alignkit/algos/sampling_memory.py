"""The memory behind ESRL's first stage: sampling with the graph kept against sampling in two stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from alignkit import decode, losses, ops
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.data import read
from alignkit.errors import need
from alignkit.policy import Policy, load

KINDS: dict[str, dict[str, Any]] = {
    "causal": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "encoder-decoder": {"model_type": "m2m_100", "d_model": 128, "encoder_ffn_dim": 344, "decoder_ffn_dim": 344}
    | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}


@dataclass(kw_only=True)
class SamplingMemory:
    """What a policy-gradient step keeps for its backward pass, sampled with the graph kept or in two stages.

    Two-stage sampling is ESRL's (arXiv 2308.02223): ids without a graph, then one teacher-forced pass. It is set against a single
    stage, where the loss uses the log-probabilities of the very logits that each token was drawn from. Model (random weights,
    width 128, two layers), responses and loss are the same in both ways, and their gradients are compared. Kept: bytes that
    autograd saves for the backward pass, each storage counted once, parameters left out. It is exact and needs no GPU; the
    whole process's memory is measured by scripts/bench_memory.py.
    """

    kind: Literal["causal", "encoder-decoder"] = "encoder-decoder"
    lengths: tuple[int, ...] = (16, 32, 64, 128)  # tokens of every response
    prompts: int = 8  # English sentences, drawn with the seed
    samples: int = 2  # responses to each

    def __post_init__(self) -> None:
        need(self, "prompts >= 1", "samples >= 1")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be {' or '.join(KINDS)}, is '{self.kind}'")
        if not self.lengths or min(self.lengths) < 1 or max(self.lengths) > 1000:
            raise ValueError(f"lengths must be between 1 and 1,000 tokens, are {list(self.lengths)}")

    def run(self, seed: int) -> dict[str, Any]:
        """Table (a row a length), summary (``kept/WAY/LENGTH`` in bytes, ``share/LENGTH`` of two stages) and the verdict."""
        policy, rows = bench_policy(self.kind, self.prompts, seed)
        backward(
            policy, sampled(policy, rows, self.samples, 2, seed), policy.forward
        )  # the libraries' own is not counted
        found = [self._row(policy, sampled(policy, rows, self.samples, length, seed), seed) for length in self.lengths]
        summary = {
            f"kept/{way}/{row['length']}": {"value": float(row[way])}
            for row in found
            for way in ("single_stage", "two_stages")
        }
        summary |= {f"share/{row['length']}": {"value": row["share"]} for row in found}
        summary["gradient_difference"] = {"value": max(float(row["gradients_differ_by"]) for row in found)}
        last = found[-1]
        share = 1 - last["two_stages"] / last["single_stage"]
        verdict = (
            f"At {last['length']} tokens two stages keep {share:.0%} less for the backward pass; gradients differ by at most "
            f"{summary['gradient_difference']['value']:.0e} of their norm."
        )
        return {"tables": {"kept for the backward pass, bytes": found}, "summary": summary, "verdict": verdict}

    def _row(self, policy: Policy, batch: Batch, seed: int) -> dict[str, Any]:
        uniform = torch.rand(batch.response_ids.shape, generator=torch.Generator().manual_seed(seed))
        ways = {"single_stage": lambda b: single_stage(policy, b, uniform), "two_stages": policy.forward}
        kept, gradients = {}, {}
        for way, forward in ways.items():
            policy.model.zero_grad(set_to_none=True)
            kept[way], gradients[way] = backward(policy, batch, forward)
        one, two = gradients.values()
        return {
            "length": batch.response_ids.shape[1], **kept, "share": kept["two_stages"] / kept["single_stage"],
            "gradients_differ_by": f"{float((one - two).norm() / two.norm()):.1e}",
        }  # fmt: skip


class Saved:
    """Counts what autograd keeps: ``with saved.hooks(): …``, then ``saved.freed()`` once a backward pass is through."""

    def __init__(self, model: Any) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, int] = {}  # alive until the backward pass, so an address names one storage
        self.most = 0  # bytes at the worst moment

    def hooks(self) -> Any:
        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.parameters:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return x

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    def freed(self) -> None:
        self.most = max(self.most, sum(self.storages.values()))
        self.storages.clear()


def bench_policy(kind: str, prompts: int, seed: int) -> tuple[Policy, list[dict[str, Any]]]:
    """A policy with random weights that never ends a response by itself, and so many prompts for it."""
    texts = [columns["src"] for _, columns in read("bundled:tatoeba_en_de.test.jsonl")]
    config = KINDS[kind] | {"max_position_embeddings": 1024}
    policy = load(Model(config=config, vocab_size=2000, device="cpu"), seed, texts)
    policy.eos = [-1]  # no token ends a response
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:prompts]
    return policy, [{"prompt": texts[i], "id": n} for n, i in enumerate(order.tolist())]


def sampled(policy: Policy, rows: list[dict[str, Any]], samples: int, length: int, seed: int) -> Batch:
    """``length`` sampled tokens for every row and sample, with advantages that are drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    batch = policy.generate(rows, samples, decode.Decode(max_new_tokens=length), generator=generator)
    # m2m_100 counts no position for a pad token that is drawn, teacher-forced at least: none may be among the ids
    ids = batch.response_ids.masked_fill(batch.response_ids == policy.pad, policy.tokenizer.bos_token_id)
    advantages = torch.randn(len(batch), generator=torch.Generator().manual_seed(seed + 1))
    return batch.with_(response_ids=ids, advantages=advantages[:, None] * batch.mask)


def backward(policy: Policy, batch: Batch, forward: Callable[[Batch], Tensor]) -> tuple[int, Tensor]:
    """(bytes kept for the backward pass, gradient so far) of the policy loss; ``forward`` gives the log-probabilities (B, T)."""
    assert batch.advantages is not None
    saved = Saved(policy.model)
    with saved.hooks():
        logprobs = forward(batch)
        loss = losses.policy_gradient(logprobs, batch.advantages, batch.mask, batch.group, "groups").total
    saved.freed()
    loss.backward()
    return saved.most, torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def single_stage(policy: Policy, batch: Batch, uniform: Tensor) -> Tensor:
    """Log-probabilities (B, T) from the logits that each token is drawn from, their graph kept.

    The ids of the batch go in, so that every way has the same ones; the draw, by ``uniform`` (B, T), is made for its time.
    """
    model, mask = policy.model, batch.prompt_mask.long()
    kwargs: dict[str, Any] = {"use_cache": True}
    if policy.is_encoder_decoder:
        _, index, sizes = torch.unique_consecutive(batch.group, return_inverse=True, return_counts=True)
        first = sizes.cumsum(0) - sizes
        encoded = model.get_encoder()(input_ids=batch.prompt_ids[first], attention_mask=mask[first])
        kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded.last_hidden_state[index])
        kwargs[decode.cache_name(model)] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        fed = torch.full((len(batch), 1), model.config.decoder_start_token_id)
    else:
        kwargs[decode.cache_name(model)] = DynamicCache(config=model.config)
        kwargs["logits_to_keep"] = 1
        fed = batch.prompt_ids
    columns = []
    for t in range(batch.response_ids.shape[1]):
        if policy.is_encoder_decoder:
            out = model(decoder_input_ids=fed, attention_mask=mask, **kwargs)
        else:
            places = decode.positions(mask)[:, -fed.shape[1] :]
            out = model(input_ids=fed, attention_mask=mask, position_ids=places, **kwargs)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = out.logits[:, -1:]
        with torch.no_grad():
            torch.searchsorted(logits[:, 0].float().softmax(-1).cumsum(-1), uniform[:, t : t + 1].contiguous())
        fed = batch.response_ids[:, t : t + 1]
        columns.append(ops.token_logprobs(logits, fed))
    return torch.cat(columns, dim=1)
