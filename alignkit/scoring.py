"""The teacher-forced pass: what a model puts out before each response token, and nothing at any other position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from alignkit import ranks
from alignkit.batch import Batch
from alignkit.decode import cache_name, positions, takes

WASTE = 0.75  # rows shorter than this share of the longest are computed apart …
ENOUGH = 512  # … once that many tokens have come together: below, a call costs more than padding does


class Piece(NamedTuple):
    """n response tokens, in any order."""

    where: Tensor  # (n,) int64 positions in the flattened (B, T)
    logits: Tensor | None  # (n, V)
    hidden: Tensor | None  # (n, H) what the head reads
    states: tuple[Tensor, ...] = ()  # (n, H) of each layer asked for


@dataclass
class Seen:
    """What a model made of a batch's rows: for distillation, which compares a student's with its teacher's."""

    logits: Tensor  # (n, V) at each position that counts, in the order of the flattened mask
    states: dict[int, Tensor]  # layer, the embeddings being 0 → (B, W, d), 0 where ``where`` is false
    where: Tensor  # (B, W) bool: the tokens whose states these are
    first: bool  # whether the state of the first token stands for the row ([CLS]), or the mean of all

    def summary(self, layer: int) -> Tensor:
        """(B, d) of each row: the state of its [CLS], or the mean of its tokens' states."""
        states = self.states[layer]
        if self.first:
            return states[:, 0]
        return (states * self.where[..., None]).sum(1) / self.where.sum(1, keepdim=True).clamp(min=1)


def teacher_forced(
    model: Any,
    batch: Batch,
    start: list[int],
    *,
    logits: bool = True,
    hidden: bool = False,
    layers: Sequence[int] = (),
) -> Iterator[Piece]:
    """Every response token of the batch once, with the logits or hidden states *before* it.

    A prompt is read once, however many responses its group has; responses are computed in parts of similar length;
    the head sees only positions that precede a token that counts.

    Args:
        start: decoder prefix of an encoder–decoder model; empty for a causal one.
        layers: whose states are wanted (of the decoder, where there is one); 0: the embeddings.
    """
    first = batch.group_starts()
    owner = torch.unique_consecutive(batch.group, return_inverse=True)[1]
    prompt_ids, prompt_mask = batch.prompt_ids[first], batch.prompt_mask[first]
    lengths = batch.lengths.tolist()
    with _head(model, logits, hidden, layers) as head:
        if start:
            encoded = model.get_encoder()(input_ids=prompt_ids, attention_mask=prompt_mask.long()).last_hidden_state
            prefix = torch.tensor(start, device=encoded.device)
            for rows in _similar(lengths):
                width = lengths[rows[0]]
                ids = torch.cat([prefix.expand(len(rows), -1), batch.response_ids[rows, : width - 1]], dim=1)
                wanted = batch.mask[rows, :width]
                read = {"attention_mask": prompt_mask[owner[rows]].long()}
                yield head.run(
                    lambda h, wanted=wanted: h[:, len(start) - 1 :][wanted],
                    where=_flat(rows, wanted, batch),
                    encoder_outputs=BaseModelOutput(last_hidden_state=encoded[owner[rows]]),
                    decoder_input_ids=ids,
                    use_cache=False,
                    **read,
                )
        elif len(first) == len(batch) or not _shares_prompts(model):
            width = batch.prompt_ids.shape[1]
            for rows in _similar(lengths):
                longest = lengths[rows[0]]
                ids = torch.cat([batch.prompt_ids[rows], batch.response_ids[rows, : longest - 1]], dim=1)
                mask = torch.cat([batch.prompt_mask[rows], batch.mask[rows, : longest - 1]], dim=1).long()
                wanted = batch.mask[rows, :longest]
                yield head.run(
                    lambda h, wanted=wanted: h[:, width - 1 :][wanted],
                    where=_flat(rows, wanted, batch),
                    input_ids=ids,
                    attention_mask=mask,
                    use_cache=False,
                    **_places(model, positions(mask)),
                )
        else:
            cache = DynamicCache()
            mask = prompt_mask.long()
            held: Any = cache.layers
            every = torch.arange(len(batch), device=mask.device)
            yield head.run(
                lambda h: h[:, -1][owner],
                where=every * batch.mask.shape[1],
                input_ids=prompt_ids,
                attention_mask=mask,
                **{cache_name(model): cache},
                use_cache=True,
                **_places(model, positions(mask)),
            )
            for rows in _similar([n - 1 for n in lengths]):
                width = lengths[rows[0]]
                wanted = batch.mask[rows, 1:width]
                of = owner[rows]
                seen = mask[of]
                place = seen.sum(1, keepdim=True) + torch.arange(width - 1, device=mask.device)
                yield head.run(
                    lambda h, wanted=wanted: h[wanted],
                    where=_flat(rows, wanted, batch) + 1,
                    input_ids=batch.response_ids[rows, : width - 1],
                    attention_mask=torch.cat([seen, batch.mask[rows, : width - 1].long()], dim=1),
                    **{cache_name(model): DynamicCache([(kv.keys[of], kv.values[of]) for kv in held])},
                    use_cache=True,
                    **_places(model, place),
                )


class _Head:
    """Runs a model whose head is made to see the picked positions only."""

    def __init__(self, model: Any, logits: bool, hidden: bool, layers: Sequence[int]) -> None:
        self.model, self.logits, self.hidden, self.layers = model, logits, hidden, layers
        self.pick: Any = None
        self.picked: Tensor | None = None

    def before(self, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """(b, t, H) → (1, n, H); what a model does behind its head (a bias, a scale, a soft cap) is elementwise in n."""
        self.picked = self.pick(args[0])
        assert self.picked is not None
        return (self.picked[None] if self.logits else self.picked[None, :0],)

    def run(self, pick: Any, where: Tensor, **inputs: Any) -> Piece:
        self.pick = pick
        out = self.model(**inputs, **({"output_hidden_states": True} if self.layers else {}))
        states: tuple[Tensor, ...] = ()
        if self.layers:
            every = out.decoder_hidden_states if "encoder_outputs" in inputs else out.hidden_states
            states = tuple(pick(every[layer]) for layer in self.layers)
        return Piece(where, out.logits[0] if self.logits else None, self.picked if self.hidden else None, states)


@contextmanager
def _head(model: Any, logits: bool, hidden: bool, layers: Sequence[int]) -> Iterator[_Head]:
    head = _Head(model, logits, hidden, layers)
    hook = model.get_output_embeddings().register_forward_pre_hook(head.before)
    try:
        yield head
    finally:
        hook.remove()


def _shares_prompts(model: Any) -> bool:
    """Whether a prompt's cache can be handed to several rows: not of a recurrent state, nor while layers recompute or ranks go in step."""
    recomputes = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return not ranks.in_step() and not recomputes and not getattr(model, "_is_stateful", False)


def _places(model: Any, place: Tensor) -> dict[str, Tensor]:
    return {"position_ids": place} if takes(model, "position_ids") else {}


def _similar(lengths: list[int]) -> Iterator[list[int]]:
    """Rows in parts of similar length, the longest first; a part's first row is its longest; empty rows are left out. In one part
    where ranks go in step."""
    part: list[int] = []
    for row in sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i]):
        apart = part and lengths[row] < WASTE * lengths[part[0]] and len(part) * lengths[part[0]] >= ENOUGH
        if apart and not ranks.in_step():
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _flat(rows: list[int], wanted: Tensor, batch: Batch) -> Tensor:
    """Where the true entries of ``wanted`` (n, t) of these rows stand in the flattened (B, T)."""
    row, column = wanted.nonzero(as_tuple=True)
    return torch.tensor(rows, device=wanted.device)[row] * batch.mask.shape[1] + column


def scatter(values: Tensor, where: Tensor, mask: Tensor) -> Tensor:
    """(n, ...) values at flat positions ``where`` → (B, T, ...), 0 elsewhere."""
    out = values.new_zeros(mask.numel(), *values.shape[1:])
    return out.index_put((where,), values).view(*mask.shape, *values.shape[1:])


def _dealt(batch: Batch, budget: int) -> list[tuple[Batch, bool]]:
    """This rank's micro-batches, which know their rows' places: ``extra["row"]``; each with whether it counts."""
    index = torch.arange(len(batch), device=batch.mask.device)
    return ranks.dealt(ranks.split(batch.with_(extra={**batch.extra, "row": index}), budget))


def by_rows(batch: Batch, budget: int, function: Callable[[Batch], Tensor]) -> Tensor:
    """``function`` of micro-batches, (b, …) of b rows, put together in the batch's order: (B, …) float32, on the processor."""
    own = _dealt(batch, budget)

    def work() -> list[tuple[Tensor, Tensor]]:
        found = [(part.extra["row"].cpu(), function(part).float().cpu(), counts) for part, counts in own]
        return [(row, x) for row, x, counts in found if counts]

    rows, values = zip(*(one for share in ranks.each(work) for one in share), strict=True)
    found: Tensor = torch.cat(values)[torch.cat(rows).argsort()]
    return found


def by_parts(batch: Batch, budget: int, function: Any) -> Tensor:
    """``function`` of micro-batches, put together in the batch's order: (B, T) float32."""
    out = torch.zeros(batch.mask.shape, device=batch.mask.device)
    own = _dealt(batch, budget)
    with ranks.alone():
        for part, counts in own:
            found = function(part)
            if counts:
                out[part.extra["row"], : found.shape[1]] = found.to(out.dtype)
    return ranks.summed(out)  # each row is one rank's, and 0 with the others
