"""Two configurations beside each other: settings, results with paired differences, ledgers."""

from __future__ import annotations

import json
import shlex
from typing import Any

from alignkit import metrics
from alignkit.errors import UserError
from alignkit.report.collect import Configuration, Json, Record, _at, _flat, _is_number, differing
from alignkit.report.content import (
    CLOCK,
    DECODING,
    Cell,
    Table,
    _gap,
    estimated,
    in_processes,
    label,
    metrics_of,
    same_rows,
    settings,
)
from alignkit.report.stats import difference, over_rows

RESAMPLES = 1000


def sides(configurations: list[Configuration], word: str) -> Configuration:
    """The one configuration that is named.

    Raises:
        UserError: the word names several.
    """
    whole = [c for c in configurations if c.stage == "pipeline"]
    if len(configurations) == 1:
        return configurations[0]
    if whole:
        raise UserError(f"compare: {word} is a pipeline. Name one of its steps: {word.rstrip('/')}/STEP.")
    raise UserError(
        f"compare: {word} holds {len(configurations)} configurations ({', '.join(c.label for c in configurations)}). Name one, or see "
        f"them all with `alignkit report {word}`."
    )


def compare(a: Configuration, b: Configuration, how: str = "t") -> tuple[list[Table], list[str]]:
    """(tables, warnings). Differences are ``b`` less ``a``: over seeds where there are two or more, and over held-out rows
    where both kept their outputs of the same rows."""
    warnings = []
    if a.stage != b.stage:
        warnings.append(
            f"different stages: {a.label} is {a.stage}, {b.label} is {b.stage}. Metrics of one name may mean different things."
        )
    comparable = same_rows(a, b)
    if not comparable:
        warnings.append(
            "not the same held-out rows: the numbers stand beside each other, but no difference is computed."
        )
    keys = [k for k in differing([a.first.settings, b.first.settings]) if k in DECODING]
    if keys:
        warnings.append(f"not evaluated in the same way: {', '.join(keys)} differ.")
    rows_of, why = _over_rows(a, b) if comparable else ({}, "")
    if why:
        warnings.append(why)
    names = [m for m in metrics_of([a, b]) if a.values(m) or b.values(m)]
    rows = []
    for name in names:
        cells = [estimated(x.values(name), name, how, x) for x in (a, b)]
        seeds = _gap(difference(b.values(name), a.values(name), how) if comparable else None, name)
        rows.append([Cell(label(name)), *cells, seeds, _gap(rows_of.get(name), name)])
    tables = (
        [
            Table(
                "Results",
                ["metric", a.label, b.label, "difference, over seeds", "difference, over rows"],
                rows,
                _notes(a, b),
            )
        ]
        if rows
        else []
    )
    found = settings([a, b])
    tables += (
        [found]
        if found
        else [Table("Settings that differ", ["setting", a.label, b.label], [], ["None (the seed aside)."])]
    )
    spent = _ledgers(a, b)
    return [*tables, *([spent] if spent.rows else [])], warnings


PLACES = ("run.dir", "run.name", "run.root")  # where a run lies, not what it is


def records(a: Record, b: Record, names: tuple[str, str]) -> list[Table]:
    """A table each of the settings, the data, the environment and the commands of two runs, of what differs alone; no table,
    no difference."""
    kinds: list[tuple[str, list[Json]]] = [
        ("Settings", [{k: v for k, v in _flat(run.config).items() if k not in PLACES} for run in (a, b)]),
        ("Data", [_flat({k: v for k, v in run.data.items() if k != "sources"}) for run in (a, b)]),
        ("Environment", [_flat(run.environment) for run in (a, b)]),
    ]
    words = [shlex.split(run.starts[-1]) if run.starts else [] for run in (a, b)]
    alone = [[w for w in mine if w not in other] for mine, other in (words, words[::-1])]
    kinds.append(("Words of the command", [{"words": shlex.join(each)} for each in alone]))
    tables = []
    for kind, both in kinds:
        keys = differing(both)
        keys += [k for one in both for k in one if k not in keys and any(k not in x for x in both)]  # null is a value
        rows = [[Cell(key), *(Cell(_whole(one[key]) if key in one else "no such key") for one in both)] for key in keys]
        if rows:
            tables.append(Table(f"{kind} that differ", ["", *names], rows, words=True))
    return tables


def _whole(value: Any) -> str:
    """A value with all its digits: what differs must look so."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _ledgers(a: Configuration, b: Configuration) -> Table:
    """What each run of both spent, in a line a phase or sum."""
    sides_ = [_spent(c) for c in (a, b)]
    rows = []
    for key in dict.fromkeys(key for side in sides_ for key in side):
        mine, other = (side.get(key) for side in sides_)
        cells = [
            Cell("–") if x is None else Cell(f"{x:,.1f}" if key.startswith("seconds") else f"{x:,.0f}")
            for x in (mine, other)
        ]
        rows.append([Cell(key), *cells, Cell(f"{other / mine:.2f}" if mine and other is not None else "–")])
    notes, differ = ["Means over seeds; of memory the highest."], in_processes([a, b])
    if differ and rows:
        rows.insert(0, [Cell("in processes"), Cell(differ[a.label]), Cell(differ[b.label]), Cell("–")])
        notes.append(CLOCK)
    return Table("What a run cost", ["", a.label, b.label, "ratio"], rows, notes)


def _spent(c: Configuration) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for run in c.finished:
        kinds: Json = {
            "seconds": run.result.get("seconds"),
            "peak MB": run.result.get("peak_mb"),
            "tokens": run.result.get("tokens"),
        }
        for kind, values in kinds.items():
            for name, value in values.items() if isinstance(values, dict) else ():
                if _is_number(value):
                    found.setdefault(f"{kind} {name}", []).append(value)
        for name in ("steps", "samples"):
            if run.result.get(name) and _is_number(run.result[name]):
                found.setdefault(name, []).append(run.result[name])
    return {key: max(x) if key.startswith("peak") else sum(x) / len(x) for key, x in found.items()}


def _notes(a: Configuration, b: Configuration) -> list[str]:
    shared = [run.seed for run in a.finished if run.seed in {other.seed for other in b.finished}]
    return [
        f"{b.label} less {a.label} [95 % interval]; “noise”: the interval holds 0. Seeds in both: {', '.join(map(str, shared)) or 'none'}.",
        "Over seeds: what another training would give. Over rows: what other held-out rows would, of these very weights.",
    ]


def _over_rows(a: Configuration, b: Configuration) -> tuple[dict[str, Any], str]:
    """(metric → paired difference over the rows of the outputs, why there is none)."""
    pairs = [(x, y) for x in a.finished for y in b.finished if x.seed == y.seed] or list(
        zip(a.finished, b.finished, strict=False)
    )[:1]
    both = [(x.outputs(), y.outputs()) for x, y in pairs]
    both = [(x, y) for x, y in both if x and y]
    if not both:
        return {}, "no outputs of both are there, so there is no interval over held-out rows."
    asked = [e.get("prompt") for e in both[0][0]]
    if any([e.get("prompt") for e in each] != asked for pair in both for each in pair):
        return (
            {},
            "the outputs do not answer the same rows in the same order, so there is no interval over held-out rows.",
        )
    try:
        before, after = ([_statistics(pair[i]) for pair in both] for i in (0, 1))
    except (TypeError, ValueError, KeyError, AttributeError, UserError) as e:  # of damaged files
        return {}, f"the outputs cannot be measured ({e}), so there is no interval over held-out rows."
    if not before[0].stats or not after[0].stats:
        return {}, ""
    resamples = _at(pairs[0][0].config, "evaluate", "bootstrap")
    return over_rows(before, after, resamples if isinstance(resamples, int) and resamples > 0 else RESAMPLES), ""


def _statistics(entries: list[Json]) -> metrics.Sentences:
    """Of the rows of outputs: of pairs their margins, else texts against references, and every number that all rows have."""
    if all(_is_number(e.get("margin")) and "chosen" in e and "rejected" in e for e in entries):
        lengths = [(len(e["chosen"]), len(e["rejected"])) for e in entries]
        sections = [str(e["section"]) for e in entries] if "section" in entries[0] else None
        return metrics.pairs([e["margin"] for e in entries], lengths, [str(e["prompt"]) for e in entries], sections)
    names = [k for k in entries[0] if all(_is_number(e.get(k)) for e in entries)]
    nll = (
        [(e["nll"][0], e["nll"][1]) for e in entries] if all(isinstance(e.get("nll"), list) for e in entries) else None
    )
    return metrics.sentences(
        [str(e.get("response", "")) for e in entries],
        [e.get("references") or [] for e in entries],
        {k: [e[k] for e in entries] for k in names},
        nll,
    )
