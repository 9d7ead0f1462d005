"""What a report says, as tables, curves and sentences: the page, the terminal and the exports print the same ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import UserError, suggest
from alignkit.labels import LABELS, PER_CENT
from alignkit.report.charts import Series
from alignkit.report.collect import LEDGER, Configuration, Json, Record, _at, _is_number, differing
from alignkit.report.stats import Estimate, difference, interval

CURVES = ("reward", "kl", "loss", "length")  # after the selected dev metric
MORE = (
    "nll", "margin", "preference_accuracy", "dev/reward", "dev/second", "divergence", "agreement", "reward_loss", "selection_loss",
    "cut_off", "zero_advantage", "nll_sampled", "explained_variance", "grad_norm",
)  # fmt: skip
BUDGETS = {
    "seconds": "seconds of training, without evaluations",
    "tokens/sampled": "tokens sampled",
    "tokens/trained": "tokens trained",
    "samples": "samples",
}
CLOCK = "Seconds are of the clock, however many processes shared the work, and memory is the first one's: not the same cost."
DECODING = tuple(
    f"evaluate.{k}" for k in ("decode", "beams", "temperature", "max_new_tokens", "protocol", "rounds", "samples")
)
CUT_OFF = 0.05  # share of responses at their limit above which the report warns
OWN = {  # of result.json, said elsewhere in the report
    "status", "stage", "name", "seed", "signature", "weights_sha256", "evaluation", "steps", "ended_by", "best", "audit", "samples",
    "tokens", "seconds", "peak_mb", "resumes", "directory", "training", "verdict", "steps_done", "decode", "settings", "model",
    "signatures", "data_sha256",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A text; ``faint`` where it says nothing, ``strong`` where it does."""

    text: str
    faint: bool = False
    strong: bool = False
    value: Estimate | None = None


@dataclass
class Table:
    """Rows under a head; the first cell of each names it."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    words: bool = False  # cells are words rather than numbers


@dataclass
class Curve:
    """Lines of one measure."""

    title: str
    x_label: str
    lines: list[Series]


@dataclass
class Stage:
    """All configurations of one stage."""

    name: str
    configurations: list[Configuration]
    baseline: Configuration
    tables: list[Table]  # results, differences
    verdicts: list[str]
    curves: list[Curve]
    more_curves: list[Curve]
    budgets: list[Curve]
    ledger: list[Table]
    settings: Table | None
    others: list[Table]  # whatever else result.json says


@dataclass
class Report:
    """Everything, in the order in which it is shown."""

    configurations: list[Configuration]
    stages: list[Stage]
    pipelines: list[Table]
    warnings: list[str]
    alarms: list[str]
    claims: list[Table] = field(default_factory=list)  # of `alignkit claim`: what was measured and the verdicts


def build(
    configurations: list[Configuration], warnings: list[str], baseline: str | None = None, how: str = "t"
) -> Report:
    """Compute a report.

    Args:
        baseline: the label, name or folder of the configuration that others are compared with; by default the first of each stage.
        how: intervals over seeds by ``"t"`` or ``"bootstrap"``.

    Raises:
        UserError: no configuration is called so.
    """
    chosen = find(configurations, baseline) if baseline else None
    stages = []
    for name in dict.fromkeys(c.stage for c in configurations):
        if name != "pipeline":
            same = [c for c in configurations if c.stage == name]
            stages.append(_stage(name, same, chosen if chosen in same else same[0], how))
    pipelines = [pipeline(c, configurations) for c in configurations if c.stage == "pipeline"]
    alarms = [
        f"{_who(c, run)}: {alarm.get('text', alarm)}"
        for c in configurations if c.stage != "pipeline" for run in c.runs for alarm in _alarms(run)
    ]  # fmt: skip
    every = [*warnings, *(w for c in configurations for w in of_runs(c)), *_of_stages(stages)]
    return Report(configurations, stages, pipelines, list(dict.fromkeys(every)), alarms)


def find(configurations: list[Configuration], word: str) -> Configuration:
    """The configuration with this label, folder or, if there is only one, name."""
    folder = Path(word).expanduser().resolve()
    for c in configurations:
        if word == c.label or any(run.folder.resolve() == folder for run in c.runs):
            return c
    named = [c for c in configurations if word == c.first.name]
    if len(named) == 1:
        return named[0]
    raise UserError(
        f"--baseline {word}: no configuration is called so.{suggest(word, [c.label for c in configurations])}"
    )


# ---- a stage ---------------------------------------------------------------------------------------------------------


def _stage(name: str, configurations: list[Configuration], baseline: Configuration, how: str) -> Stage:
    tables = [headline(configurations, how)]
    tables += [
        against_start(configurations, how),
        against_baseline(configurations, baseline, how),
        training(configurations, how),
    ]
    select = next((s for c in configurations if (s := _at(c.first.config, "evaluate.select"))), None)
    keys = list(dict.fromkeys(k for c in configurations for run in c.runs for line in run.logged[-50:] for k in line))
    wanted = [k for k in (f"dev/{select}", *CURVES) if k in keys]
    if not wanted:  # a stage that this report does not know: what it logs
        wanted = [k for k in keys if k not in ("step", "lr", "grad_norm") and not k.startswith(LEDGER)][:6]
    rest = [
        k
        for k in (*(k for k in keys if k.startswith("dev/") and "/audit/" not in k), *MORE)
        if k in keys and k not in wanted
    ]
    measure = next((k for k in wanted if k.startswith("dev/")), wanted[0] if wanted else None)
    known = {k for c in configurations for run in c.runs for line in run.logged[-1:] for k in line} | {"seconds"}
    budgets = [b for b in BUDGETS if b in known and not (b == "tokens/trained" and "tokens/sampled" in known)]
    curves = {key: curve(configurations, key) for key in dict.fromkeys([*wanted, *rest])}
    return Stage(
        name=name, configurations=configurations, baseline=baseline,
        tables=[t for t in tables if t.rows],
        verdicts=[*_sentences(configurations, baseline, select, how), *_verdicts(configurations)],
        curves=[curves[k] for k in wanted if curves[k].lines],
        more_curves=[curves[k] for k in dict.fromkeys(rest) if curves[k].lines],
        budgets=[c for b in budgets if measure and (c := curve(configurations, measure, b)).lines],
        ledger=[t for t in ledger(configurations) if t.rows],
        settings=settings(configurations), others=others(configurations),
    )  # fmt: skip


def metrics_of(configurations: list[Configuration], when: str = "after") -> list[str]:
    """Every test metric, in the order in which runs give them."""
    return list(dict.fromkeys(m for c in configurations for run in c.finished for m in run.tested(when)[1]))


def headline(configurations: list[Configuration], how: str = "t") -> Table:
    """A line a configuration: each test metric's mean over seeds."""
    names = metrics_of(configurations)
    split = next((s for c in configurations for run in c.finished if (s := run.tested()[0])), "test")
    rows: list[list[Cell]] = []
    starts: dict[str, tuple[list[Cell], list[str]]] = {}
    for c in configurations:  # where each began; often all in one place
        cells = [estimated(c.values(name, "before"), name, how, c, "before") for name in names]
        if any(cell.value for cell in cells):
            starts.setdefault(json.dumps([cell.text for cell in cells]), (cells, []))[1].append(c.label)
    for cells, of in starts.values():
        what = (
            "start" if len(starts) == 1 else f"start of {of[0]}" + (f" and {len(of) - 1} more" if len(of) > 1 else "")
        )
        rows.append([Cell(what), Cell("–"), *cells])
    singles = False
    for c in configurations:
        if c.finished:
            rows.append([Cell(c.label), Cell(_counted(c)), *(estimated(c.values(m), m, how, c) for m in names)])
            singles |= len(c.finished) == 1
    notes = [f"Of the {split} rows; mean over seeds [95 % interval, {_way(how)}]."] if names else []
    if singles and names:
        notes.append("With one seed the interval is over held-out rows, and says nothing about other seeds.")
    return Table("Results", ["configuration", "seeds", *map(label, names)], rows if names else [], notes)


def against_start(configurations: list[Configuration], how: str) -> Table:
    """After less before, paired by seed."""
    names = metrics_of(configurations, "before")
    rows, singles = [], False
    for c in configurations:
        gaps = [_change(c, m, how) for m in names]
        if any(gaps):
            rows.append([Cell(c.label), *(_gap(gap, m) for gap, m in zip(gaps, names, strict=True))])
            singles |= len(c.finished) == 1
    notes = ["After less before, paired by seed [95 % interval]. Grey, “noise”: the interval holds 0."]
    if singles:
        notes.append("With one seed the interval is over held-out rows, and says nothing about other seeds.")
    return Table("Change from the start", ["configuration", *map(label, names)], rows, notes)


def _change(c: Configuration, metric: str, how: str) -> Estimate | None:
    """After less before; of one seed with the paired interval over rows that the run itself gives."""
    gap = difference(c.values(metric), c.values(metric, "before"), how)
    if gap is None or gap.low is not None:
        return gap
    cell = next(
        (
            x
            for run in c.finished
            if isinstance(x := _at(run.result, "evaluation", "after", "difference", metric), dict)
        ),
        {},
    )
    low, high = cell.get("low"), cell.get("high")
    return Estimate(gap.mean, low, high, 1, paired=True) if _is_number(low) and _is_number(high) else gap


def against_baseline(configurations: list[Configuration], baseline: Configuration, how: str) -> Table:
    """Each configuration less the baseline, paired by seed; none where they were measured on other rows."""
    names = [m for m in metrics_of(configurations) if baseline.values(m)]
    rows, pairings, tests, strange = [], set(), 0, []
    for c in configurations:
        if c is baseline or not c.finished:
            continue
        if not same_rows(c, baseline):
            strange.append(c.label)
            continue
        gaps = [difference(c.values(m), baseline.values(m), how) for m in names]
        tests += sum(1 for g in gaps if g and g.low is not None)
        pairings |= {g.paired for g in gaps if g and g.n > 1}
        if any(gaps):
            rows.append([Cell(c.label), Cell(str(max(g.n for g in gaps if g))), *map(_gap, gaps, names)])
    notes = [f"Less {baseline.label}, paired by seed [95 % interval]. Grey, “noise”: the interval holds 0."]
    if False in pairings:
        notes.append("Where configurations share fewer than two seeds, the interval is Welch's, of unpaired runs.")
    if tests > 5:
        notes.append(
            f"Of {tests} such intervals about {max(1, round(0.05 * tests))} would leave 0 out by chance alone."
        )
    if strange:
        notes.append(f"Not compared, because their held-out rows are not the same: {', '.join(strange)}.")
    return Table(f"Difference to {baseline.label}", ["configuration", "pairs", *map(label, names)], rows, notes)


def training(configurations: list[Configuration], how: str) -> Table:
    """What was logged of the step that gave the final weights."""
    found = [
        (c, [t for run in c.finished if isinstance(t := run.result.get("training"), dict)]) for c in configurations
    ]
    names = list(dict.fromkeys(k for _, each in found for one in each for k, v in one.items() if _is_number(v)))
    rows = []
    for c, each in found:
        if each:
            best = [b.get("step") for run in c.finished if isinstance(b := run.result.get("best"), dict)]
            values = [
                estimated(dict(enumerate(x[m] for x in each if _is_number(x.get(m)))), _as_logged(m), how)
                for m in names
            ]
            rows.append(
                [
                    Cell(c.label),
                    Cell(", ".join(str(run.steps) for run in c.finished)),
                    Cell(", ".join(map(str, best)) or "–"),
                    *values,
                ]
            )
    notes = [
        "Logged at the step that gave the final weights; the best step is the one of the best dev value (0: the start)."
    ]
    return Table(
        "At the final weights", ["configuration", "steps", "best step", *map(logged_label, names)], rows, notes
    )


def same_rows(a: Configuration, b: Configuration) -> bool:
    """False where both are known to have been measured on different held-out rows."""
    mine, others_ = ({run.held_out for run in c.finished if run.held_out} for c in (a, b))
    return not mine or not others_ or mine == others_


def curve(configurations: list[Configuration], key: str, x: str = "step") -> Curve:
    """A measure over steps, or over a budget: the mean of finished runs with the range of their values, unfinished ones thin."""
    lines = []
    for i, c in enumerate(configurations):
        whole = c.finished or []
        found = [p for run in whole if (p := _points(run, key, x))]
        shared = sorted(set.intersection(*(set(p) for p in found))) if found else []
        if shared:
            xs = [sum(p[s][0] for p in found) / len(found) for s in shared]
            columns = [[p[s][1] for p in found] for s in shared]
            ys = [sum(col) / len(col) for col in columns]
            several = len(found) > 1
            lows, highs = ([least(col) for col in columns] if several else None for least in (min, max))
            lines.append(Series(c.label, xs, ys, lows, highs, colour=i))
        for run in c.runs:
            if run not in whole and (p := _points(run, key, x)):
                text = f"{_who(c, run)} (unfinished)"
                lines.append(
                    Series(text, [p[s][0] for s in sorted(p)], [p[s][1] for s in sorted(p)], colour=i, thin=True)
                )
    return Curve(logged_label(key), BUDGETS.get(x, x), lines)


def _points(run: Record, key: str, x: str) -> dict[int, tuple[float, float]]:
    """Step → (x, y) of the lines that have both."""
    found = {}
    for line in run.logged:
        y = line.get(key)
        at = line["step"] if x == "step" else run.total(line, x)
        if _is_number(y) and math.isfinite(y) and at is not None:
            found[line["step"]] = (float(at), float(y))
    return found


def ledger(configurations: list[Configuration]) -> list[Table]:
    """Where the time went, and what was used: means over finished runs, the highest memory."""
    rows, sums = [], []
    for c in configurations:
        seconds = [s for run in c.finished if isinstance(s := run.result.get("seconds"), dict)]
        if not seconds:
            continue
        whole = sum(_mean([s.get(p) for s in seconds]) for p in _union(seconds))
        for phase in _union(seconds):
            mean = _mean([s.get(phase) for s in seconds])
            peak = max((_number_at(run.result, "peak_mb", phase) for run in c.finished), default=0.0)
            share = f"{mean / whole:.0%}" if whole else "–"
            rows.append(
                [Cell(c.label), Cell(phase), Cell(f"{mean:,.1f}"), Cell(share), Cell(f"{peak:,.0f}" if peak else "–")]
            )
        tokens = [t for run in c.finished if isinstance(t := run.result.get("tokens"), dict)]
        sums.append((c, whole, {k: _mean([t.get(k) for t in tokens]) for k in _union(tokens)}))
    kinds = list(dict.fromkeys(k for *_, t in sums for k in t))
    differ = in_processes([c for c, *_ in sums])
    totals = [
        [Cell(c.label), Cell(_counted(c)), Cell(f"{_mean([r.steps for r in c.finished]):,.0f}"), Cell(f"{whole:,.1f}"),
         *([Cell(differ[c.label])] if differ else []),
         Cell(_amount(_mean([r.result.get("samples") for r in c.finished]))), *(Cell(_amount(t.get(k))) for k in kinds)]
        for c, whole, t in sums
    ]  # fmt: skip
    return [
        Table(
            "Phases",
            ["configuration", "phase", "seconds", "share", "peak MB"],
            rows,
            ["Means over seeds; peak memory is the highest of all."],
        ),
        Table(
            "Totals of a run",
            [
                "configuration",
                "seeds",
                "steps",
                "seconds",
                *(["in processes"] if differ else []),
                "samples",
                *(f"tokens {k}" for k in kinds),
            ],
            totals,
            [CLOCK] if differ else [],
        ),
    ]


def in_processes(configurations: list[Configuration]) -> dict[str, str]:
    """Configuration → how many processes shared its runs, in words; empty where all that is known was in as many."""
    counts = {c.label: sorted({n for run in c.finished for n in run.processes}) for c in configurations}
    if len({n for each in counts.values() for n in each}) < 2:
        return {}
    return {name: " and ".join(map(str, each)) or "not known" for name, each in counts.items()}


def settings(configurations: list[Configuration]) -> Table | None:
    """The settings that are not the same in all configurations."""
    keys = differing([c.first.settings for c in configurations])
    if len(configurations) < 2 or not keys:
        return None
    rows = [[Cell(key), *(Cell(_value(c.first.settings, key)) for c in configurations)] for key in keys]
    return Table(
        "Settings that differ",
        ["setting", *(c.label for c in configurations)],
        rows,
        ["–: this configuration has no such setting."],
        words=True,
    )


def others(configurations: list[Configuration]) -> list[Table]:
    """What else result.json says: numbers as a table of means, lists of records as tables of the first run."""
    found = []
    numbers = [
        (c, [_numbers({k: v for k, v in run.result.items() if k not in OWN}) for run in c.finished])
        for c in configurations
    ]
    keys = list(dict.fromkeys(k for _, each in numbers for one in each for k in one))
    if keys:
        shown = [(c, each) for c, each in numbers if any(each)]
        rows = [[Cell(k), *(_other([x[k] for x in each if k in x], k) for _, each in shown)] for k in keys]
        found.append(Table("Other results", ["result", *(c.label for c, _ in shown)], rows))
    for c in configurations:
        for run in c.finished[:1]:
            found += [Table(f"{_who(c, run)}: {key}", *_columns(records)) for key, records in _lists(run.result)]
    return found


def _other(values: list[float], name: str) -> Cell:
    """A number of unknown meaning: without an interval where runs agree on it."""
    return Cell(f"{values[0]:,.10g}") if len(set(values)) == 1 else estimated(dict(enumerate(values)), name)


def _lists(value: Any, path: str = "") -> list[tuple[str, list[Json]]]:
    found = []
    for key, item in value.items() if isinstance(value, dict) else ():
        if path or key not in OWN:
            where = f"{path}.{key}" if path else key
            if isinstance(item, list) and item and all(isinstance(x, dict) for x in item):
                found.append((where, item))
            found += _lists(item, where)
    return found


def _columns(records: list[Json]) -> tuple[list[str], list[list[Cell]]]:
    keys = list(dict.fromkeys(k for one in records for k in one))
    return ["no.", *keys], [
        [Cell(str(i)), *(Cell(_plain(one.get(k))) for k in keys)] for i, one in enumerate(records[:64], 1)
    ]


def _numbers(value: Any, path: str = "") -> dict[str, float]:
    """Dotted key → every number in it; of lists the numbers too, by place, where they are short."""
    if _is_number(value):
        return {path: float(value)} if math.isfinite(value) else {}
    items: Any = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value, 1)
        if isinstance(value, list) and len(value) <= 12
        else ()
    )
    found: dict[str, float] = {}
    for key, item in items:
        if not (isinstance(value, list) and isinstance(item, dict)):
            found |= _numbers(item, f"{path}.{key}" if path else str(key))
    return found


def pipeline(c: Configuration, configurations: list[Configuration]) -> Table:
    """The steps of a pipeline, how far each is in how many seeds, and its selected metric."""
    steps: Any = next((s for run in c.runs if isinstance(s := run.config.get("steps"), dict)), {})
    rows = []
    mine = {id(run) for run in c.runs}
    for step in steps:
        there = [(o, run) for o in configurations for run in o.runs if run.step == step and id(run.pipeline) in mine]
        done = [run for _, run in there if run.finished]
        owner = there[0][0] if there else None
        metric = _metric(owner) if owner else None
        seconds = _mean([sum(_numbers(run.result.get("seconds")).values()) for run in done])
        result = estimated(owner.values(metric), metric, "t", owner) if owner and metric else Cell("–")
        rows.append([
            Cell(step), Cell(owner.stage if owner else "not begun"), Cell(f"{len(done)} of {len(c.runs)}", strong=len(done) < len(c.runs)),
            Cell(f"{seconds:,.1f}" if done else "–"), Cell(label(metric) if metric else "–"), result,
        ])  # fmt: skip
    return Table(c.label, ["step", "stage", "finished", "seconds", "metric", "result"], rows)


def _metric(c: Configuration) -> str | None:
    names, select = metrics_of([c]), _at(c.first.config, "evaluate.select")
    return select if select in names else names[0] if names else None


# ---- sentences -------------------------------------------------------------------------------------------------------


def _sentences(configurations: list[Configuration], baseline: Configuration, select: str | None, how: str) -> list[str]:
    """By the selected metric: who has left its start and who is ahead of the baseline, or that noise hides it."""
    names = metrics_of(configurations)
    metric = select if select in names else names[0] if names else None
    if metric is None:
        return []
    found, singles = [], list[str]()
    for c in configurations:
        gap = _change(c, metric, how)
        if gap is not None and gap.low is not None:
            amount = f"{label(metric)} {_with_bounds(gap.mean, gap.low, gap.high, metric, sign=True)}"
            over = f"over {gap.n} seeds" if gap.n > 1 else "over the held-out rows of one seed"
            found.append(
                f"{c.label} against its start: {amount} {over}" + ("." if gap.clear else ", which is within noise.")
            )
    for c in configurations if baseline.values(metric) else ():
        gap = (
            difference(c.values(metric), baseline.values(metric), how)
            if c is not baseline and same_rows(c, baseline)
            else None
        )
        if gap is None:
            continue
        amount = f"{label(metric)} {_with_bounds(gap.mean, gap.low, gap.high, metric, sign=True)}"
        if gap.low is None:
            singles.append(f"{c.label} {amount}")
        else:
            pairs = f"{gap.n} {'pairs of seeds' if gap.paired else 'seeds, unpaired'}"
            found.append(
                f"{c.label} against {baseline.label}: {amount} over {pairs}"
                + ("." if gap.clear else ", which is within noise.")
            )
    if singles:
        found.append(f"Against {baseline.label}, of one seed each, so that noise cannot be told: {'; '.join(singles)}.")
    return found


def _verdicts(configurations: list[Configuration]) -> list[str]:
    return [
        f"{_who(c, run)}: {run.result['verdict']}"
        for c in configurations
        for run in c.finished
        if run.result.get("verdict")
    ]


def _alarms(run: Record) -> list[Json]:
    """Of the audit; of an unfinished run what its log says."""
    if run.finished:
        alarms = run.result.get("audit")
        return [a for a in alarms if isinstance(a, dict)] if isinstance(alarms, list) else []
    first: dict[str, int] = {}
    for line in run.logged:
        for key, value in line.items():
            if "audit/" in key and value == 1:
                first.setdefault(key.replace("audit/", ""), line["step"])
    return [{"text": f"{name} rings at step {step}."} for name, step in first.items()]


def of_runs(c: Configuration) -> list[str]:
    """What is odd about the runs of a configuration; what holds of several is said once."""
    said: dict[str, list[Record]] = {}
    shares: dict[str, list[float]] = {}
    for run in c.runs:
        for text in _of_run(run):
            said.setdefault(text, []).append(run)
        for key in ("dev/cut_off", "cut_off"):
            share = next((line[key] for line in reversed(run.logged) if _is_number(line.get(key))), None)
            if share is not None:
                shares.setdefault(key, []).append(share)
    found = [f"{_who(c, *runs)}: {text}" for text, runs in said.items()]
    for key, each in shares.items():
        if max(each) > CUT_OFF:
            low, high = f"{min(each):.0%}", f"{max(each):.0%}"
            what, limit = ("dev responses", "evaluate") if key == "dev/cut_off" else ("the last samples", "algo")
            found.append(
                f"{c.label}: {low if low == high else f'{low} to {high}'} of {what} are cut off at {limit}.max_new_tokens."
            )
    names = metrics_of([c])
    for name in names:
        without = [run for run in c.finished if name not in run.tested()[1]]
        if without:
            found.append(f"{c.label}: {label(name)} is missing in {', '.join(f'seed {run.seed}' for run in without)}.")
    if (
        c.finished
        and not names
        and any(run.logged for run in c.finished)
        and c.stage not in ("select", "refine", "study", "pipeline")
    ):
        found.append(f"{c.label}: no held-out metric. The run had no test rows, or evaluate.test=false.")
    for split in ("train", "test"):
        named = {
            str(_at(run.config, "data", split)) for run in c.runs
        }  # where names differ, runs of a seed build on each other
        if len(named) == 1 and len({str(d) for run in c.runs if (d := _at(run.data, "sha256", f"data.{split}"))}) > 1:
            found.append(f"{c.label}: its runs have the same settings, but the {split} file was not the same.")
    return found


def _of_run(run: Record) -> list[str]:
    found = [f"{problem}." for problem in run.problems]
    if run.stage == "pipeline":
        return found if run.finished else [*found, "this pipeline is unfinished. Repeat its command to go on."]
    if not run.finished:
        planned = _at(run.config, "algo.steps")
        of = f" of {planned}" if isinstance(planned, int) and planned >= run.steps else ""
        again = (
            "Repeat its command to go on."
            if run.saved
            else "Nothing of it is saved: its command starts from the beginning."
        )
        found.append(f"unfinished, {run.steps}{of} steps are logged; left out of all means. {again}")
    overlap = run.data.get("overlap")
    for split, n in overlap.items() if isinstance(overlap, dict) else ():
        if n:
            rows = _number_at(run.data, "rows", split)
            found.append(f"{n} of {rows:.0f} {split} prompts stand word for word in the training data.")
    best = run.result.get("best")
    if isinstance(best, dict) and best.get("step") == 0 and run.steps:
        kept = ", so final/ holds the start" if _at(run.config, "evaluate.final") == "best" else ""
        found.append(f"the start was the best on dev{kept}.")
    if run.result.get("ended_by") not in (None, "algo.steps", "algo.epochs"):
        found.append(f"{run.result['ended_by']} ended it after {run.steps} steps.")
    unread = run.result.get("unread")
    if isinstance(unread, list) and unread:
        found.append(f"given, but read by nothing in the run: {', '.join(map(str, unread))}.")
    return found


def _of_stages(stages: list[Stage]) -> list[str]:
    """What stands against comparing the configurations of a stage."""
    found = []
    singles = [
        c.label for stage in stages if stage.name != "study" for c in stage.configurations if len(c.finished) == 1
    ]
    if singles:
        found.append(f"One seed only: {', '.join(singles)}. How much another seed would change is not known.")
    for stage in stages:
        base = stage.baseline
        apart = [c.label for c in stage.configurations if not same_rows(c, base)]
        if apart:
            found.append(
                f"Not the same held-out rows as {base.label}: {', '.join(apart)}. These numbers cannot be compared."
            )
        ways: dict[str, list[str]] = {}
        for c in stage.configurations:
            keys = [k for k in differing([c.first.settings, base.first.settings]) if k in DECODING]
            if keys:
                ways.setdefault(", ".join(keys), []).append(c.label)
        found += [f"Not evaluated as {base.label} was ({keys} differ): {', '.join(of)}." for keys, of in ways.items()]
    runs = [run for stage in stages for c in stage.configurations for run in c.runs if run.environment]
    for key, name in (
        ("git_commit", "commits of alignkit"),
        ("alignkit", "versions of alignkit"),
        ("packages.torch", "versions of torch"),
        ("packages.transformers", "versions of transformers"),
        ("gpus", "GPUs"),
        ("processes", "numbers of processes"),
        ("shard", "values of run.shard"),
    ):
        said = [_at(run.environment, key) for run in runs]
        values = {
            json.dumps(x) for x in said if x is not None or key not in ("processes", "shard")
        }  # older runs lack them
        if len(values) > 1:
            found.append(
                f"The runs were made with different {name}: {', '.join(sorted(v.strip(chr(34))[:24] for v in values))}."
            )
    return found


# ---- cells -----------------------------------------------------------------------------------------------------------


def label(name: str) -> str:
    """A metric in words."""
    head, _, tail = name.partition("/")
    if head == "dev" and tail:
        return f"{label(tail)} on dev"
    if head in ("win_rate", "length_controlled"):
        against, _, judge = tail.rpartition("/")
        return f"{'wins' if head == 'win_rate' else 'wins at equal length'} against {against} by {judge} %"
    return LABELS.get(name, name.replace("_", " ")) + (" %" if head == "section" else "")


def logged_label(key: str) -> str:
    """A measure of the log in words: what is per cent on held-out rows is a share in training."""
    return label(key) if key.startswith("dev/") else label(key).removesuffix(" %")


def _as_logged(key: str) -> str:
    return key if key.startswith("dev/") else f"logged {key}"  # a share has three digits


def digits(name: str) -> int:
    return 2 if name.rpartition("dev/")[2].partition("/")[0] in PER_CENT else 3


def number(value: float, name: str, spread: float = 0.0) -> str:
    """A number as the tables print it: two decimals of per cent, three of others, more where ``spread`` (half the width of an
    interval) asks for them, fewer of large ones."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if spread > 0 and abs(value) < 100:
        return f"{value:,.{max(digits(name), min(8, math.ceil(-math.log10(spread))))}f}"
    if abs(value) >= 100:
        return f"{value:.1f}"
    if value and abs(value) < 10 ** -digits(name):
        return f"{value:.2g}"
    return f"{value:,.{digits(name)}f}"


def estimated(
    values: dict[Any, float], name: str, how: str = "t", c: Configuration | None = None, when: str = "after"
) -> Cell:
    """Mean [low, high]; of a single run, or of equal ones, the interval over rows that a run reports itself."""
    if not any(map(math.isfinite, values.values())):
        return Cell("–", faint=True)
    found = interval(list(values.values()), how)
    low, high = found.low, found.high
    if c is not None and (low is None or (when == "before" and len(set(values.values())) == 1)):
        cell: Json = next((x[name] for run in c.finished if name in (x := run.tested(when)[1])), {})
        low, high = cell.get("low"), cell.get("high")
    return Cell(_with_bounds(found.mean, low, high, name), value=Estimate(found.mean, low, high, found.n))


def _with_bounds(mean: float, low: float | None, high: float | None, name: str, sign: bool = False) -> str:
    show = _signed if sign else number
    if low is None or high is None:
        return show(mean, name)
    spread = (high - low) / 2
    return f"{show(mean, name, spread)} [{show(low, name, spread)}, {show(high, name, spread)}]"


def _gap(gap: Estimate | None, name: str) -> Cell:
    if gap is None:
        return Cell("–", faint=True)
    text = _with_bounds(gap.mean, gap.low, gap.high, name, sign=True)
    if gap.low is None:
        return Cell(f"{text} (one seed)", faint=True, value=gap)
    if gap.low == gap.mean == gap.high == 0:
        return Cell(f"{number(0, name)} equal", faint=True, value=gap)
    return Cell(text if gap.clear else f"{text} noise", faint=not gap.clear, strong=gap.clear, value=gap)


def _signed(value: float, name: str, spread: float = 0.0) -> str:
    value = 0.0 if abs(value) < 1e-12 else value  # rounding, as of two means that are equal
    text = number(abs(value), name, spread)
    return text if not float(text.replace(",", "")) else ("+" if value > 0 else "-") + text


def _counted(c: Configuration) -> str:
    n, whole = len(c.finished), len(c.runs)
    return str(n) if n == whole else f"{n} of {whole}"


def _who(c: Configuration, *runs: Record) -> str:
    """A configuration, with the seeds that are meant where they are not all of it."""
    if len(runs) == len(c.runs) and (len(runs) > 1 or runs[0].seed in (0, None)):
        return c.label
    return f"{c.label}, seed{'s' * (len(runs) > 1)} {', '.join(str(run.seed) for run in runs)}"


def _way(how: str) -> str:
    return "Student's t" if how == "t" else "bootstrap over seeds"


def _value(flat: Json, key: str) -> str:
    return _plain(flat[key]) if key in flat else "–"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(map(_is_number, value)):
        return ", ".join(f"{x:.4g}" for x in value[:12]) + (" …" if len(value) > 12 else "")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 160 else text[:159] + "…"


def _mean(values: list[Any]) -> float:
    known = [v for v in values if _is_number(v)]
    return sum(known) / len(known) if known else 0.0


def _union(found: list[Json]) -> list[str]:
    return list(dict.fromkeys(k for one in found for k, v in one.items() if _is_number(v)))


def _amount(value: float | None) -> str:
    return f"{value:,.0f}" if value else "–"


def _number_at(value: Json, *path: str) -> float:
    found = _at(value, *path)
    return float(found) if _is_number(found) else 0.0
