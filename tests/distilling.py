"""Small classifiers, teachers and labelled texts for the tests of distillation."""

from __future__ import annotations

import json
import os
import signal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from running import SMALL_RUN

from alignkit import classifier
from alignkit.algos._distill import Distill
from alignkit.batch import Batch
from alignkit.classifier import Classifier
from alignkit.config import Model
from alignkit.run import Run

NOUNS = {"bread": "food", "soup": "food", "horse": "animal", "snail": "animal", "harbour": "place", "kitchen": "place"}
WORDS = ["old", "red", "very small", "loud", "a", "the good", "my own long", "one"]
LABELS = ["animal", "food", "place"]  # as sorted
BERT = {
    "model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def rows_of(n: int = 48) -> list[dict[str, Any]]:
    """At most 48 texts, all different, of three classes in turn and of different lengths."""
    texts = [
        f"{word} {noun}" for word, noun in product(WORDS, ["bread", "snail", "harbour", "soup", "horse", "kitchen"])
    ]
    return [
        {"id": i, "prompt": text, "response": NOUNS[text.split()[-1]], "references": [NOUNS[text.split()[-1]]]}
        for i, text in enumerate(texts[:n])
    ]


TEXTS = [row["prompt"] for row in rows_of()] + LABELS


def build(kind: str = "bert", seed: int = 0, **settings: Any) -> Classifier:
    """A new classifier of the three labels, ``kind`` being ``bert`` or ``llama``."""
    config = {**(BERT if kind == "bert" else LLAMA), **settings}
    return classifier.load(Model(config=config, vocab_size=300, device="cpu"), seed, TEXTS, LABELS)


def teacher_in(folder: Path, kind: str = "bert", **settings: Any) -> str:
    """A folder with a teacher of other weights, deeper unless told otherwise."""
    build(kind, seed=7, **{"num_hidden_layers": 4, **settings}).save(folder)
    return str(folder)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    keep = ("prompt", "response")
    path.write_text("".join(json.dumps({k: row[k] for k in keep}) + "\n" for row in rows), encoding="utf-8")
    return path


def words_of(folder: Path, teacher: str | None, **settings: Any) -> list[str]:
    """Words of a run of a few steps on 24 training, 16 dev and 8 test rows; ``settings`` are of the model."""
    folder.mkdir(exist_ok=True)
    rows = rows_of()
    splits = {"train": rows[:24], "dev": rows[24:40], "test": rows[40:]}
    model = {k: v for k, v in {**BERT, **settings}.items() if k != "model_type"}
    return [
        "model=tiny_encoder", "model.vocab_size=300",
        *(f"{'' if k in TINY else '+'}model.config.{k}={v}" for k, v in model.items()),
        "data=custom", *(f"data.{k}={written(folder / f'{k}.jsonl', v)}" for k, v in splits.items()),
        *SMALL_RUN, *([f"algo.teacher={teacher}"] if teacher else []), "algo.steps=5", "algo.batch_size=6", "algo.warmup=0",
        "algo.lr=0.01",
    ]  # fmt: skip


TINY = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "hidden_dropout_prob", "attention_probs_dropout_prob",
}  # fmt: skip


def worked(algo: Distill, folder: Path) -> tuple[Distill, Classifier, Batch]:
    """The method with models whose logits and states are those of vector E1 of the card, for any text, and a step's batch.

    Two labels, of which the rows have the second; z_S = [2, 0.5], z_T = [1, 3]; in both layers, at each token, h_S = [1, 0, 2]
    and h_T = [0, 1, 2]. So FinK is 1.701413, ResK at T = 2 is 1.411847, FeaK 0.666667, of states of length 1 0.133333; and the
    flows being h hᵀ, RelK is the mean of the nine squares 1 0 4, 0 1 4, 4 4 0: 2.
    """
    config = {**BERT, "hidden_size": 3, "num_attention_heads": 1}
    cfg = Model(config=config, vocab_size=300, device="cpu")
    teacher = classifier.load(cfg, 7, TEXTS, ["no", "yes"])
    _fix(teacher, [1.0, 3.0], [0.0, 1.0, 2.0])
    teacher.save(folder)
    algo.teacher = str(folder)
    rows = [
        {"id": i, "prompt": text, "response": ["yes", "no"][i == 3], "references": []}
        for i, text in enumerate(TEXTS[:4])
    ]
    algo.prepare(rows, ("response",))
    student = algo.build(cfg, 0, TEXTS, None)
    _fix(student, [2.0, 0.5], [1.0, 0.0, 2.0])
    return algo, student, algo.whole(student, algo.collate(student)(rows[:3]), torch.Generator().manual_seed(0))


def mean_loss(algo: Distill, student: Classifier, batch: Batch) -> float:
    loss = algo.loss(student, batch)
    return float(loss.total.detach()) / loss.count


@torch.no_grad()
def _fix(model: Classifier, logits: list[float], state: list[float]) -> None:
    model.model.classifier.weight.zero_()
    model.model.classifier.bias.copy_(torch.tensor(logits))
    for layer in model.model.bert.encoder.layer:
        layer.output.LayerNorm.weight.zero_()
        layer.output.LayerNorm.bias.copy_(torch.tensor(state))


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, with_: int = signal.SIGTERM) -> None:
    """Send this process a signal once ``step`` steps are done, as a scheduler or a user would."""
    log = Run.log

    def logged(self: Run, done: int, metrics: dict[str, float]) -> None:
        log(self, done, metrics)
        if done == step:
            os.kill(os.getpid(), with_)

    monkeypatch.setattr(Run, "log", logged)
