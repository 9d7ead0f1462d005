"""The model being aligned: it generates, and it scores responses token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from alignkit import engines, ops, ranks
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.critic import ValueModel
from alignkit.data import Row
from alignkit.decode import Decode, State, begin, decode
from alignkit.errors import UserError
from alignkit.loading import kind_of, read
from alignkit.reader import Reader
from alignkit.scoring import Piece, Seen, by_parts, scatter, teacher_forced

NLL_TOKENS = 4096  # that are measured together


class Policy(Reader):
    """A causal or encoder–decoder language model behind one interface."""

    def __init__(self, model: Any, tokenizer: Any, compute: torch.dtype = torch.float32) -> None:
        super().__init__(model, tokenizer, compute)
        self.critic: ValueModel | None = None
        self.engine: engines.Engine | None = None  # what draws in its place, within ``drawing``

    @contextmanager
    def drawing(self, engine: engines.Engine | None) -> Iterator[None]:
        """Let an engine draw in the policy's place; afterwards it rests. None: the policy itself."""
        self.engine = engine
        try:
            yield
        finally:
            self.engine = None
            if engine is not None:
                engine.rest()

    def judged(self, rows: list[Row], max_tokens: int | None = None, end: str | None = None) -> Batch:
        """Rows with one response that is desirable or not: ``extra["desirable"]`` (B,) bool; longer ones are cut."""
        batch = self.demonstrations(rows, max_tokens, end)
        desirable = torch.tensor([row["desirable"] for row in rows], device=self.device)
        return batch.with_(extra={**batch.extra, "desirable": desirable})

    def answered(self, batch: Batch, texts: list[str], max_tokens: int | None = None, end: str | None = None) -> Batch:
        """The prompts of a batch with other responses, a text for each row; longer ones are cut."""
        ids, mask = self._pad([one[:max_tokens] for one in self.encode_responses(texts, end)], "right")
        return Batch(batch.prompt_ids, batch.prompt_mask, ids, mask, batch.group, batch.rows, texts)

    def generate(
        self,
        rows: list[Row],
        n: int | list[int],
        how: Decode,
        *,
        temperature: Tensor | None = None,
        generator: torch.Generator | None = None,
        begun: list[str] | None = None,
    ) -> Batch:
        """Draw ``n`` responses to each row (or ``n[i]`` to row i); they form one group, adjacent.

        The batch carries the ``logprobs`` of the drawn tokens, and ``extra["entropy"]`` and ``extra["top"]`` where asked for.

        Args:
            begun: what each row's response begins with, which the model goes on from; it then counts as part of the prompt.

        Raises:
            UserError: no room for so many tokens, or ``begun`` for an encoder–decoder model or an engine.
        """
        counts = [n] * len(rows) if isinstance(n, int) else n
        if self.shards:
            self.shards.whole()
        if self.engine is not None:
            if begun is not None:
                raise UserError(
                    "engine: cannot go on from a text that a response begins with. Take engine=transformers."
                )
            return engines.sample(self, self.engine, rows, counts, how, temperature, generator)
        own = ranks.share(len(rows))
        if ranks.size() == 1:
            return self._draw(rows, counts, how, temperature, generator, begun, None)
        among = (sum(counts[: own.start]), sum(counts))
        part = slice(own.start, own.stop)
        tau = None if temperature is None else temperature[part]
        texts = None if begun is None else begun[part]
        if not len(own) and not how.greedy:  # the others draw these numbers too, so every generator goes on alike
            torch.rand(among[1], how.max_new_tokens, generator=generator)
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        work = partial(self._draw, rows[part], counts[part], how, tau, generator, texts, among)
        return self._together(work if len(own) else None, rows, owner)

    def _together(self, work: Callable[[], Batch] | None, rows: list[Row], owner: Tensor) -> Batch:
        """What ranks decode, some of them nothing, as one batch, of whose rows ``owner`` (B,) says to which of ``rows`` they belong."""
        shares = ranks.each(lambda: work().with_(rows=[]).to(torch.device("cpu")) if work else None)
        whole = Batch.stack([one for one in shares if one is not None], left=not self.is_encoder_decoder)
        return whole.to(self.device).with_(rows=[rows[i] for i in owner.tolist()], group=owner.to(self.device))

    def _draw(
        self,
        rows: list[Row],
        counts: list[int],
        how: Decode,
        temperature: Tensor | None,
        generator: torch.Generator | None,
        begun: list[str] | None,
        among: tuple[int, int] | None,
    ) -> Batch:
        encoded = self.encode_prompts(rows)
        if begun is not None:
            encoded = [[*one, *more] for one, more in zip(encoded, self._beginnings(begun), strict=True)]
        prompt_ids, prompt_mask = self._pad(encoded, "right" if self.is_encoder_decoder else "left")
        self.make_room(prompt_ids.shape[1], how.max_new_tokens)
        with self._evaluating(), torch.no_grad():
            out = self._computed(
                lambda: decode(
                    self._state(rows, begun, prompt_ids, prompt_mask), torch.tensor(counts, device=self.device), how,
                    eos=self.eos, pad=self.pad, temperature=temperature, generator=generator, among=among,
                )
            )  # fmt: skip
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        index = owner.to(self.device)
        return Batch(
            prompt_ids=prompt_ids[index],
            prompt_mask=prompt_mask[index],
            response_ids=out.ids,
            mask=out.mask,
            group=index,
            rows=[rows[i] for i in owner.tolist()],
            responses=self.decode_text(out.ids, out.mask),
            logprobs=out.logprobs,
            extra={"ended": self.ended(out.ids, out.mask)}
            | {name: x for name, x in (("entropy", out.entropy), ("top", out.top)) if x is not None},
        )

    def make_room(self, width: int, max_new_tokens: int) -> None:
        """Refuse more tokens than there are positions for, behind prompts of ``width`` tokens.

        Raises:
            UserError: says how many there are.
        """
        room = self.max_positions - (0 if self.is_encoder_decoder else width)
        if max_new_tokens > room:
            raise UserError(
                f"max_new_tokens={max_new_tokens} is more than the model's {self.max_positions} positions allow "
                f"(room here: {room}). Lower it, or shorten the prompts."
            )

    def _state(self, rows: list[Row], begun: list[str] | None, ids: Tensor, mask: Tensor) -> State:
        """The policy about to decode: of each row the prompt and what its response begins with, and both as ids (B, P)."""
        return begin(self.model, ids, mask, self._start)

    def _beginnings(self, texts: list[str]) -> list[list[int]]:
        if self.is_encoder_decoder:
            raise UserError(
                "an encoder–decoder model cannot go on from a text that it is given as its own: take a causal model."
            )
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return found

    def room(self, rows: list[Row], begun: list[str], max_new_tokens: int) -> list[bool]:
        """Whether the positions allow this many tokens behind each row's prompt and what its response begins with."""
        lengths = [len(a) + len(b) for a, b in zip(self.prompt_ids(rows), self._beginnings(begun), strict=True)]
        return [length + max_new_tokens <= self.max_positions for length in lengths]

    def tokens_of(self, marker: str) -> tuple[int, ...]:
        """The tokens of a heading as they stand within a text, without the line ends around it."""
        ids = self.tokenizer(f"x\n\n{marker}\n", add_special_tokens=False)["input_ids"]
        texts = [self.tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
        first = max(i for i, text in enumerate(texts) if not text.strip()[1:].strip())
        last = min(i for i, text in enumerate(texts) if marker in text)
        return tuple(ids[first:last])

    def forward(self, batch: Batch, temperature: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, T) float32 of the batch's response tokens, 0 where the mask is false.

        ``temperature`` (B,) divides the logits of each row first.
        """
        return self.score(batch, temperature)[0]

    def score(self, batch: Batch, temperature: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(log-probabilities (B, T), outputs (B, T, m) of a critic that shares the trunk, from the same pass)."""
        shared = self.critic is not None and self.critic.trunk is None
        forced = partial(teacher_forced, self.model, batch, self._start, hidden=shared)
        pieces = self._computed(lambda: list(forced()))
        logprobs = []
        for piece in pieces:
            assert piece.logits is not None
            tau = None if temperature is None else temperature[piece.where // batch.mask.shape[1]]
            logprobs.append(ops.token_logprobs(piece.logits, batch.response_ids.flatten()[piece.where], tau))
        where = torch.cat([piece.where for piece in pieces])
        raw = self._head_values(pieces, batch.mask) if shared else None
        return scatter(torch.cat(logprobs), where, batch.mask), raw

    @torch.no_grad()
    def nll(self, rows: list[Row]) -> list[tuple[float, int]]:
        """(nats, tokens) of each row's ``response``, its end included.

        Raises:
            UserError: a row without a response.
        """
        for row in rows:
            if row["response"] is None:
                raise UserError(
                    f"held-out row {row['id']} has no response, which evaluate.nll measures. Set data.response to a template over "
                    f"the columns."
                )
        batch = self.demonstrations(rows)
        with self._evaluating():
            nats = -by_parts(batch, NLL_TOKENS, self.forward).sum(1, dtype=torch.float64)
        return list(zip(nats.tolist(), batch.lengths.tolist(), strict=True))

    def value_outputs(self, batch: Batch) -> Tensor:
        """What the critic puts out before each token: (B, T, m), m = 1 or the bins of a histogram; 0 off the mask."""
        assert self.critic is not None
        trunk = self.model if self.critic.trunk is None else self.critic.trunk
        forced = partial(teacher_forced, trunk, batch, self._start, logits=False, hidden=True)
        return self._head_values(self._computed(lambda: list(forced()), trunk), batch.mask)

    def seen(self, batch: Batch, layers: Sequence[int] = ()) -> Seen:
        """Logits and hidden states *before* each response token that counts; of an encoder–decoder, the decoder's."""
        pieces = self._computed(lambda: list(teacher_forced(self.model, batch, self._start, layers=layers)))
        where = torch.cat([piece.where for piece in pieces])
        logits = torch.cat([piece.logits for piece in pieces if piece.logits is not None])
        states = [torch.cat(parts) for parts in zip(*(piece.states for piece in pieces), strict=True)]
        return Seen(
            logits[where.argsort()],
            {layer: scatter(x, where, batch.mask) for layer, x in zip(layers, states, strict=True)},
            batch.mask,
            first=False,
        )

    def _head_values(self, pieces: list[Piece], mask: Tensor) -> Tensor:
        assert self.critic is not None
        hidden = torch.cat([piece.hidden for piece in pieces if piece.hidden is not None])
        return scatter(
            self.critic.head(hidden.to(self.critic.head.weight.dtype)),
            torch.cat([piece.where for piece in pieces]),
            mask,
        )

    def beam(self, rows: list[Row], beams: int, max_new_tokens: int) -> Batch:
        """The best of a beam search for each row, by transformers' own search."""
        if self.shards:
            self.shards.whole()
        if ranks.size() == 1:
            return self._beam(rows, beams, max_new_tokens)
        own = ranks.share(len(rows))
        part = rows[own.start : own.stop]
        work = partial(self._beam, part, beams, max_new_tokens)
        return self._together(work if part else None, rows, torch.arange(len(rows)))

    def _beam(self, rows: list[Row], beams: int, max_new_tokens: int) -> Batch:
        prompt_ids, prompt_mask = self._pad(self.encode_prompts(rows), "right" if self.is_encoder_decoder else "left")
        with self._evaluating():
            out = self.model.generate(
                input_ids=prompt_ids, attention_mask=prompt_mask.long(), num_beams=beams, do_sample=False,
                max_new_tokens=max_new_tokens + max(0, len(self._start) - 1),
                pad_token_id=self.pad, eos_token_id=self.eos,
            )  # fmt: skip
        ids = out[:, len(self._start) if self.is_encoder_decoder else prompt_ids.shape[1] :]
        ended = torch.isin(ids, torch.tensor(self.eos, device=ids.device)).long()
        mask = ended.cumsum(1) - ended == 0  # up to and with the first end-of-sequence token
        group = torch.arange(len(rows), device=self.device)
        batch = Batch(prompt_ids, prompt_mask, ids, mask, group, rows, self.decode_text(ids, mask))
        return batch.with_(extra={"ended": self.ended(ids, mask)})

    def train(self, mode: bool) -> None:
        """Training or evaluation mode, of a critic's own trunk too."""
        self.model.train(mode)
        if self.critic is not None:
            self.critic.train(mode)


def reference(policy: Policy, cfg: Model, seed: int, texts: list[str], budget: int) -> Callable[[Batch], Tensor]:
    """What gives the start model's log-probabilities (B, T) of a batch, without a graph.

    With adapters the start model is the policy's own with the adapter off; else it is loaded a second time.
    """
    if cfg.lora.r:

        def start(part: Batch) -> Tensor:
            with policy.model.disable_adapter():
                return policy.forward(part, part.extra.get("logprob_temperature"))
    else:
        frozen = load(cfg, seed, texts)
        frozen.model.requires_grad_(False)

        def start(part: Batch) -> Tensor:
            return frozen.forward(part, part.extra.get("logprob_temperature"))

    return torch.no_grad()(lambda batch: by_parts(batch, budget, start))


def load(cfg: Model, seed: int, texts: list[str] = (), checkpoint: Path | None = None) -> Policy:  # type: ignore[assignment]
    """The policy that ``cfg`` describes, steered where it says so, with the weights of ``checkpoint`` where a run goes on.

    Args:
        texts: what a tokenizer is trained on, where the model is built from scratch.

    Raises:
        UserError: what ``loading.read`` refuses, a model that does not generate, no end-of-sequence token, a value model that
            does not fit.
    """
    model, tokenizer, compute = read(cfg, seed, texts, checkpoint, _auto, _task)
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so a response could never end. Set eos_token in it."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy = Policy(model, tokenizer, compute)
    for found in policy.lint():
        print(f"warning: {found}", file=sys.stderr)
    if cfg.steer.value is None:
        return policy
    from alignkit.steering import steer  # which is made of policies

    return steer(policy, cfg, seed)


def _auto(config: Any) -> Any:
    kind = kind_of(config)
    if kind == "encoder":
        raise UserError(
            f"model: {config.model_type} is an encoder, which writes no text: it can be a reward model alone."
        )
    return AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM


def _task(config: Any) -> str:
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
