"""A frozen language model and another one that adds to its logits: z = b + scale (v - m).

Inverse value learning (arXiv 2410.21027) trains v, a value model, on a small base and puts it beside larger ones; proxy tuning
has an expert for v and the model that it was trained from for m.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.utils import cached_file

from alignkit import ops
from alignkit.batch import Batch
from alignkit.config import Lora, Model, Steer
from alignkit.data import Row
from alignkit.decode import Prompted, State, begin, positions, takes
from alignkit.errors import UserError
from alignkit.loading import resolve
from alignkit.policy import Policy, load
from alignkit.scoring import Piece, scatter, teacher_forced
from alignkit.vocabulary import VocabularyMap

FILE = "value.json"
AT_ONCE = 64  # texts that a value model with a vocabulary of its own reads together


@dataclass(kw_only=True)
class Trained:
    """How a value model was trained: what ``value.json`` beside its weights holds. A plain model has the defaults.

    Of the connections (arXiv 2410.21027) the value model reads, with its embeddings E,

    ``residual``      the text, as the base does;
    ``cascade``       at each position softmax(b) E, what the base expects;
    ``cascade_plus``  that and E of the token that is there.
    """

    connection: Literal["residual", "cascade", "cascade_plus"] = "residual"
    norm: str = "none"
    norm_coef: float = 1.0
    norm_over: str = "labels"
    base: str | None = None  # that it was trained on


class Reading(NamedTuple):
    """What the models put out before each of n response tokens, by position."""

    where: Tensor  # (n,) int64 positions in the flattened (B, T)
    base: Tensor  # (n, V), without a graph
    value: Tensor  # (n, V_value)
    minus: Tensor | None  # (n, V_value), without a graph
    everywhere: Tensor | None  # (N, V_value) of the value model, at every token of prompts and responses


class Steered(Policy):
    """A frozen policy, ``base``, whose next-token logits a value model adds to. ``model`` is the value model, which alone is
    trained and saved; the tokenizer is the base's.

    What a vocabulary has beyond the other's is left as the base has it. With a ``map`` the value model reads each text cut by
    its own tokenizer, prompts by its own template; as the paper's code for this was not released, that is ours. Each token then costs
    a pass over the whole text, without a cache: n tokens of a response cost n such passes, to write or to score.

    Raises:
        UserError: models of different kinds or vocabularies, a connection that these models do not have.
    """

    def __init__(
        self,
        base: Policy,
        value: Policy,
        trained: Trained,
        minus: Policy | None = None,
        scale: float = 1.0,
        map: VocabularyMap | None = None,
        names: tuple[str, str, str] = ("the base", "the value model", "minus"),
    ) -> None:
        """``names``: of base, value and minus, for messages."""
        super().__init__(base.model, base.tokenizer, base.compute)
        self.base, self.value, self.minus = base, value, minus
        self.model, self.compute = value.model, value.compute
        self.trained, self.scale, self.map = trained, scale, map
        for one, name in ((value, names[1]), *(((minus, names[2]),) if minus else ())):
            if one.kind != base.kind:
                raise UserError(f"{name} is a {one.kind} model, {names[0]} a {base.kind} one: no logits to add.")
            if map is None:
                _same_vocabulary(base, one, names[0], name)
        plain = base.kind == "causal" and minus is None
        if self.cascades and not (plain and map is None and takes(self.model, "inputs_embeds")):
            raise UserError(
                f"{names[1]}: connection={trained.connection} needs causal models of one vocabulary, without minus or map; "
                f"residual takes the others."
            )
        if map is not None:
            if not plain:
                raise UserError("model.steer.map: is for causal models, without minus.")
            if (len(map.column), map.width) != (len(base.tokenizer), len(value.tokenizer)):
                raise UserError(
                    f"model.steer.map: leads from {map.width} tokens to {len(map.column)}, but {names[1]} has "
                    f"{len(value.tokenizer)} and {names[0]} {len(base.tokenizer)}. Make it anew with scripts/map_vocabulary.py."
                )
            self.map = VocabularyMap(map.column.to(self.device), map.weight.to(self.device), map.width)
        for frozen in self._frozen:
            frozen.model.requires_grad_(False)
            frozen.model.eval()

    @property
    def cascades(self) -> bool:
        return self.trained.connection != "residual"

    @property
    def _frozen(self) -> list[Policy]:
        return [self.base, *([self.minus] if self.minus else [])]

    @property
    def max_positions(self) -> int:
        """Tokens that the positions of all models allow; a map's are counted where its texts are cut."""
        parts = [*self._frozen, *([] if self.map else [self.value])]
        return min(one.max_positions for one in parts)

    def combined(self, base: Tensor, value: Tensor, minus: Tensor | None = None) -> Tensor:
        """z (..., V) float32 of logits base (..., V), value and minus (..., V_value)."""
        v = value.float()
        if minus is not None:
            width = min(v.shape[-1], minus.shape[-1])
            v = v[..., :width] - minus[..., :width].float()
        v = v if self.map is None else self.map(v)
        v, more = self.scale * v[..., : base.shape[-1]], base.shape[-1] - v.shape[-1]
        return base.float() + (torch.nn.functional.pad(v, (0, more)) if more > 0 else v)

    def expected(self, base: Tensor, ids: Tensor) -> Tensor:
        """What the value model of a cascade reads: logits (B, L, V) and ids (B, L) → (B, L, H)."""
        embed = self.model.get_input_embeddings()
        width = min(embed.weight.shape[0], base.shape[-1])
        weight = embed.weight[:width] * getattr(embed, "embed_scale", 1.0)  # as its own forward scales it
        states = base[..., :width].float().softmax(-1).to(weight.dtype) @ weight
        return states + embed(ids) if self.trained.connection == "cascade_plus" else states

    def read(self, batch: Batch, everywhere: bool = False) -> Reading:
        """What the models put out before the batch's response tokens; gradients reach the value model alone.

        A cascade, and ``everywhere``, read each row's prompt and response whole, and put all their logits out.
        """
        return self._computed(lambda: self._read(batch, everywhere))

    def _read(self, batch: Batch, everywhere: bool) -> Reading:
        if self.cascades or everywhere:
            return self._read_whole(batch, everywhere)
        with torch.no_grad():
            where, base = _by_position(teacher_forced(self.base.model, batch, self._start))
            minus = _by_position(teacher_forced(self.minus.model, batch, self._start))[1] if self.minus else None
        if self.map is None:
            value = _by_position(teacher_forced(self.model, batch, self._start))[1]
        else:
            value = self._read_anew(batch)
        return Reading(where, base, value, minus, None)

    def _read_whole(self, batch: Batch, everywhere: bool) -> Reading:
        ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
        seen = torch.cat([batch.prompt_mask, batch.mask], dim=1)

        def logits(model: Any, **inputs: Tensor) -> Tensor:
            place = {"position_ids": positions(seen)} if takes(model, "position_ids") else {}
            out: Tensor = model(attention_mask=seen.long(), use_cache=False, **inputs, **place).logits
            return out

        before = slice(batch.prompt_ids.shape[1] - 1, -1)
        with torch.no_grad():
            base = logits(self.base.model, input_ids=ids)
            minus = logits(self.minus.model, input_ids=ids)[:, before][batch.mask] if self.minus else None
        inputs = {"inputs_embeds": self.expected(base, ids)} if self.cascades else {"input_ids": ids}
        value = logits(self.model, **inputs)
        where = batch.mask.flatten().nonzero()[:, 0]
        every = value[seen] if everywhere else None
        return Reading(where, base[:, before][batch.mask], value[:, before][batch.mask], minus, every)

    def _read_anew(self, batch: Batch) -> Tensor:
        """(n, V_value): of every token the text before it, cut anew."""
        prompts = self.value.encode_prompts(batch.rows)
        said = [(i, ids[:t]) for i, ids in enumerate(_rows(batch.response_ids, batch.mask)) for t in range(len(ids))]
        parts = [said[i : i + AT_ONCE] for i in range(0, len(said), AT_ONCE)]
        return torch.cat([self.retold([prompts[i] for i, _ in part], [ids for _, ids in part]) for part in parts])

    @torch.no_grad()
    def retold(self, prompts: list[list[int]], said: list[list[int]]) -> Tensor:
        """Logits (R, V_value) of the value model behind prompts, in its tokens, and what was said since, in the base's.

        Raises:
            UserError: a text is longer than its positions allow.
        """
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        more = self.value.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [[*a, *b] for a, b in zip(prompts, more, strict=True)]
        if (longest := max(map(len, ids))) > self.value.max_positions:
            raise UserError(
                f"model.steer.value: its tokenizer makes {longest} tokens of a text; its positions allow "
                f"{self.value.max_positions}. Shorten the prompts, or lower max_new_tokens."
            )
        return begin(self.model, *self.value._pad(ids, "left"), []).first()

    def score(self, batch: Batch, temperature: Tensor | None = None) -> tuple[Tensor, None]:
        """(log-probabilities (B, T) under z, None: there is no critic)."""
        return self.logprobs(batch, self.read(batch), temperature), None

    def logprobs(self, batch: Batch, read: Reading, temperature: Tensor | None = None) -> Tensor:
        """(B, T) under z of the batch's response tokens, 0 where the mask is false."""
        z = self.combined(read.base, read.value, read.minus)
        tau = None if temperature is None else temperature[read.where // batch.mask.shape[1]]
        found = ops.token_logprobs(z, batch.response_ids.flatten()[read.where], tau)
        return scatter(found, read.where, batch.mask)

    def _state(self, rows: list[Row], begun: list[str] | None, ids: Tensor, mask: Tensor) -> State:
        base = begin(self.base.model, ids, mask, self._start)
        if self.map is not None:
            prompts = self.value.encode_prompts(rows)
            if begun is not None:
                prompts = [[*a, *b] for a, b in zip(prompts, self.value._beginnings(begun), strict=True)]
            return _Steered(self, ids, base, _Retold(self, prompts), None)
        value = begin(self.model, ids, mask, self._start)
        minus = begin(self.minus.model, ids, mask, self._start) if self.minus else None
        return _Steered(self, ids, base, value, minus)

    def beam(self, rows: list[Row], beams: int, max_new_tokens: int) -> Batch:
        """Not of several models.

        Raises:
            UserError: always.
        """
        raise UserError(
            "evaluate.decode=beam: a steered model is several, which the beam search does not run. Take greedy or sample."
        )

    def save(self, path: Path) -> None:
        """Write the value model alone: a plain ``save_pretrained`` folder and ``value.json``."""
        self.model.save_pretrained(path)
        self.value.tokenizer.save_pretrained(path)
        (path / FILE).write_text(json.dumps(asdict(self.trained), indent=2) + "\n", encoding="utf-8")

    def _computed(self, work: Any, model: Any = None) -> Any:
        for frozen in self._frozen:
            work = partial(frozen._computed, work)
        return super()._computed(work, model)


class _Steered:
    """Several models in the middle of decoding, each with a cache of its own."""

    def __init__(self, policy: Steered, ids: Tensor, base: State, value: State, minus: State | None) -> None:
        self.policy, self.ids, self.base, self.value, self.minus = policy, ids, base, value, minus
        self.states = [one for one in (base, value, minus) if one is not None]

    def expect(self, steps: int) -> None:
        for state in self.states:
            state.expect(steps)

    def select(self, keep: Tensor) -> None:
        for state in self.states:
            state.select(keep)

    def first(self) -> Tensor:
        if not self.policy.cascades:
            return self.policy.combined(*(state.first() for state in self.states))
        assert isinstance(self.base, Prompted) and isinstance(self.value, Prompted)
        base = self.base.read(input_ids=self.ids)
        value = self.value.read(inputs_embeds=self.policy.expected(base, self.ids), logits_to_keep=1)
        return self.policy.combined(base[:, -1], value[:, -1])

    def next(self, token: Tensor) -> Tensor:
        if not self.policy.cascades:
            return self.policy.combined(*(state.next(token) for state in self.states))
        assert isinstance(self.value, Prompted)
        base = self.base.next(token)
        value = self.value.go_on(inputs_embeds=self.policy.expected(base[:, None], token[:, None]))
        return self.policy.combined(base, value)


class _Retold:
    """A value model with a vocabulary of its own in the middle of decoding: it holds texts, and no cache."""

    def __init__(self, policy: Steered, prompts: list[list[int]]) -> None:
        self.policy, self.prompts = policy, prompts
        self.said: list[list[int]] = [[] for _ in prompts]

    def expect(self, steps: int) -> None: ...

    def first(self) -> Tensor:
        return self.policy.retold(self.prompts, self.said)

    def select(self, keep: Tensor) -> None:
        self.prompts, self.said = ([held[i] for i in keep.tolist()] for held in (self.prompts, self.said))

    def next(self, token: Tensor) -> Tensor:
        self.said = [[*ids, one] for ids, one in zip(self.said, token.tolist(), strict=True)]
        return self.first()


def steer(base: Policy, cfg: Model, seed: int) -> Steered:
    """``base``, which ``cfg`` describes, steered as its ``steer`` says.

    Raises:
        UserError: what ``Steered`` refuses, or one of the models cannot be loaded.
    """
    how = cfg.steer
    assert how.value is not None
    value = part(how.value, "model.steer.value", cfg, seed)
    minus = part(how.minus, "model.steer.minus", cfg, seed) if how.minus else None
    names = (f"model.path={cfg.path}", f"model.steer.value={how.value}", f"model.steer.minus={how.minus}")
    mapped = VocabularyMap.load(how.map) if how.map else None
    return Steered(base, value, trained_as(how.value), minus, how.scale, mapped, names)


def part(path: str, setting: str, cfg: Model, seed: int) -> Policy:
    """A model beside the one of ``cfg``, on its device and in its precision.

    Raises:
        UserError: it cannot be loaded; names ``setting``.
    """
    beside = replace(
        cfg, path=path, config=None, tokenizer=None, lora=Lora(), steer=Steer(), gradient_checkpointing=False
    )
    try:
        return load(beside, seed)
    except UserError as e:
        raise UserError(str(e).replace(f"model.path={path}", f"{setting}={path}")) from None


def trained_as(path: str) -> Trained:
    """What ``value.json`` beside a model's weights says; the defaults, where there is none.

    Raises:
        UserError: it cannot be read.
    """
    folder = resolve(path)
    file = Path(folder) / FILE
    if not Path(folder).is_dir():  # a hub id
        found = cached_file(folder, FILE, _raise_exceptions_for_missing_entries=False)
        file = file if found is None else Path(found)
    if not file.is_file():
        return Trained()
    try:
        return Trained(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise UserError(f"{file}: does not say how a value model was trained ({e}).") from None


def _same_vocabulary(base: Policy, other: Policy, name: str, of: str) -> None:
    one, two = base.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if one == two:
        return
    odd = min(one.items() ^ two.items(), key=lambda item: (item[1], item[0]))
    raise UserError(
        f"{name} and {of} have different vocabularies ({len(one)} and {len(two)} tokens; the first that differs: "
        f"{odd[0]!r}, {odd[1]}), so their logits cannot be added. Take models with one tokenizer; a trained value model may have "
        f"another one with model.steer.map, which scripts/map_vocabulary.py makes."
    )


def _by_position(pieces: Any) -> tuple[Tensor, Tensor]:
    """(where (n,), logits (n, V)), in order of position: models may be read in other pieces."""
    read: list[Piece] = list(pieces)
    where = torch.cat([piece.where for piece in read])
    logits = torch.cat([piece.logits for piece in read if piece.logits is not None])
    order = where.argsort()
    return where[order], logits[order]


def _rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[: int(n)].tolist() for row, n in zip(ids, mask.sum(1), strict=True)]
