"""The batched decoding loop: one prefill a prompt, shared by its samples; finished rows leave the batch."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignkit import ops

STRIDE = 16  # rows leave in steps of this many: each new number of rows costs a processor time to prepare for
BLOCK = 64  # a draw first finds its block of this many tokens, then the token in it


@dataclass
class Decode:
    """How to decode. The default draws from the model's full distribution, as policy gradients assume."""

    max_new_tokens: int = 64
    greedy: bool = False
    top_k: int = 0  # 0: off. Filters change the distribution that is sampled, not the log-probs returned
    top_p: float = 1.0  # 1: off
    entropy: bool = False  # also return the entropy of each step
    top: bool = False  # also return the probability of the likeliest token at each step
    tempered: bool = False  # log-probabilities at the sampling temperature instead of 1
    stop: tuple[int, ...] = ()  # tokens that end a response, as the end-of-sequence token does; they belong to it


@dataclass
class Decoded:
    """R rows, T tokens; ``mask`` is true up to and with the end-of-sequence token."""

    ids: Tensor  # (R, T) int64
    mask: Tensor  # (R, T) bool
    logprobs: Tensor  # (R, T) of the chosen tokens under the unfiltered model, at temperature 1 unless ``tempered``
    entropy: Tensor | None  # (R, T) nats, where asked for
    top: Tensor | None  # (R, T) probability of the likeliest token, where asked for


@torch.no_grad()
def decode(
    state: State,
    counts: Tensor,
    how: Decode,
    *,
    eos: list[int],
    pad: int,
    temperature: Tensor | None = None,
    generator: torch.Generator | None = None,
    among: tuple[int, int] | None = None,
) -> Decoded:
    """Draw ``counts[i]`` responses to prompt i: R = counts.sum() rows, those of one prompt adjacent.

    Args:
        state: what ``begin`` gives for the B prompts; it is used up.
        counts: (B,) int64, may be ragged.
        temperature: (B,) per prompt; None: 1.
        generator: one uniform number per row and step is drawn up front, so the result does not depend on
            which rows have finished.
        among: (first, all): these R rows are those from ``first`` on of so many, the others being drawn elsewhere.
    """
    device, steps = counts.device, how.max_new_tokens
    rows = int(counts.sum())
    owner = torch.arange(len(counts), device=device).repeat_interleave(counts)
    first, drawn = among or (0, rows)
    uniform = None if how.greedy else torch.rand(drawn, steps, generator=generator)[first : first + rows].to(device)
    tau = None if temperature is None or bool((temperature == 1).all()) else temperature.to(device)[owner, None]

    state.expect(steps)
    logits = state.first()[owner]
    state.select(owner)

    ids = torch.full((rows, steps), pad, dtype=torch.long, device=device)
    mask = torch.zeros(rows, steps, dtype=torch.bool, device=device)
    logprobs = torch.zeros(rows, steps, device=device)
    entropies = torch.zeros(rows, steps, device=device) if how.entropy else None
    tops = torch.zeros(rows, steps, device=device) if how.top else None
    ends = torch.tensor(eos, device=device)
    stop = torch.tensor(how.stop, device=device, dtype=torch.long)
    alive = torch.arange(rows, device=device)  # rows that the cache holds …
    going = torch.ones(rows, dtype=torch.bool, device=device)  # … and which of them have not ended

    for t in range(steps):
        logits = logits.float()
        token, logprob = _choose(
            logits, how, None if tau is None else tau[alive], None if uniform is None else uniform[alive, t]
        )
        row = alive[going]
        ids[row, t] = token[going]
        mask[row, t] = True
        logprobs[row, t] = logprob[going]
        if tops is not None:
            tops[row, t] = logits.softmax(-1).amax(-1)[going]
        if entropies is not None:
            entropies[row, t] = ops.entropy(logits)[going]
        going = going & ~torch.isin(token, ends)
        if 0 < len(stop) <= t + 1:
            going = going & (ids[alive, t + 1 - len(stop) : t + 1] != stop).any(1)
        left = int(going.sum())
        if left == 0 or t + 1 == steps:
            break
        size = -(-left // STRIDE) * STRIDE
        if size < len(going):
            keep = _fill_gaps(going, left, size)
            state.select(keep)
            alive, token, going = alive[keep], token[keep], going[keep]
        logits = state.next(token)
    used = int(mask.any(0).sum())
    kept = [None if x is None else x[:, :used] for x in (entropies, tops)]
    return Decoded(ids[:, :used], mask[:, :used], logprobs[:, :used], *kept)


def _fill_gaps(going: Tensor, left: int, size: int) -> Tensor:
    """Indices (size,) of the ``left`` rows that go on, and of some that have ended where ``size`` is more.

    The last ones take the places of those that have ended: rows that stay where they are need not be copied.
    """
    keep = torch.arange(size, device=going.device)
    ended, moved = (~going[:size]).nonzero().flatten(), going[size:].nonzero().flatten() + size
    keep[ended[: len(moved)]] = moved
    return keep


def _choose(logits: Tensor, how: Decode, tau: Tensor | None, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """The next token and its log-probability: logits (R, V), tau (R, 1), uniform (R,) or None: greedy → (R,), (R,)."""
    scaled = logits if tau is None else logits / tau
    measured = scaled if how.tempered else logits
    if uniform is None:
        token = logits.argmax(-1)
    else:
        filtered = _filter(scaled, how.top_k, how.top_p)
        probs = filtered.softmax(-1)
        token = _inverse_cdf(probs, uniform)
        if filtered is measured:  # no further pass over the vocabulary; what was drawn cannot have underflowed
            return token, probs.gather(-1, token[:, None]).squeeze(-1).log()
    return token, measured.gather(-1, token[:, None]).squeeze(-1) - measured.logsumexp(-1)


def _inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Sample one index a row by inverting the cumulative sum: probs (R, V), uniform (R,) in [0, 1] → (R,).

    Two levels, the block and then the token in it: sums of blocks are faster than a cumulative sum over the
    vocabulary, and round less.
    """
    vocabulary = probs.shape[-1]
    whole = vocabulary - vocabulary % BLOCK
    blocks = torch.cat(
        [probs[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1), probs[:, whole:].sum(-1, keepdim=True)], dim=-1
    )
    cdf = blocks.cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]
    block = _first_above(cdf, target)
    target = (target - (cdf - blocks).gather(-1, block)).clamp(min=0)  # rounding must not lead below the block
    index = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(-1, index.clamp(max=vocabulary - 1)).masked_fill(index >= vocabulary, 0)
    return (block * BLOCK + _first_above(inside.cumsum(-1), target)).squeeze(-1)


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """First index at which a cumulative sum exceeds its target: (R, N), (R, 1) → (R, 1); never one without mass.

    The target is kept below the total, which rounding can make smaller than it should be.
    """
    total = cdf[:, -1:]
    return torch.searchsorted(cdf, torch.minimum(target, torch.nextafter(total, torch.zeros_like(total))), right=True)


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


class _InPlace(DynamicLayer):
    """Keys and values of one attention layer, in buffers with room to spare.

    ``DynamicLayer`` copies all it holds at every step, and once more when rows leave. Here a step writes its own
    position, and a row that leaves costs the copy of one row at most. Backward would need what is overwritten, so this
    is for decoding without gradients.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, length: int | None = None, window: int | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.length = length  # positions there will be; None: those of the first call, as in cross-attention
        self.held = dtype  # of the buffers; None: of what is written
        self.is_sliding = window is not None
        self.kept = sys.maxsize if window is None else window - 1  # past positions that a new token may look at
        self.seen = 0  # positions written so far …
        self.end = 0  # … and where the last of those ends in the buffers
        self.buffers: list[Tensor] = []  # keys and values: (rows, heads, room, size); sizes may differ

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (R, H, N, D); return the past that counts and them, (R, H, past + N, D)."""
        states = (key_states, value_states)
        past, new = min(self.seen, self.kept), key_states.shape[-2]
        if not self.buffers:  # no room to spare: prompts are yet to be repeated
            self.buffers = [s.new_empty(s.shape, dtype=self.held or s.dtype) for s in states]
            self.is_initialized = True
        elif self.end + new > self.buffers[0].shape[-2]:
            self._view(len(key_states), past)
            self._move(None, past, self._room(past + new, new))
        self.seen, self.end = self.seen + new, self.end + new
        for buffer, state in zip(self.buffers, states, strict=True):
            buffer[: len(state), :, self.end - new : self.end] = state
        self._view(len(key_states), past + new)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order; more rows than there are need new buffers, fewer are moved in place."""
        if not self.is_initialized:
            return
        rows, length = len(beam_idx), self.keys.shape[-2]
        if rows > len(self.keys):
            self._move(beam_idx, length, self._room(length))
        else:
            moved = (beam_idx != torch.arange(rows, device=beam_idx.device)).nonzero().flatten()
            for held in (self.keys, self.values):
                held.index_copy_(0, moved, held.index_select(0, beam_idx[moved]))
        self._view(rows, length)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self.seen, self.kept)
        return past + query_length, self.seen - past

    def _room(self, length: int, new: int = 0) -> int:
        """Positions of new buffers that hold ``length`` with the ``new``: half as many again, but no more than there will be."""
        spare = 0 if self.length is None else max(0, self.length - self.seen - new)
        return length + min(spare, max(16, length // 2))

    def _move(self, rows: Tensor | None, past: int, room: int) -> None:
        """Copy what is held, of these rows, to the beginning of new buffers."""
        old = (self.keys, self.values)
        for i, held in enumerate(old):
            many = len(held) if rows is None else len(rows)
            new = held.new_empty(many, held.shape[1], room, held.shape[-1])
            new[:, :, :past] = held if rows is None else held.index_select(0, rows)
            self.buffers[i] = new
        self.end = past

    def _view(self, rows: int, length: int) -> None:
        self.keys, self.values = (buffer[:rows, :, self.end - length : self.end] for buffer in self.buffers)


def _write_in_place(cache: Any, length: int | None, dtype: torch.dtype | None) -> None:
    """Exchange the attention layers of an empty cache for such that write in place; other kinds stay as they are."""
    if isinstance(cache, EncoderDecoderCache):
        _write_in_place(cache.self_attention_cache, length, dtype)
        _write_in_place(cache.cross_attention_cache, None, dtype)
        return
    if cache.layer_class_to_replicate is DynamicLayer:  # made without a config: layers come with the first pass
        cache.layer_class_to_replicate = partial(_InPlace, length, dtype=dtype)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _InPlace(length, None, dtype)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = _InPlace(length, layer.sliding_window, dtype)


class State(Protocol):
    """One or several models in the middle of decoding: R rows, each with all that has been read of it."""

    def expect(self, steps: int) -> None:
        """Before anything is read: so many tokens will be drawn at most; without it caches let gradients through."""

    def first(self) -> Tensor:
        """Read the prompts; logits (B, V) of the first token."""

    def select(self, keep: Tensor) -> None:
        """Go on with these rows, in this order; a row may come several times."""

    def next(self, token: Tensor) -> Tensor:
        """Read a token (R,) of each row; logits (R, V) of what follows."""


def begin(model: Any, ids: Tensor, mask: Tensor, start: list[int]) -> State:
    """A model about to decode.

    Args:
        ids: (B, P); left-padded for a causal model, right-padded for an encoder.
        start: decoder prefix of an encoder–decoder model (not returned); empty for a causal one.
    """
    return Encoded(model, ids, mask, start) if start else Prompted(model, ids, mask)


class Prompted:
    """A causal model in the middle of decoding: its cache, attention mask and positions."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask.long()
        self.cache = DynamicCache(config=model.config)
        self.kwargs = {cache_name(model): self.cache, "use_cache": True}
        self.places = takes(model, "position_ids")

    def expect(self, steps: int) -> None:
        _write_in_place(self.cache, self.mask.shape[1] + steps - 1, _held(self.model))  # the last is not read again

    def first(self) -> Tensor:
        return self.read(input_ids=self.ids, logits_to_keep=1)[:, -1]

    def read(self, **inputs: Any) -> Tensor:
        """Logits of the prompts, which come as ``input_ids`` (B, P) or ``inputs_embeds`` (B, P, H)."""
        place = {"position_ids": positions(self.mask)} if self.places else {}
        logits: Tensor = self.model(attention_mask=self.mask, **inputs, **self.kwargs, **place).logits
        return logits

    def select(self, keep: Any) -> None:
        self.cache.reorder_cache(keep)
        self.mask = self.mask[keep]

    def next(self, token: Tensor) -> Tensor:
        return self.go_on(input_ids=token[:, None])

    def go_on(self, **inputs: Any) -> Tensor:
        """Logits (R, V) behind one more position, which comes as ``input_ids`` (R, 1) or ``inputs_embeds`` (R, 1, H)."""
        place = {"position_ids": self.mask.sum(1, keepdim=True)} if self.places else {}
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        logits: Tensor = self.model(attention_mask=self.mask, **inputs, **self.kwargs, **place).logits
        return logits[:, -1]


class Encoded:
    """An encoder–decoder model in the middle of decoding: encoder states and both halves of its cache."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, start: list[int]) -> None:
        self.model, self.mask = model, mask.long()
        self.encoded = model.get_encoder()(input_ids=ids, attention_mask=self.mask)
        self.start = torch.tensor([start], device=ids.device).expand(len(ids), -1)
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.kwargs = {cache_name(model): self.cache, "use_cache": True}

    def expect(self, steps: int) -> None:
        _write_in_place(self.cache, self.start.shape[1] + steps - 1, _held(self.model))

    def first(self) -> Tensor:
        return self.next(self.start)

    def select(self, keep: Any) -> None:
        self.cache.reorder_cache(keep)
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[keep]
        self.mask = self.mask[keep]

    def next(self, token: Tensor) -> Tensor:
        token = token if token.dim() == 2 else token[:, None]
        out = self.model(encoder_outputs=self.encoded, attention_mask=self.mask, decoder_input_ids=token, **self.kwargs)
        logits: Tensor = out.logits[:, -1]
        return logits


def sdpa_float32(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA in float32: on a processor several times as fast as in bfloat16, back and forth."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    if kwargs.get("position_bias") is not None:  # of T5
        kwargs["position_bias"] = kwargs["position_bias"].float()
    out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return out.to(query.dtype), None


AttentionInterface.register("sdpa_float32", sdpa_float32)
AttentionMaskInterface.register("sdpa_float32", sdpa_mask)


def wide_attention(model: Any) -> bool:
    """Whether the model's attention turns its keys and values to float32 anyway, so that a cache may hold them as such."""
    return bool(model.config._attn_implementation == "sdpa_float32")


def _held(model: Any) -> torch.dtype | None:
    """Precision in which a cache may hold keys and values; None: as they come."""
    return torch.float32 if wide_attention(model) else None


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
