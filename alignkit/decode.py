"""The batched decoding loop: one prefill a prompt, shared by its samples; finished rows leave the batch."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from alignkit import ops

COMPACT_BELOW = 0.85  # drop finished rows from the cache once fewer than this share of its rows are alive


@dataclass
class Decode:
    """How to decode. The default draws from the model's full distribution, as policy gradients assume."""

    max_new_tokens: int = 64
    greedy: bool = False
    top_k: int = 0  # 0: off. Filters change the distribution that is sampled, not the log-probs returned
    top_p: float = 1.0  # 1: off
    entropy: bool = False  # also return the entropy of each step


@dataclass
class Decoded:
    """R rows, T tokens; ``mask`` is true up to and with the end-of-sequence token."""

    ids: Tensor  # (R, T) int64
    mask: Tensor  # (R, T) bool
    logprobs: Tensor  # (R, T) of the chosen tokens under the unfiltered model at temperature 1
    entropy: Tensor | None  # (R, T) nats, where asked for


@torch.no_grad()
def decode(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    counts: Tensor,
    how: Decode,
    *,
    eos: list[int],
    pad: int,
    start: list[int],
    temperature: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Draw ``counts[i]`` responses to prompt i: R = counts.sum() rows, those of one prompt adjacent.

    Args:
        prompt_ids: (B, P); left-padded for a causal model, right-padded for an encoder.
        counts: (B,) int64, may be ragged.
        start: decoder prefix of an encoder–decoder model (not returned); empty for a causal one.
        temperature: (B,) per prompt; None: 1.
        generator: one uniform number per row and step is drawn up front, so the result does not depend on
            which rows have finished.
    """
    device = prompt_ids.device
    rows = int(counts.sum())
    owner = torch.arange(len(counts), device=device).repeat_interleave(counts)
    uniform = None
    if not how.greedy:
        uniform = torch.rand(rows, how.max_new_tokens, generator=generator).to(device)
    tau = None if temperature is None else temperature.to(device)[owner]

    state = _Encoded(model, prompt_ids, prompt_mask, start) if start else _Prompted(model, prompt_ids, prompt_mask)
    logits = state.first()[owner]
    state.select(owner)

    ids = torch.full((rows, how.max_new_tokens), pad, dtype=torch.long, device=device)
    mask = torch.zeros(rows, how.max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(rows, how.max_new_tokens, device=device)
    entropies = torch.zeros(rows, how.max_new_tokens, device=device) if how.entropy else None
    stop = torch.tensor(eos, device=device)
    alive = torch.arange(rows, device=device)  # rows that the cache holds …
    going = torch.ones(rows, dtype=torch.bool, device=device)  # … and which of them have not ended

    for t in range(how.max_new_tokens):
        logits = logits.float()
        if how.greedy:
            token = logits.argmax(-1)
        else:
            scaled = logits if tau is None else logits / tau[alive, None]
            assert uniform is not None
            token = _inverse_cdf(_filter(scaled, how.top_k, how.top_p).softmax(-1), uniform[alive, t])
        row = alive[going]
        ids[row, t] = token[going]
        mask[row, t] = True
        logprobs[row, t] = (logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1))[going]
        if entropies is not None:
            entropies[row, t] = ops.entropy(logits)[going]
        going = going & ~torch.isin(token, stop)
        left = int(going.sum())
        if left == 0 or t + 1 == how.max_new_tokens:
            break
        if left < COMPACT_BELOW * len(going):
            keep = going.nonzero().flatten()
            state.select(keep)
            alive, token, going = alive[keep], token[keep], going[keep]
        logits = state.next(token)
    used = int(mask.any(0).sum())
    return Decoded(
        ids[:, :used], mask[:, :used], logprobs[:, :used], None if entropies is None else entropies[:, :used]
    )


def _inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Sample one index a row by inverting the cumulative sum: probs (R, V), uniform (R,) in [0, 1) → (R,).

    ``right=True`` finds the first index whose cumulative sum exceeds the target, so a token of probability zero
    is never drawn; the target stays below the total, which rounding may keep from being one.
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def _filter(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set what top-k and nucleus filtering exclude to -inf, in this order, as ``generate`` does."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        cut = probs.cumsum(-1) - probs >= top_p  # mass before this token has already reached top_p
        logits = logits.masked_fill(cut.gather(-1, index.argsort(-1)), -torch.inf)
    return logits


class _Prompted:
    """A causal model in the middle of decoding: its cache, attention mask and positions."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask.long()
        self.cache = DynamicCache(config=model.config)
        self.kwargs = {cache_name(model): self.cache, "use_cache": True}
        self.places = takes(model, "position_ids")

    def first(self) -> Tensor:
        place = {"position_ids": positions(self.mask)} if self.places else {}
        out = self.model(input_ids=self.ids, attention_mask=self.mask, logits_to_keep=1, **self.kwargs, **place)
        return out.logits[:, -1]

    def select(self, keep: Any) -> None:
        self.cache.reorder_cache(keep)
        self.mask = self.mask[keep]

    def next(self, token: Tensor) -> Tensor:
        place = {"position_ids": self.mask.sum(1, keepdim=True)} if self.places else {}
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        out = self.model(input_ids=token[:, None], attention_mask=self.mask, **self.kwargs, **place)
        return out.logits[:, -1]


class _Encoded:
    """An encoder–decoder model in the middle of decoding: encoder states and both halves of its cache."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, start: list[int]) -> None:
        self.model, self.mask = model, mask.long()
        self.encoded = model.get_encoder()(input_ids=ids, attention_mask=self.mask)
        self.start = torch.tensor([start], device=ids.device).expand(len(ids), -1)
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.kwargs = {cache_name(model): self.cache, "use_cache": True}

    def first(self) -> Tensor:
        return self.next(self.start)

    def select(self, keep: Any) -> None:
        self.cache.reorder_cache(keep)
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[keep]
        self.mask = self.mask[keep]

    def next(self, token: Tensor) -> Tensor:
        token = token if token.dim() == 2 else token[:, None]
        out = self.model(encoder_outputs=self.encoded, attention_mask=self.mask, decoder_input_ids=token, **self.kwargs)
        return out.logits[:, -1]


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward, looked at through an adapter, has a parameter of this name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(base.forward).parameters


def cache_name(model: Any) -> str:
    """The keyword that hands a cache to the model: transformers 5.24 renamed ``past_key_values`` to ``cache``."""
    return "cache" if takes(model, "cache") else "past_key_values"


def positions(mask: Tensor) -> Tensor:
    """Position of each token under left padding: (B, L) 0/1 mask → (B, L) int64, padding at 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
