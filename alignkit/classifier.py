"""A sequence classifier: it reads a row's prompt and says which of its labels the response is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.data import Row
from alignkit.errors import UserError, suggest
from alignkit.loading import kind_of, read
from alignkit.reader import Reader
from alignkit.scoring import Seen, by_rows

CHUNK = 512  # rows that are tokenized at a time


class Classifier(Reader):
    """An ``AutoModelForSequenceClassification`` behind the interface of a policy's supervised half.

    In its batches a response is one token, the label's index, so that a loss a position is a loss a row.
    """

    def __init__(
        self, model: Any, tokenizer: Any, compute: torch.dtype = torch.float32, max_tokens: int | None = None
    ) -> None:
        super().__init__(model, tokenizer, compute)
        kept = int(min(tokenizer.model_max_length, self.max_positions))  # as the model was saved
        self.limit = min(max_tokens or kept, self.max_positions)  # tokens of a text that are read
        config = model.config
        self.labels = [str(config.id2label[i]) for i in range(config.num_labels)]

    def demonstrations(self, rows: list[Row], max_tokens: int | None = None, end: str | None = None) -> Batch:
        """Rows with the index of their ``response`` among the labels as the one token of the response, (B, 1).

        Raises:
            UserError: a row whose response is none of the labels.
        """
        prompt_ids, prompt_mask = self._pad([self._cut(ids) for ids in self.prompt_ids(rows)], "right")
        labels = torch.tensor([[self._index(row)] for row in rows], device=self.device)
        mask = torch.ones_like(labels, dtype=torch.bool)
        group = torch.arange(len(rows), device=self.device)
        return Batch(prompt_ids, prompt_mask, labels, mask, group, rows, [row["response"] for row in rows])

    def save(self, path: Path) -> None:
        """Write a plain ``AutoModelForSequenceClassification`` folder, whose tokenizer knows how much of a text is read."""
        self.tokenizer.model_max_length = self.limit
        super().save(path)

    def seen(self, batch: Batch, layers: Sequence[int] = ()) -> Seen:
        """Logits (B, C) and hidden states of every token of the text."""
        out = self._computed(
            lambda: self.model(
                input_ids=batch.prompt_ids,
                attention_mask=batch.prompt_mask.long(),
                output_hidden_states=bool(layers),
            )
        )
        kept = batch.prompt_mask[..., None]
        states = {layer: out.hidden_states[layer] * kept for layer in layers}
        return Seen(out.logits, states, batch.prompt_mask, first=self.kind == "encoder")

    @torch.no_grad()
    def logits(self, rows: list[Row], budget: int = 16384) -> Tensor:
        """(N, C) float32 of the rows' texts, on the processor."""
        found: list[Tensor] = []
        with self._evaluating():
            for first in range(0, len(rows), CHUNK):
                batch = self.demonstrations(rows[first : first + CHUNK])
                found.append(by_rows(batch, budget, lambda part: self.seen(part).logits))
        return torch.cat(found)

    def too_long(self, rows: list[Row]) -> int:
        """How many rows have a text of more tokens than are read."""
        return sum(len(ids) > self.limit for ids in self.prompt_ids(rows))

    def _cut(self, ids: list[int]) -> list[int]:
        """Within the limit: cut at the end, before a closing special token."""
        if len(ids) <= self.limit:
            return ids
        last = ids[-1:] if ids[-1] in self.tokenizer.all_special_ids else []
        return ids[: self.limit - len(last)] + last

    def know_labels(self, rows: list[Row], split: str) -> None:
        """Raise the error of ``demonstrations`` before any of these rows is read.

        Args:
            split: whose rows they are, for the message.
        """
        for row in rows:
            self._index(row, f"{split} ")

    def _index(self, row: Row, split: str = "") -> int:
        label = row["response"]
        if label not in self.labels:
            raise UserError(
                f"{split}row {row['id']}: the response {label!r} is none of the model's {len(self.labels)} labels."
                f"{suggest(str(label), self.labels)} Labels are the different responses of the training rows (data.response)."
            )
        return self.labels.index(label)


def labels_of(rows: list[Row]) -> list[str]:
    """The different responses of the training rows, in order of the alphabet.

    Raises:
        UserError: a row without a response, fewer than two labels, or nearly as many labels as rows.
    """
    missing = next((row for row in rows if row["response"] is None), None)
    if missing is not None:
        raise UserError(
            f"training row {missing['id']} has no label. Set data.response to the column that holds it, as in "
            f"'data.response=\"{{label}}\"'."
        )
    found = sorted({row["response"] for row in rows})
    if len(found) < 2:
        raise UserError(f"every training row has the label {found[0]!r}: there is nothing to tell apart.")
    if len(found) > 20 and len(found) > len(rows) / 2:
        raise UserError(
            f"the {len(rows)} training rows have {len(found)} different responses, so these are hardly labels. A classifier's "
            f"data have few (data=brackets); to train a model that writes, set algo.task=write."
        )
    return found


def load(
    cfg: Model,
    seed: int,
    texts: Sequence[str] = (),
    labels: list[str] | None = None,
    checkpoint: Path | None = None,
    max_tokens: int | None = None,
) -> Classifier:
    """The classifier that ``cfg`` describes, with the weights of ``checkpoint`` where a run goes on.

    Args:
        labels: of a classifier to be trained, whose head is drawn from ``seed`` where the path has none that fits; None: the
            path's own.

    Raises:
        UserError: what ``loading.read`` refuses, an encoder–decoder model, a path that is no classifier where one must be.
    """

    others: list[bool] = []  # whether the path's head has learned other labels

    def auto(config: Any) -> Any:
        if kind_of(config) == "seq2seq":
            raise UserError(
                f"model: {config.model_type} is an encoder–decoder model; a classifier is an encoder or a causal model."
            )
        if labels is not None:
            classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
            own = [config.id2label.get(i) for i in range(config.num_labels)] if classifies else []
            if sorted(map(str, own)) == sorted(labels):  # the same ones: their order stays the path's
                return AutoModelForSequenceClassification
            others.append(classifies)
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        return AutoModelForSequenceClassification

    def prepare(model: Any, tokenizer: Any) -> None:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        if others and others[0]:
            torch.manual_seed(seed)
            _draw_head(model, heads)
        opening = tokenizer("x")["input_ids"][0] in tokenizer.all_special_ids
        if kind_of(model.config) == "encoder" and not opening and tokenizer.bos_token_id is not None:
            # of a tokenizer trained here: an encoder's first token is one of its own, as BERT's [CLS]
            bos, eos = tokenizer.bos_token, tokenizer.eos_token
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
            )

    heads = ("classifier.", "score.", "pre_classifier.", "vocab_transform.")
    fresh = () if labels is None else heads
    torch.manual_seed(seed)  # of a new head on a backbone that is loaded
    model, tokenizer, compute = read(
        cfg, seed, list(texts), checkpoint, auto, lambda config: "SEQ_CLS", prepare, fresh=fresh
    )
    return Classifier(model, tokenizer, compute, max_tokens)


def _draw_head(model: Any, names: tuple[str, ...]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.".startswith(names):
            torch.nn.init.normal_(module.weight, std=getattr(model.config, "initializer_range", 0.02))
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
