"""Rows from every kind of source, how they are rendered, and what is said of bad ones."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from alignkit.config import conf_dir
from alignkit.data import BUNDLED, Data, hash_source, overlap, read
from alignkit.errors import UserError

# characters that `splitlines` and a careless `strip` would cut at: NEL, LINE SEPARATOR, NO-BREAK SPACE, form feed
ODD = [
    {"prompt": "one\u0085two", "response": "a\u2028b"},
    {"prompt": "\u00a0three\u00a0", "response": "c\fd"},
    {"prompt": 'say "hello", please', "response": "Grüße 😀"},
]
Write = Callable[[str, "str | bytes"], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """``write(name, content)``: a file in the folder that the test runs in; returns its name."""
    monkeypatch.chdir(tmp_path)

    def put(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return put


def columns(source: str) -> list[dict[str, Any]]:
    return [row for _, row in read(source)]


def jsonl(rows: list[dict[str, Any]], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str, end: str = "\n") -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def says(source: str, **settings: Any) -> str:
    """The message about a source that cannot be used."""
    with pytest.raises(UserError) as caught:
        Data(train=source, **settings).rows("train")
    return str(caught.value)


# ---- readers -------------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "rows.jsonl": jsonl,
    "crlf.jsonl": lambda rows: jsonl(rows, "\r\n"),
    "blank.jsonl": lambda rows: "\n" + jsonl(rows, "\n\n"),
    "unended.jsonl": lambda rows: jsonl(rows).rstrip("\n"),
    "rows.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1),
    "crlf.json": lambda rows: json.dumps(rows, indent=1).replace("\n", "\r\n"),
    "lines.json": jsonl,
    "rows.csv": lambda rows: table(rows, ","),
    "crlf.csv": lambda rows: table(rows, ",", "\r\n"),
    "rows.tsv": lambda rows: table(rows, "\t"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("mark", [False, True], ids=["no bom", "bom"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_text_format_gives_the_rows_back(name: str, mark: bool, packed: bool, write: Write) -> None:
    raw = (("\ufeff" if mark else "") + WRITERS[name](ODD)).encode()
    source = write(f"{name}.gz", gzip.compress(raw)) if packed else write(name, raw)
    assert columns(source) == ODD


def test_parquet(tmp_path: Path) -> None:
    rows = [{**row, "refs": ["x", "y"], "n": i} for i, row in enumerate(ODD)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert columns(str(tmp_path / "rows.parquet")) == rows


def test_text_is_one_column(write: Write) -> None:
    source = write("lines.txt", "\ufeffone\u0085still one\r\n\r\ntwo\u2028still two\n\u00a0three")
    assert columns(source) == [
        {"text": "one\u0085still one"},
        {"text": "two\u2028still two"},
        {"text": "\u00a0three"},
    ]
    assert [r["prompt"] for r in Data(train=source, prompt="> {text}").rows("train")][2] == "> \u00a0three"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quoted_field_keeps_its_newline(end: str, write: Write) -> None:
    rows = [{"prompt": "first line\nsecond line", "response": "x"}, {"prompt": "y", "response": "\n"}]
    assert columns(write("rows.csv", table(rows, ",", end))) == rows


def test_a_long_field_is_read(write: Write) -> None:
    rows = [{"prompt": "word " * 50_000, "response": "x"}]  # 250,000 characters: Python's csv stops at 131,072
    assert columns(write("rows.csv", table(rows, ","))) == rows


def test_a_run_directory_is_read(write: Write) -> None:
    write("runs/made-s0-00000000/data.jsonl", jsonl(ODD))
    write("runs/made-s0-00000000/result.json", "{}")
    assert columns("runs/made-s0-00000000") == columns("runs/made-s0-00000000/") == ODD


def test_a_home_folder_is_expanded(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("rows.jsonl", jsonl(ODD))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert columns("~/rows.jsonl") == ODD


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("name", ["rnnlg", "tatoeba_en_de"])
def test_bundled_data(name: str, split: str) -> None:
    rows = columns(f"bundled:{name}.{split}.jsonl")
    raw = (BUNDLED / f"{name}.{split}.jsonl").read_bytes()
    assert len(rows) == raw.count(b"\n") > 100
    assert all(isinstance(v, str | list) for row in rows for v in row.values())


@pytest.fixture(scope="module")
def script() -> Callable[[str], Any]:
    """``script(name)``: a file of ``scripts/`` as a module."""
    folder = Path(__file__).parent.parent / "scripts"

    def get(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return get


SPLITS = ("train", "dev", "test")


def bundled(name: str) -> dict[str, list[Any]]:
    """Split → the rows of bundled data, as the file of ``conf/data`` renders them."""
    made = yaml.safe_load((conf_dir() / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    data = Data(**{key: value for key, value in made.items() if key != "_target_"})
    return {split: data.rows(split) for split in SPLITS}


def test_the_bundled_arithmetic_is_what_its_script_makes(script: Callable[[str], Any], tmp_path: Path) -> None:
    made = script("prepare_arithmetic")
    made.main(tmp_path)
    assert len([*tmp_path.iterdir()]) == 3
    for path in tmp_path.iterdir():
        assert columns(f"bundled:{path.name}") == columns(str(path)), path.name
    assert made.make(seed=0) == made.make(seed=0) != made.make(seed=1)


def test_the_bundled_arithmetic_is_right() -> None:
    """Every step of the working against Python's own arithmetic; no prompt twice."""
    splits = bundled("arithmetic")
    for rows in splits.values():
        assert {row["level"] for row in rows} == {3, 4, 5}
        for row in rows:
            prompt, steps = row["prompt"].removesuffix("="), row["response"].split("=")
            assert re.fullmatch(r"[1-9]([+-][1-9]){3,5}", prompt)
            assert len(steps) == row["level"] == len(re.findall(r"[+-]", prompt))
            assert {eval(step) for step in [prompt, *steps]} == {int(row["answer"])}
            assert steps[-1] == row["answer"]
            assert all(prompt.endswith(step.lstrip("0123456789")) for step in steps)
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)


def test_arithmetic_is_solved_by_hand(script: Callable[[str], Any]) -> None:
    made = script("prepare_arithmetic")
    assert made.solve(3, [("+", 9), ("-", 4), ("-", 7)]) == [12, 8, 1]
    assert made.expression(12, [("-", 4), ("-", 7)]) == "12-4-7"


def test_the_bundled_fairy_tales() -> None:
    """Whole stories are held out; a prompt is eight words, and what follows is not empty."""
    splits = bundled("fairy_tales")
    told = {split: {row["story"] for row in rows} for split, rows in splits.items()}
    assert not told["train"] & told["dev"] and not told["train"] & told["test"] and not told["dev"] & told["test"]
    for rows in splits.values():
        assert len(rows) > 100
        assert all(len(row["prompt"].split()) == 8 and row["response"] for row in rows)
        assert all(len(row["prompt"] + row["response"]) < 500 for row in rows)
        assert "Gutenberg" not in json.dumps(rows)


def test_how_fairy_tales_are_cut(script: Callable[[str], Any]) -> None:
    made = script("prepare_fairy_tales")
    tale = " ".join(f"Then came day {i}, and the fox said: ‘Good day!’" for i in range(40))
    text = (
        f"A BOOK\n\nBy Somebody\n\nCONTENTS:\n\n     THE FOX\n\nTHE FOX\n\n{tale}\n\n  A rhyme,\n  in TWO lines.\n\n"
        f"     CHORUS.\n\n*****\n\nA note on foxes.\n\n2.  Oz\n\n{tale}"
    )
    assert made.stories(text) == {"THE FOX": f"{tale} A rhyme, in TWO lines. CHORUS.", "2. Oz": tale}
    cut = made.passages(tale)
    assert " ".join(cut) == tale
    assert all(len(p) <= 500 and p.endswith("day!’") for p in cut)
    assert made.passages("word " * 150 + "end.") == [("word " * 100).strip(), "word " * 50 + "end."]
    assert made.passages("word " * 15 + "end.") == []


@pytest.fixture
def hub(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that ``datasets`` loads without the net, cached where the test can throw it away."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    write("corpus/train.jsonl", jsonl([{"prompt": "a\u2028b", "refs": ["x", "y"]}, {"prompt": "c", "refs": ["z"]}]))
    write("corpus/test.jsonl", jsonl([{"prompt": "d", "refs": ["w"]}]))
    return "hf:./corpus"


def test_a_hub_data_set(hub: str, write: Write) -> None:
    data = Data(train=hub, test=f"{hub}:test", references="refs")
    assert [(r["prompt"], r["response"], r["references"]) for r in data.rows("train")] == [
        ("a\u2028b", "x", ["x", "y"]),
        ("c", "z", ["z"]),
    ]
    assert [r["prompt"] for r in data.rows("test")] == ["d"]
    before = data.fingerprint()
    assert data.fingerprint() == before
    write("corpus/train.jsonl", jsonl([{"prompt": "a", "refs": ["x", "longer"]}]))
    assert data.fingerprint()["train"] != before["train"]


def test_a_hub_data_set_that_cannot_be_loaded(hub: str) -> None:
    assert says("hf:./nowhere").startswith("hf:./nowhere: ")
    assert says(f"{hub}:dev").startswith("hf:./corpus:dev: ")
    assert says(hub, prompt="{text}").startswith("hf:./corpus, row 1: no column 'text'")


# ---- faults --------------------------------------------------------------------------------------------------


def test_malformed_json_names_its_line(write: Write) -> None:
    good = jsonl(ODD[:1])
    assert says(write("rows.jsonl", good + "\n" + '{"prompt": "a"\n')).startswith(
        "rows.jsonl, line 3: not valid JSON ("
    )
    assert says(write("rows.jsonl", good + "text\n")).endswith("at column 1).")
    assert says(write("rows.json", '[{"prompt": "a"},\n{"prompt" "b"}]')).startswith(
        "rows.json, line 2: not valid JSON"
    )
    assert says(write("rows.jsonl", good + "[1]\n")) == "rows.jsonl, line 2: must be a JSON object, is a list."
    assert says(write("rows.json", '[{"prompt": "a"}, 3]')) == "rows.json, row 2: must be a JSON object, is a int."


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_another_encoding_names_its_place(suffix: str, write: Write) -> None:
    said = says(write(f"rows{suffix}", 'prompt\n"a"\n"Grüße"\n'.encode("latin-1")))
    assert said.startswith(f"rows{suffix}, line 3: not UTF-8 (byte 0xfc).")
    assert "iconv" in said


def test_a_field_that_is_not_text_names_row_and_column(write: Write) -> None:
    ok = {"prompt": "a", "response": "b"}
    for value, kind in ((True, "bool (True)"), (None, "null (None)"), (3, "int (3)"), (["x"], "list (['x'])")):
        source = write("rows.jsonl", jsonl([ok, {**ok, "prompt": value}]))
        assert says(source) == f"rows.jsonl, line 2: column 'prompt' must be text for data.prompt, is {kind}."
    source = write("rows.jsonl", jsonl([ok, {**ok, "response": 3}]))
    assert says(source, response="{response}").startswith("rows.jsonl, line 2: column 'response' must be text")


def test_a_missing_column_names_those_there_are(write: Write) -> None:
    source = write("rows.jsonl", jsonl([{"question": "a", "answer": "b"}]))
    said = says(source)
    assert said == "rows.jsonl, line 1: no column 'prompt', which data.prompt asks for. There is: answer, question."
    assert says(source, prompt="{questoin}").endswith("no column 'questoin', which data.prompt asks for. "
                                                      "Did you mean 'question'?")  # fmt: skip
    assert "which data.response asks for. Did you mean 'answer'?" in says(
        source, prompt="{question}", response="{anser}"
    )
    assert "which data.messages asks for. There is: answer, question." in says(source, messages="messages")


@pytest.mark.parametrize("template", ["{prompt", "prompt}", "{prompt!x}", "{prompt:d}", "{}", "{0}"])
def test_a_template_that_cannot_be_filled(template: str, write: Write) -> None:
    """A brace too few is the user's mistake: one message that names the setting."""
    assert "data.prompt" in says(write("rows.jsonl", jsonl(ODD)), prompt=template)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.txt"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_file(name: str, content: str, write: Write) -> None:
    assert says(write(name, content)) == f"{name}: no rows. Point data.train at a file with at least one."
    with pytest.raises(UserError, match=r"Point data\.dev at"):
        Data(dev=name).rows("dev")


def test_a_file_with_a_header_alone_is_empty(write: Write) -> None:
    assert "no rows" in says(write("rows.csv", "prompt,response\n"))
    assert "no rows" in says(write("rows.json", "[]"))


def test_a_row_with_too_few_or_too_many_fields(write: Write) -> None:
    said = says(write("rows.csv", "prompt,response\na,b\nc\n"))
    assert said.startswith("rows.csv, line 3: has fewer fields than the header (prompt, response).")
    assert says(write("rows.tsv", "prompt\tresponse\na\tb\tc\n")).startswith("rows.tsv, line 2: has more fields")


def test_a_judgement_is_true_or_false(write: Write) -> None:
    """A boolean, or its word in files without types; a response that may be a bad one is no reference."""
    rows = [{"prompt": "a", "response": "b", "good": True}, {"prompt": "c", "response": "d", "good": False}]
    for source in (write("rows.jsonl", jsonl(rows)), write("rows.csv", table(rows, ","))):
        found = Data(train=source, response="{response}", desirable="good").rows("train")
        assert [(r["response"], r["desirable"], r["references"]) for r in found] == [("b", True, []), ("d", False, [])]
    source = write("more.jsonl", jsonl([{**row, "refs": ["x"]} for row in rows]))
    found = Data(train=source, response="{response}", references="refs", desirable="good").rows("train")
    assert [r["references"] for r in found] == [["x"], ["x"]]


@pytest.mark.parametrize(
    ("value", "shown"), [(1, "1"), (None, "None"), ("yes", "'yes'"), ("", "''"), ([True], r"\[True\]")]
)
def test_another_judgement_names_row_and_column(value: Any, shown: str, write: Write) -> None:
    ok = {"prompt": "a", "response": "b", "good": True}
    said = says(write("rows.jsonl", jsonl([ok, {**ok, "good": value}])), response="{response}", desirable="good")
    assert re.fullmatch(
        rf"rows\.jsonl, line 2: column 'good' must be true or false for data\.desirable, is {shown}\.", said
    )


def test_a_judgement_needs_a_response(write: Write) -> None:
    rows = write("rows.jsonl", jsonl([{"prompt": "a", "response": " ", "good": True}]))
    assert says(rows, response="{response}", desirable="good") == (
        "rows.jsonl, line 1: the response is empty. Complete the row, or take it out."
    )
    assert says(rows, response="{response}", desirable="god").endswith(
        "no column 'god', which data.desirable asks for. Did you mean 'good'?"
    )
    for wrong in ({}, {"response": "{response}", "chosen": "{a}", "rejected": "{b}"}):
        with pytest.raises(UserError, match=r"data\.desirable judges the one response of a row"):
            Data(train=rows, desirable="good", **wrong)


def test_a_missing_file(write: Write) -> None:
    write("corpus/train.jsonl", jsonl(ODD))
    assert says("corpus/tran.jsonl") == "corpus/tran.jsonl: no such file. Did you mean 'train.jsonl'?"
    assert says("nowhere/train.jsonl") == "nowhere/train.jsonl: no such file."
    assert says("someone/corpus").endswith("It looks like a hub data set: write hf:someone/corpus.")
    assert says("bundled:rnnlg.jsonl").startswith("bundled:rnnlg.jsonl: not bundled. Did you mean 'rnnlg.")


def test_a_file_of_another_kind(write: Write) -> None:
    for name in ("rows.docx", "rows", "rows.zip", "rows.gz"):
        said = says(write(name, "x"))
        assert said.startswith(f"{name}: cannot read this kind of file. Use one of .jsonl, .json, .csv,")


def test_a_folder_without_rows(write: Write) -> None:
    write("runs/sft/result.json", "{}")
    assert says("runs/sft") == "runs/sft: a folder without data.jsonl. Name a file, or a hub data set as hf:NAME."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", b"not packed"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n')[:-9]),
        ("rows.parquet", b"PAR1 not a table"),
        ("rows.parquet.gz", gzip.compress(b"PAR1")),
        ("rows.csv", b"prompt,response\na\rb,c\n"),
        ("bundled:", b""),
    ],
    ids=["not gzip", "cut gzip", "not parquet", "packed parquet", "lone return", "no name"],
)
def test_a_broken_file_is_named(name: str, content: bytes, write: Write) -> None:
    source = name if name == "bundled:" else write(name, content)
    assert source in says(source)


# ---- rendering -----------------------------------------------------------------------------------------------


def test_templates_over_columns(write: Write) -> None:
    source = write("rows.jsonl", jsonl([{"q": "2+2?", "hint": "even", "a": "4", "level": 1}]))
    data = Data(train=source, prompt="Q: {q} ({hint}) {{x}}\nA:", response=" {a}.")
    assert data.rows("train") == [
        {
            "q": "2+2?", "hint": "even", "a": "4", "level": 1, "id": 0,
            "prompt": "Q: 2+2? (even) {x}\nA:", "response": " 4.", "references": [" 4."],
        }
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["{prompt}", "{", "}", "{0}", "{{}}", "{x!r:>5}", "%s", "\\{", "${oc.env:HOME}", "$x"])
def test_braces_in_the_data_are_text(text: str, write: Write) -> None:
    source = write("rows.jsonl", jsonl([{"prompt": text, "response": text}]))
    (row,) = Data(train=source, prompt="<{prompt}|{prompt}>", response="{response}").rows("train")
    assert (row["prompt"], row["response"], row["references"]) == (f"<{text}|{text}>", text, [text])


def test_prompts_alone(write: Write) -> None:
    (row,) = Data(train=write("rows.jsonl", jsonl([{"prompt": "a", "response": "unused"}]))).rows("train")
    assert (row["prompt"], row["response"], row["references"]) == ("a", None, [])


def test_references(write: Write) -> None:
    """A text, a list, or none; without a response the first reference is the response."""
    rows = [
        {"prompt": "a", "response": "own", "refs": "text"},
        {"prompt": "b", "response": "own", "refs": ["one", "two"]},
        {"prompt": "c", "response": "own"},
        {"prompt": "d", "response": "own", "refs": None},
        {"prompt": "e", "refs": ["first", "second"]},
    ]
    data = Data(train=write("rows.jsonl", jsonl(rows)), response="{response}", references="refs")
    assert [(r["response"], r["references"]) for r in data.rows("train")] == [
        ("own", ["text"]),
        ("own", ["one", "two"]),
        ("own", ["own"]),
        ("own", ["own"]),
        ("first", ["first", "second"]),
    ]


@pytest.mark.parametrize("refs", [3, [1], ["a", None], {"a": 1}, True])
def test_references_that_are_not_text(refs: Any, write: Write) -> None:
    source = write("rows.jsonl", jsonl([{"prompt": "a", "refs": refs}]))
    assert says(source, references="refs") == "rows.jsonl, line 1: column 'refs' must be a text or a list of texts."


def test_a_response_is_asked_for_where_no_references_are(write: Write) -> None:
    source = write("rows.jsonl", jsonl([{"prompt": "a", "refs": ["x"]}, {"prompt": "b"}]))
    assert "line 2: no column 'answer'" in says(source, response="{answer}", references="refs")


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_messages(write: Write) -> None:
    talk = [turn("user", "hi"), turn("assistant", "hello"), turn("user", "and?"), turn("assistant", "so")]
    source = write("rows.jsonl", jsonl([{"talk": talk}, {"talk": talk[:3]}]))
    first, second = Data(train=source, messages="talk").rows("train")
    assert (first["prompt"], first["response"], first["references"]) == (talk[:3], "so", ["so"])
    assert (second["prompt"], second["response"], second["references"]) == (talk[:3], None, [])
    system = turn("system", "Be brief.")
    assert Data(train=source, messages="talk", system="Be brief.").rows("train")[0]["prompt"] == [system, *talk[:3]]


@pytest.mark.parametrize(
    "talk", [[], "hi", None, ["hi"], [turn("user", None)], [turn("user", [{"type": "text"}])], [{"content": "hi"}]]
)
def test_messages_that_are_none(talk: Any, write: Write) -> None:
    said = says(write("rows.jsonl", jsonl([{"talk": talk}])), messages="talk")
    assert said.startswith("rows.jsonl, line 1: column 'talk' must be a list of {role, content} messages")


def test_chat(write: Write) -> None:
    source = write("rows.jsonl", jsonl([{"prompt": "a"}]))
    user = turn("user", "Q a")
    assert Data(train=source, prompt="Q {prompt}", chat=True).rows("train")[0]["prompt"] == [user]
    with_system = Data(train=source, prompt="Q {prompt}", chat=True, system="s").rows("train")[0]["prompt"]
    assert with_system == [turn("system", "s"), user]
    assert Data(train=source, prompt="Q {prompt}", system="s").rows("train")[0]["prompt"] == "Q a"


# ---- which rows ----------------------------------------------------------------------------------------------


def test_limit_and_unique_are_for_training_rows(write: Write) -> None:
    rows = [{"prompt": p, "response": str(i)} for i, p in enumerate("aabacb")]
    source = write("rows.jsonl", jsonl(rows))

    def taken(split: str = "train", **settings: Any) -> list[tuple[int, str]]:
        data = Data(train=source, dev=source, response="{response}", **settings)
        return [(row["id"], row["response"]) for row in data.rows(split)]

    assert taken(limit=2) == [(0, "0"), (1, "1")]
    assert taken(limit=9) == [(i, str(i)) for i in range(6)]
    assert taken(unique=True) == [(0, "0"), (1, "2"), (2, "4")]
    assert taken(unique=True, limit=2) == [(0, "0"), (1, "2")]
    assert taken("dev", unique=True, limit=2) == [(i, str(i)) for i in range(6)]
    assert len(taken(unique=True, chat=True)) == 3


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int, write: Write) -> None:
    """Nobody who asks for no rows, or for -1, should get all of them without a word."""
    source = write("rows.jsonl", jsonl(ODD))
    with pytest.raises((ValueError, UserError), match="limit"):
        Data(train=source, limit=limit).rows("train")


def test_rows_are_read_once(write: Write) -> None:
    data = Data(train=write("rows.jsonl", jsonl(ODD)))
    rows = data.rows("train")
    write("rows.jsonl", jsonl(ODD[:1]))
    assert data.rows("train") is rows
    assert data.rows("dev") == data.rows("test") == []


def test_texts_for_a_tokenizer(write: Write) -> None:
    source = write("rows.jsonl", jsonl([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]))
    assert Data(train=source, response="{response}").texts() == ["a", "b", "c", "d"]
    assert Data(train=source).texts() == ["a", "c"]


def test_the_fingerprint_follows_the_file(write: Write) -> None:
    """SHA-256 of the bytes; the expectation is that of the standard's own test vector for "abc"."""
    source = write("rows.txt", "abc")
    other = write("other.jsonl", jsonl(ODD))
    data = Data(train=source, test=other)
    assert data.fingerprint()["train"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert set(data.fingerprint()) == {"train", "test"}
    before = data.fingerprint()
    write("rows.txt", "abd")
    assert data.fingerprint()["train"] != before["train"]
    assert data.fingerprint()["test"] == before["test"]
    write("run/data.jsonl", jsonl(ODD))
    assert hash_source("run") == hash_source(other)


def test_overlap_counts_held_out_rows(write: Write) -> None:
    train = Data(train=write("train.jsonl", jsonl([{"prompt": p} for p in ("a", "b", "b", "c")])))
    held = Data(dev=write("dev.jsonl", jsonl([{"prompt": p} for p in ("b", "x", "b", "B", "c ")])))
    assert overlap(train.rows("train"), held.rows("dev")) == 2
    chat = Data(dev="dev.jsonl", chat=True)
    assert overlap(train.rows("train"), chat.rows("dev")) == 0
    assert overlap(Data(train="train.jsonl", chat=True).rows("train"), chat.rows("dev")) == 2


def test_any_text_survives_every_format(write: Write) -> None:
    """Random texts over the characters that formats trip on, through all text formats."""
    rng = random.Random(0)
    odd = ["\u0085", "\u2028", "\u2029", "\u00a0", "\ufeff", "\x0b", "\x1c", "😀", "é"]
    alphabet = [*"ab ,;\t\"'{}[]\\\n:", *odd]

    def text() -> str:
        return "x" + "".join(rng.choices(alphabet, k=rng.randrange(1, 12)))

    rows = [{"prompt": text(), "response": text()} for _ in range(200)]
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv"):
        assert columns(write(name, WRITERS[name](rows))) == rows, name
