"""Small classifiers, teachers and labelled texts for the tests of distillation."""

from __future__ import annotations

import json
import os
import signal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from running import SMALL_RUN

from alignkit import classifier
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


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, with_: int = signal.SIGTERM) -> None:
    """Send this process a signal once ``step`` steps are done, as a scheduler or a user would."""
    log = Run.log

    def logged(self: Run, done: int, metrics: dict[str, float]) -> None:
        log(self, done, metrics)
        if done == step:
            os.kill(os.getpid(), with_)

    monkeypatch.setattr(Run, "log", logged)
