"""What reads prompts and responses, whatever its head: tokens and padding, precision, dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from alignkit import ranks
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import UserError
from alignkit.loading import kind_of

T = TypeVar("T")
FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "xmod",
    "data2vec-text",
    "mpnet",
)


class Reader:
    """A transformers model with its tokenizer: the common part of a policy, a classifier and a reward model."""

    critic: Any = None  # a policy may have one
    beside: torch.nn.Module | None = None  # trained with the model, saved in checkpoints, no part of the model
    shards: Any = None  # of a model whose layers several ranks share: ``sharding.Shards``

    def __init__(self, model: Any, tokenizer: Any, compute: torch.dtype = torch.float32) -> None:
        self.model = model
        self.compute = compute  # precision of the forward and backward pass
        self.tokenizer = tokenizer
        self.kind = kind_of(model.config)
        self.is_encoder_decoder = self.kind == "seq2seq"
        self.eos = _eos_ids(model, tokenizer)
        self.pad = tokenizer.pad_token_id
        self._start: list[int] = []  # of the decoder
        if self.is_encoder_decoder:
            self._start = [model.config.decoder_start_token_id]
            forced = getattr(getattr(model, "generation_config", None), "forced_bos_token_id", None)
            if forced is not None:
                self._start.append(forced)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_positions(self) -> int:
        """Tokens that the positions allow; large when the architecture sets no limit."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or getattr(
            self.model.config, "n_positions", None
        )
        relative = self.model.config.model_type in ("t5", "mt5", "umt5", "longt5")
        # RoBERTa and its kin count positions from the one after the padding token's id, which MPNet takes for 1
        offset = max(self.model.config.pad_token_id, 1) + 1 if self.model.config.model_type in FROM_PADDING else 0
        return 10**9 if relative or not limit else int(limit) - offset

    @property
    def depth(self) -> int:
        """Layers; of an encoder–decoder, of its decoder."""
        config = self.model.config
        names = ("decoder_layers", "num_decoder_layers") if self.is_encoder_decoder else ()
        return int(next((n for name in names if (n := getattr(config, name, None))), config.num_hidden_layers))

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(getattr(self.model.config, "hidden_size", None) or self.model.config.d_model)

    def encode_prompts(self, rows: list[Row]) -> list[list[int]]:
        """``prompt_ids``, within the model's positions.

        Raises:
            UserError: a prompt is longer.
        """
        ids = self.prompt_ids(rows)
        for row, one in zip(rows, ids, strict=True):
            if len(one) > self.max_positions:
                raise UserError(
                    f"the prompt of row {row['id']} has {len(one)} tokens; the model takes {self.max_positions}: "
                    f"{str(row['prompt'])[:60]!r}… Shorten or drop such rows."
                )
        return ids

    def prompt_ids(self, rows: list[Row]) -> list[list[int]]:
        """Token ids of each row's prompt; chat messages go through the tokenizer's own template.

        Raises:
            UserError: a chat without a chat template.
        """
        texts = [row["prompt"] for row in rows]
        plain = [t for t in texts if isinstance(t, str)]
        encoded = iter(self.tokenizer(plain)["input_ids"] if plain else [])
        ids = []
        for text in texts:
            if isinstance(text, str):
                one = next(encoded)
                if self.kind == "causal":
                    if one and one[-1] in self.eos:
                        one = one[:-1]  # some tokenizers close every text; a causal prompt must stay open
                    if not one:  # a causal model needs a token to start from
                        one = [self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eos[0]]
            else:
                if not self.tokenizer.chat_template:
                    raise UserError(
                        "the data are chat messages, but the tokenizer has no chat template. Use an instruct model, "
                        "or render the prompt as text with data.prompt."
                    )
                one = self.tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
            ids.append(one)
        return ids

    def encode_responses(self, texts: list[str], end: str | None = None) -> list[list[int]]:
        """Token ids of each text, closed with the end-of-sequence token, or with the text ``end`` in its place."""
        if end is not None:
            closed = self.encode_responses([text + end for text in texts])
            return [ids[:-1] if ids[-1] in self.eos else ids for ids in closed]
        if self.is_encoder_decoder:
            encoded = self.tokenizer(text_target=texts, split_special_tokens=True)["input_ids"]
            # what the decoder is given as its prefix is not part of the response
            skip = len(self._start) - 1
            encoded = [ids[skip:] if skip and ids[:skip] == self._start[1:] else ids for ids in encoded]
        else:
            encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [ids if ids and ids[-1] in self.eos else [*ids, self.eos[0]] for ids in encoded]

    def decode_text(self, ids: Tensor, mask: Tensor) -> list[str]:
        """(B, T) ids → B texts without special tokens."""
        kept = [row[: int(m.sum())].tolist() for row, m in zip(ids, mask, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]

    def demonstrations(self, rows: list[Row], max_tokens: int | None = None, end: str | None = None) -> Batch:
        """Rows with their ``response`` as the response, one group each; longer responses are cut.

        Args:
            end: text that closes a response in place of the end-of-sequence token.

        Raises:
            UserError: a row without a response.
        """
        for row in rows:
            if row["response"] is None:
                raise UserError(
                    f"training row {row['id']} has no response. Set data.response to a template over the columns."
                )
        responses = self.encode_responses([row["response"] for row in rows], end)
        return self._batch(rows, [ids[:max_tokens] for ids in responses])

    def pairs(self, rows: list[Row], max_tokens: int | None = None, end: str | None = None) -> Batch:
        """Rows with a ``chosen`` and a ``rejected`` response: two rows a group, the chosen one first; longer ones are cut."""
        both = [{**row, "response": row[side]} for row in rows for side in ("chosen", "rejected")]
        batch = self.demonstrations(both, max_tokens, end)
        return batch.with_(group=batch.group // 2, rows=[row for row in rows for _ in range(2)])

    def ended(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) bool: whether each row's last token that counts is an end-of-sequence token."""
        return (torch.isin(ids, torch.tensor(self.eos, device=ids.device)) & mask).any(1)

    def _computed(self, work: Callable[[], T], model: Any = None) -> T:
        """``work()`` with the model's weights in ``compute`` precision; gradients reach the float32 weights.

        The cast stands in the graph, so that gradients of micro-batches add up in float32.
        """
        ranks.watch()
        model = self.model if model is None else model
        if self.compute == next(model.parameters()).dtype:
            return work()
        learning = torch.is_grad_enabled() and model.training
        by_layer = tuple(
            f"model.{name}."
            for name, module in model.named_modules()
            if getattr(module, "casts", False) and (learning or self._is_apart(module))
        )
        cast = {name: x for name, x in _weights(model) if not by_layer or not name.startswith(by_layer)}
        cast = {name: x.to(self.compute) for name, x in cast.items()}
        result: T = torch.func.functional_call(_Swapped(model), cast, (work,))
        return result

    def _is_apart(self, layer: Any) -> bool:
        return self.shards is not None and self.shards.is_apart(next(layer.parameters()))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def drop_dropout(self) -> None:
        """Make training mode equal to evaluation mode: RL samples and scores one and the same distribution."""
        for module in self.model.modules():
            for name, value in vars(module).items():
                if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                    setattr(module, name, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def restore(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint of this very model in place."""
        source = type(self.model).from_pretrained(checkpoint) if not hasattr(self.model, "peft_config") else None
        if source is not None:
            self.model.load_state_dict(source.state_dict())
        else:
            training = self.model.training
            self.model.load_adapter(checkpoint, adapter_name="default", is_trainable=True)
            self.model.train(training)

    def save(self, path: Path) -> None:
        """Write a plain ``save_pretrained`` folder; of adapters alone, where only these are trained."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def export(self, path: Path) -> None:
        """Write the whole model as a plain ``save_pretrained`` folder, adapters merged into it."""
        if hasattr(self.model, "merge_and_unload"):
            self.model = self.model.merge_and_unload()
        self.save(path)

    def lint(self) -> list[str]:
        """What is wrong with the special tokens, as sentences: an empty list when nothing is."""
        found = []
        if self.pad in self.eos:
            found.append(
                "pad_token is eos_token: the end of a response cannot be told from padding by its id. alignkit masks by "
                "position, but other tools may train a model that never stops; give the tokenizer a pad token of its own."
            )
        return found

    def _batch(self, rows: list[Row], responses: list[list[int]]) -> Batch:
        prompt_ids, prompt_mask = self._pad(self.encode_prompts(rows), "right" if self.is_encoder_decoder else "left")
        ids, mask = self._pad(responses, "right")
        return Batch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=ids,
            mask=mask,
            group=torch.arange(len(rows), device=self.device),
            rows=rows,
            responses=[row["response"] for row in rows],
            extra={"ended": self.ended(ids, mask)},
        )

    def _pad(self, sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        width = max(len(s) for s in sequences)
        ids, mask = [], []
        for s in sequences:
            fill = [self.pad] * (width - len(s))
            ids.append(fill + s if side == "left" else s + fill)
            ones, zeros = [True] * len(s), [False] * len(fill)
            mask.append(zeros + ones if side == "left" else ones + zeros)
        return torch.tensor(ids, dtype=torch.long, device=self.device), torch.tensor(mask, device=self.device)


def layers_of(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """The layers of some models, as transformers tells them."""
    return [m for module in modules for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]


def compute_in(layer: Any, compute: torch.dtype) -> None:
    """Have a layer cast its own weights in each of its passes, also in the one that computes it anew for the backward pass, when no
    cast of the whole model is in place. Weights that are cast already it takes as they are."""

    def computed(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        cast = {name: x.to(compute) for name, x in _weights(layer) if x.dtype != compute}
        if not cast:
            return function(*args, **kwargs)
        result: T = torch.func.functional_call(_Swapped(layer), cast, (lambda: function(*args, **kwargs),))
        return result

    if next(layer.parameters()).dtype == compute or getattr(layer, "casts", False):
        return
    layer.casts = True
    layer.forward = functools.wraps(layer.forward)(functools.partial(computed, layer.forward))
    if layer.gradient_checkpointing:
        anew = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda function, *args: anew(functools.partial(computed, function), *args)


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What is cast, by its name in ``_Swapped``: weights and buffers, but the rotary angles, which need float32."""
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.is_floating_point() and not name.endswith("inv_freq"):
            yield f"model.{name}", x


class _Swapped(torch.nn.Module):
    """Lets ``functional_call`` put other weights into a model while some work is done with it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end-of-sequence id first, then what the generation config adds."""
    generation = getattr(model, "generation_config", None)
    extra = generation.eos_token_id if generation else None
    own = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id  # an encoder's
    ids = [own, *(extra if isinstance(extra, list) else [extra])]
    return list(dict.fromkeys(i for i in ids if i is not None))
