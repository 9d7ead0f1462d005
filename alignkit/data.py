"""Rows from bundled files, local files, the hub and run directories, rendered through templates.

A row is a dict: every column of the source, plus ``prompt`` (text or chat messages), ``response`` (text, absent
for prompt-only data), ``references`` (accepted answers) and ``id`` (its index); of pairs, ``chosen`` and ``rejected``
(texts); of single responses that are judged, ``desirable`` (true or false). The other columns reach the reward untouched.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from alignkit.errors import UserError, suggest

BUNDLED = Path(__file__).parent / "assets" / "data"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
Row = dict[str, Any]


@dataclass(kw_only=True)
class Data:
    """Where the rows of each split come from and how they are rendered.

    A source is ``bundled:NAME``, a file (.jsonl .json .csv .tsv .parquet .txt, also .gz), a run directory
    that holds ``data.jsonl``, or a hub data set ``hf:NAME[:SPLIT]`` (also ``hf:./folder``).
    """

    train: str | None = None  # source of the training rows
    dev: str | None = None  # source of the rows that pick the best checkpoint
    test: str | None = None  # source of the rows that are reported
    prompt: str = "{prompt}"  # template over the columns
    response: str | None = None  # template over the columns; null: prompts only
    chosen: str | None = (
        None  # template of the better response of a pair, which is then the response too; null: no pairs
    )
    rejected: str | None = None  # template of the worse one
    candidates: str | None = None  # column of several responses to the prompt, a list of texts
    golden: str | None = None  # column of the true scores of these, a list of numbers, higher is better
    pairing: Literal["none", "all", "extremes"] = (
        "none"  # pairs made of candidates, with their `margin`: all, best and worst
    )
    desirable: str | None = None  # column of true or false: whether the row's response is a good one; null: not judged
    references: str | None = None  # column of accepted answers (text or list of texts); null: the response
    messages: str | None = None  # column of chat messages; the last assistant turn is the response
    chat: bool = False  # send the prompt as one user turn through the tokenizer's chat template
    system: str | None = None  # system message put before a chat
    ratings: str | None = (
        None  # column of the response's ratings: numbers by attribute (null or HelpSteer's -100: not rated), or one number; null: no ratings
    )
    unique: bool = False  # keep the first training row of each prompt
    limit: int | None = None  # use at most this many training rows
    show: int = 0  # print this many rendered rows, trained tokens marked, and stop

    def __post_init__(self) -> None:
        self._read: dict[str, list[Row]] = {}
        self.alike: dict[str, int] = {}  # split → pairs left out because both responses are the same
        self.ties: dict[str, int] = {}  # split → pairs of candidates left out because both are equally good
        if self.pairing != "none" and (self.candidates is None or self.golden is None or self.chosen is not None):
            raise UserError(
                f"data.pairing={self.pairing} makes pairs of candidates: give data.candidates and data.golden, and no data.chosen."
            )
        if (self.chosen is None) != (self.rejected is None):
            raise UserError("data.chosen and data.rejected belong together: give both templates, or neither.")
        if self.desirable is not None and (self.chosen is not None or not (self.response or self.messages)):
            raise UserError(
                "data.desirable judges the one response of a row: give data.response (or data.messages) with it, and no "
                "data.chosen and data.rejected, which judge themselves."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, is {self.limit}")
        for key in ("prompt", "response", "chosen", "rejected"):
            template = getattr(self, key)
            try:
                "".format() if template is None else template.format(**dict.fromkeys(_fields(template), ""))
            except (ValueError, IndexError, KeyError, AttributeError) as e:
                raise UserError(
                    f"data.{key}: {template!r} is not a template ({e}). Double a brace that is text."
                ) from None

    @property
    def sides(self) -> tuple[str, ...]:
        """Keys of a row's judged responses: the two of a pair, or the one that ``desirable`` judges."""
        return ("chosen", "rejected") if self.gives("pairs") else ("response",)

    def gives(self, what: str) -> bool:
        """Whether rows have ``pairs`` or ``ratings``."""
        return self.ratings is not None if what == "ratings" else self.chosen is not None or self.pairing != "none"

    def rows(self, split: str) -> list[Row]:
        """The rendered rows of ``train``, ``dev`` or ``test``; empty when the split has no source.

        Raises:
            UserError: missing or malformed file, missing column, field that is not text, no rows.
        """
        if split in self._read:
            return self._read[split]
        source = getattr(self, split)
        if source is None:
            return []
        rows: list[Row] = []
        seen = set()
        for where, columns in read(source):
            row = self._render(columns, where, len(rows))
            if self.chosen is not None and row["chosen"] == row["rejected"]:
                self.alike[split] = self.alike.get(split, 0) + 1
                continue
            if split == "train" and self.unique:
                key = json.dumps(row["prompt"])
                if key in seen:
                    continue
                seen.add(key)
            if self.pairing != "none":
                rows += self._paired(row, split, len(rows))
                continue
            rows.append(row)
            if split == "train" and self.limit and len(rows) == self.limit:
                break
        if split == "train" and self.limit and self.pairing != "none":
            rows = rows[: self.limit]
        if not rows and split in self.ties:
            raise UserError(f"{source}: in no row is one candidate better than another. Look at data.golden.")
        if not rows and split in self.alike:
            raise UserError(
                f"{source}: in every pair both responses are the same. Look at data.chosen and data.rejected."
            )
        if not rows:
            raise UserError(f"{source}: no rows. Point data.{split} at a file with at least one.")
        self._read[split] = rows
        return rows

    def _paired(self, row: Row, split: str, index: int) -> list[Row]:
        """Pairs of a row's candidates, the better one chosen, with the difference of their true scores as ``margin``."""
        texts, golden = row["candidates"], row["golden"]
        order = sorted(range(len(texts)), key=lambda i: -golden[i])
        pairs = [(order[0], order[-1])] if self.pairing == "extremes" else list(combinations(order, 2))
        found: list[Row] = []
        for i, j in pairs:
            if golden[i] == golden[j]:
                self.ties[split] = self.ties.get(split, 0) + 1
            elif texts[i] == texts[j]:
                self.alike[split] = self.alike.get(split, 0) + 1
            else:
                pair = {"chosen": texts[i], "rejected": texts[j], "margin": golden[i] - golden[j], "response": texts[i]}
                found.append({**row, **pair, "references": row["references"] or [texts[i]], "id": index + len(found)})
        return found

    def texts(self) -> list[str]:
        """Prompts and responses of the training rows: what a tokenizer is trained on."""
        keys = ("prompt", "chosen", "rejected") if self.gives("pairs") else ("prompt", "response")
        return [t for row in self.rows("train") for key in keys if isinstance(t := row[key], str)]

    def fingerprint(self, splits: tuple[str, ...] = ("train", "dev", "test")) -> dict[str, str]:
        """Split → SHA-256 of its source, for the run record and for the check on resume."""
        return {split: hash_source(source) for split in splits if (source := getattr(self, split))}

    def _render(self, columns: Row, where: str, index: int) -> Row:
        row = {**columns, "id": index}
        if self.messages:
            row["prompt"], row["response"] = _conversation(columns, self.messages, where)
        else:
            row["prompt"] = _fill(self.prompt, columns, where, "data.prompt")
            if self.chat:
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row["response"] = None
            # held-out rows may carry their answers in `references` alone
            if self.response is not None and (_has(self.response, columns) or self.references not in columns):
                row["response"] = _fill(self.response, columns, where, "data.response")
        if self.chosen is not None and self.rejected is not None:
            for key, template in (("chosen", self.chosen), ("rejected", self.rejected)):
                row[key] = _fill(template, columns, where, f"data.{key}")
                if not row[key].strip():
                    raise UserError(f"{where}: the {key} response is empty. Complete the row, or take it out.")
            row["response"] = row["chosen"] if row["response"] is None else row["response"]
        if self.candidates is not None:
            row["candidates"], row["golden"] = _list(columns, self.candidates, self.golden, where)
        if self.ratings is not None:
            row["ratings"] = _ratings(columns, self.ratings, where)
        if self.system is not None and isinstance(row["prompt"], list):
            row["prompt"] = [{"role": "system", "content": self.system}, *row["prompt"]]
        if self.desirable is not None:
            row["desirable"] = _judgement(columns, self.desirable, where)
            if not (row["response"] or "").strip():
                raise UserError(f"{where}: the response is empty. Complete the row, or take it out.")
        references = columns.get(self.references) if self.references else None
        if references is None:  # a response that may be a bad one is no reference
            references = [] if row["response"] is None or self.desirable is not None else [row["response"]]
        elif isinstance(references, str):
            references = [references]
        if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
            raise UserError(f"{where}: column '{self.references}' must be a text or a list of texts.")
        row["references"] = references
        if row["response"] is None and references:
            row["response"] = references[0]
        return row


def _list(columns: Row, candidates: str, golden: str | None, where: str) -> tuple[list[str], list[float] | None]:
    """The candidates of a row and their true scores, where there are any."""
    for name, kind in ((candidates, str), (golden, int | float)):
        if name is None:
            continue
        if name not in columns:
            raise UserError(
                f"{where}: no column '{name}', which data.{'candidates' if kind is str else 'golden'} asks for.{suggest(name, columns)}"
            )
        value = columns[name]
        if (
            not isinstance(value, list)
            or len(value) < 2
            or not all(isinstance(x, kind) and not isinstance(x, bool) and x == x for x in value)
        ):
            what = "texts" if kind is str else "numbers"
            raise UserError(f"{where}: column '{name}' must be a list of at least two {what}, is {str(value)[:80]}.")
    texts = columns[candidates]
    if golden is not None and len(texts) != len(columns[golden]):
        raise UserError(
            f"{where}: {len(texts)} candidates in '{candidates}' but {len(columns[golden])} scores in '{golden}'."
        )
    return texts, None if golden is None else [float(x) for x in columns[golden]]


def _ratings(columns: Row, column: str, where: str) -> dict[str, float | None]:
    """Attribute → rating, None where there is none; of a single number, ``rating`` is the attribute."""
    if column not in columns:
        raise UserError(f"{where}: no column '{column}', which data.ratings asks for.{suggest(column, columns)}")
    found = columns[column] if isinstance(columns[column], dict) else {"rating": columns[column]}
    for name, value in found.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value != value):
            raise UserError(
                f"{where}: the rating '{name}' in column '{column}' must be a number or null, is {value!r}."
            )
    return {name: None if value == -100 else value for name, value in found.items()}


def overlap(train: list[Row], held_out: list[Row]) -> int:
    """How many held-out rows have a prompt that stands word for word in the training rows."""
    seen = {json.dumps(row["prompt"]) for row in train}
    return sum(json.dumps(row["prompt"]) in seen for row in held_out)


def read(source: str) -> Iterator[tuple[str, Row]]:
    """(place, columns) of every row of a source; the place ("file, line 3") is for messages."""
    if source.startswith("hf:"):
        yield from _read_hub(source.removeprefix("hf:"))
        return
    path = locate(source)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as e:
            raise UserError(f"{path}: not a Parquet file ({e}).") from None
        for i, columns in enumerate(table):
            yield f"{path}, row {i + 1}", columns
        return
    text = _text(path)
    if suffix in (".csv", ".tsv"):
        csv.field_size_limit(sys.maxsize)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="," if suffix == ".csv" else "\t")
        for columns in reader:
            if None in columns or None in columns.values():
                raise UserError(
                    f"{path}, line {reader.line_num}: has {'more' if None in columns else 'fewer'} fields than the "
                    f"header ({', '.join(reader.fieldnames or [])}). Quote fields that contain the delimiter."
                )
            yield f"{path}, line {reader.line_num}", columns
    elif suffix == ".txt":
        for i, line in enumerate(text.split("\n")):
            if line.strip():
                yield f"{path}, line {i + 1}", {"text": line}
    elif suffix == ".json" and text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}, line {e.lineno}: not valid JSON ({e.msg}).") from None
        for i, columns in enumerate(items):
            yield f"{path}, row {i + 1}", _object(columns, f"{path}, row {i + 1}")
    else:
        # split on \n alone: U+0085 and U+2028 may stand inside a JSON string, and splitlines() would cut there
        for i, line in enumerate(text.split("\n")):
            if line.strip():
                where = f"{path}, line {i + 1}"
                try:
                    columns = json.loads(line)
                except json.JSONDecodeError as e:
                    raise UserError(f"{where}: not valid JSON ({e.msg} at column {e.colno}).") from None
                yield where, _object(columns, where)


def locate(source: str) -> Path:
    """The file behind a source that is not on the hub.

    Raises:
        UserError: there is no such file, or its ending is not one that is read.
    """
    if source.startswith("bundled:"):
        path = BUNDLED / source.removeprefix("bundled:")
        if not path.is_file():
            raise UserError(f"{source}: not bundled.{suggest(path.name, [p.name for p in BUNDLED.glob('*')])}")
        return path
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "data.jsonl").exists():
            raise UserError(f"{path}: a folder without data.jsonl. Name a file, or a hub data set as hf:NAME.")
        return path / "data.jsonl"
    if not path.exists():
        near = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = (
            f" It looks like a hub data set: write hf:{source}." if source.count("/") == 1 and not path.suffix else ""
        )
        raise UserError(f"{source}: no such file.{hint or suggest(path.name, near)}")
    if Path(path.name.removesuffix(".gz")).suffix not in SUFFIXES:
        raise UserError(f"{path}: cannot read this kind of file. Use one of {', '.join(SUFFIXES)} (or those with .gz).")
    return path


def hash_source(source: str) -> str:
    """SHA-256 of a file's bytes; for hub data, the fingerprint that ``datasets`` keeps."""
    if source.startswith("hf:"):
        return str(_load_hub(source.removeprefix("hf:"))._fingerprint)
    digest = hashlib.sha256()
    with open(locate(source), "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _text(path: Path) -> str:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            raw = f.read()
    except (gzip.BadGzipFile, EOFError) as e:
        raise UserError(f"{path}: cannot be unpacked ({e}).") from None
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[e.start]:02x}). Convert it first, for example with "
            f"iconv -f WINDOWS-1252 -t UTF-8."
        ) from None


def _read_hub(name: str) -> Iterator[tuple[str, Row]]:
    for i, columns in enumerate(_load_hub(name)):
        yield f"hf:{name}, row {i + 1}", dict(columns)


def _load_hub(name: str) -> Any:
    import datasets

    path, _, split = name.partition(":")
    try:
        return datasets.load_dataset(path, split=split or "train")
    except Exception as e:  # the library raises many kinds: offline, unknown name, unknown split, gated
        raise UserError(
            f"hf:{name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'cannot load'}"
        ) from None


def _object(columns: Any, where: str) -> Row:
    if not isinstance(columns, dict):
        raise UserError(f"{where}: must be a JSON object, is a {type(columns).__name__}.")
    return columns


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def _has(template: str, columns: Row) -> bool:
    return all(name in columns for name in _fields(template))


def _fill(template: str, columns: Row, where: str, key: str) -> str:
    values = {}
    for name in _fields(template):
        if name not in columns:
            raise UserError(f"{where}: no column '{name}', which {key} asks for.{suggest(name, columns)}")
        values[name] = columns[name]
        if not isinstance(values[name], str):
            kind = "null" if values[name] is None else type(values[name]).__name__
            raise UserError(f"{where}: column '{name}' must be text for {key}, is {kind} ({values[name]!r}).")
    return template.format(**values)


def _judgement(columns: Row, column: str, where: str) -> bool:
    """True or false of a column; of files without types (.csv) the words, in any case."""
    if column not in columns:
        raise UserError(f"{where}: no column '{column}', which data.desirable asks for.{suggest(column, columns)}")
    value = columns[column]
    found = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise UserError(f"{where}: column '{column}' must be true or false for data.desirable, is {value!r}.")
    return found


def _conversation(columns: Row, column: str, where: str) -> tuple[list[Row], str | None]:
    """Chat messages → (turns before the last assistant turn, that turn's text)."""
    if column not in columns:
        raise UserError(f"{where}: no column '{column}', which data.messages asks for.{suggest(column, columns)}")
    turns = columns[column]
    good = (
        isinstance(turns, list)
        and turns
        and all(
            isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
        )
    )
    if not good:
        raise UserError(f"{where}: column '{column}' must be a list of {{role, content}} messages with text contents.")
    if turns[-1]["role"] == "assistant":
        return turns[:-1], turns[-1]["content"]
    return turns, None
