"""The bundled brackets, and the script that turns classification data of others into rows."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from running import composed, lines
from transformers import AutoConfig

from alignkit.config import conf_dir
from alignkit.data import BUNDLED, Data, read
from alignkit.loading import train_tokenizer

SCRIPTS = conf_dir().parent / "scripts"
SPLITS = ("train", "dev", "test")
LABELS = ("round", "square", "curly", "angle")
ENDS = dict(zip("([{<", LABELS, strict=True))


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def brackets() -> dict[str, list[dict[str, Any]]]:
    return {split: [row for _, row in read(f"bundled:brackets.{split}.jsonl.gz")] for split in SPLITS}


def open_at_the_end(text: str) -> str:
    """The brackets that are left when pairs without a bracket between them are struck out again and again."""
    left = re.sub("[a-z ]", "", text)
    while left != (left := re.sub(r"\(\)|\[\]|\{\}|<>", "", left)):
        pass
    return left


def test_pairs_are_struck_out_by_hand() -> None:
    assert open_at_the_end("a ( b [ ] ( c") == "(("
    assert open_at_the_end("( [ { } ] ) x <") == "<"
    assert open_at_the_end("( ]") == "(]"


def test_the_label_is_the_innermost_open_bracket(brackets: dict[str, list[dict[str, Any]]]) -> None:
    for split, rows in brackets.items():
        for row in rows:
            left = open_at_the_end(row["text"])
            assert re.fullmatch(r"[(\[{<]+", left), row  # well nested: none is closed that was not open
            assert ENDS[left[-1]] == row["clean" if split == "train" else "label"], row


def test_texts_have_the_words_and_the_length_that_are_promised(brackets: dict[str, list[dict[str, Any]]]) -> None:
    words = {word for rows in brackets.values() for row in rows for word in row["text"].split(" ")}
    assert words == {*"([{<)]}>abcdefghijklmnopqrstuvwx"} and len(words) == 32
    assert {len(row["text"].split()) for rows in brackets.values() for row in rows} == set(range(8, 41))


def test_classes_are_balanced_and_nothing_occurs_twice(brackets: dict[str, list[dict[str, Any]]]) -> None:
    assert {split: len(rows) for split, rows in brackets.items()} == {"train": 16_000, "dev": 1_500, "test": 2_000}
    for split, rows in brackets.items():
        assert Counter(row["clean" if split == "train" else "label"] for row in rows) == {
            label: len(rows) // 4 for label in LABELS
        }
    texts = [row["text"] for rows in brackets.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_a_tenth_of_the_training_labels_is_wrong(brackets: dict[str, list[dict[str, Any]]]) -> None:
    """1,600 of 16,000 in the mean, with a standard deviation of 38; each of 12 mistakes 133 times, with one of 11.5."""
    wrong = Counter((row["clean"], row["label"]) for row in brackets["train"] if row["clean"] != row["label"])
    assert abs(wrong.total() - 1_600) < 3 * 38
    assert len(wrong) == 12 and all(abs(count - 133) < 4 * 11.5 for count in wrong.values())
    assert all(set(row) == {"text", "label"} for split in ("dev", "test") for row in brackets[split])


def test_the_first_rows_are_a_fair_draw(brackets: dict[str, list[dict[str, Any]]]) -> None:
    """Of 1,000 rows 250 of each label, with a standard deviation below 13.7; of 100 wrong ones, 9.5."""
    first = brackets["train"][:1_000]
    assert all(abs(count - 250) < 4 * 13.7 for count in Counter(row["clean"] for row in first).values())
    assert abs(sum(row["clean"] != row["label"] for row in first) - 100) < 4 * 9.5


def test_the_script_makes_the_bundled_files(tmp_path: Path) -> None:
    made = script("prepare_brackets")
    made.main(tmp_path)
    for split in SPLITS:
        name = f"brackets.{split}.jsonl.gz"
        assert (tmp_path / name).read_bytes() == (BUNDLED / name).read_bytes()
    assert made.make(seed=0) != made.make(seed=1)


def test_the_configuration_gives_prompts_and_classes() -> None:
    cfg = composed(["+algo=sft", "data=brackets", "data.limit=1000"]).data
    data = Data(**{key: value for key, value in cfg.items() if key != "_target_"})
    assert [len(data.rows(split)) for split in SPLITS] == [1_000, 1_500, 2_000]
    for split in SPLITS:
        assert {row["response"] for row in data.rows(split)} == set(LABELS)
        assert all(row["prompt"] == row["text"] for row in data.rows(split))


def test_every_word_is_a_token_of_the_tiny_classifier(brackets: dict[str, list[dict[str, Any]]]) -> None:
    """With its closing token the longest text fits its positions."""
    model = composed(["+algo=sft", "model=tiny_classifier"]).model
    texts = [row["text"] for row in brackets["train"]]
    tokenizer = train_tokenizer([*texts, *LABELS], model.vocab_size)
    lengths = {len(ids) - 1 - len(text.split()) for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True)}
    assert lengths == {0}
    assert model.config.max_position_embeddings > 40


@pytest.mark.parametrize("name", ["tiny_classifier", "tiny_intents"])
def test_the_models_are_encoders(name: str) -> None:
    settings = composed(["+algo=sft", f"model={name}"]).model.config
    assert AutoConfig.for_model(**settings).num_hidden_layers == 4


# ---- classification data of others ---------------------------------------------------------------------------


def prepare(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "prepare_classes.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def intents(tmp_path: Path) -> Path:
    """A file as CLINC150's: 3 intents; one query of train is also in test, one in train twice."""
    train = [[f"{intent} {i}", intent] for intent in ("pay", "call", "play") for i in range(8)]
    found = {
        "train": [*train, ["pay 0", "pay"], ["call me", "call"]],
        "val": [["pay now", "pay"], ["call me", "call"]],
        "test": [["call me", "call"], ["play it", "play"]],
        "oos_train": [["who am i", "oos"]],
        "oos_val": [["what is it", "oos"]],
        "oos_test": [["why not", "oos"]],
    }
    path = tmp_path / "intents.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def test_intents(intents: Path, tmp_path: Path) -> None:
    done = prepare("clinc", intents, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = {split: lines(tmp_path / "out" / f"{split}.jsonl") for split in SPLITS}
    assert sorted(row["text"] for row in found["test"]) == ["call me", "play it"]
    assert found["dev"] == [{"text": "pay now", "label": "pay"}]
    assert sorted((row["text"], row["label"]) for row in found["train"]) == sorted(
        (f"{intent} {i}", intent) for intent in ("pay", "call", "play") for i in range(8)
    )
    assert "train: 24 rows, 3 labels, 2 texts that occur again left out" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dev.jsonl", "test.jsonl", "train.jsonl"]


def test_a_few_rows_of_each_label(intents: Path, tmp_path: Path) -> None:
    drawn = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert prepare("clinc", intents, tmp_path / out, "--per-class", 3, "--seed", seed).returncode == 0
        rows = lines(tmp_path / out / "train.3.jsonl")
        assert Counter(row["label"] for row in rows) == {"pay": 3, "call": 3, "play": 3}
        whole = lines(tmp_path / out / "train.jsonl")
        assert len(whole) == 24 and all(row in whole for row in rows) and len({row["text"] for row in rows}) == 9
        drawn.append((rows, whole))
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0] and drawn[0][1] == drawn[2][1]  # the seed draws the few, and nothing else


def test_tables(tmp_path: Path) -> None:
    for split, text in {
        "train": "sentence\tlabel\nso good\t1\r\nso “bad”\t0\n",
        "dev": "fine \t1\n",
        "test": "fine\t1\nno\t0",
    }.items():
        (tmp_path / f"{split}.tsv").write_text(text, encoding="utf-8", newline="")
    assert prepare("tsv", tmp_path, tmp_path / "out").returncode == 0
    found = {split: {tuple(row.values()) for row in lines(tmp_path / "out" / f"{split}.jsonl")} for split in SPLITS}
    assert found == {
        "train": {("so good", "1"), ("so “bad”", "0")},
        "dev": set(),  # its only text is in test
        "test": {("fine", "1"), ("no", "0")},
    }


def test_mistakes_are_named(intents: Path, tmp_path: Path) -> None:
    done = prepare("clinc", intents, tmp_path / "out", "--per-class", 9)
    assert done.returncode == 1
    assert "--per-class 9: train has fewer rows of call (8), pay (8), play (8)." in done.stderr
    (tmp_path / "train.tsv").write_text("good\t1\nbad\n", encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("good\t1\n", encoding="utf-8")
    assert "test.tsv: is not there" in prepare("tsv", tmp_path, tmp_path / "out").stderr
    (tmp_path / "test.tsv").write_text("good\t1\n", encoding="utf-8")
    assert "train.tsv, line 2: must be a text, a tab and a label" in prepare("tsv", tmp_path, tmp_path / "out").stderr
    assert "nothing: no such file or folder" in prepare("clinc", tmp_path / "nothing", tmp_path / "out").stderr
    (tmp_path / "other.json").write_text("[]", encoding="utf-8")
    assert (
        "must hold lists named train, val and test"
        in prepare("clinc", tmp_path / "other.json", tmp_path / "out").stderr
    )
    assert not (tmp_path / "out").exists()
