"""The report as one HTML file: no script is needed to read it, nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from alignkit import __version__
from alignkit.report import charts
from alignkit.report.collect import Json, Record, _at
from alignkit.report.content import Cell, Curve, Report, Stage, Table

HERE = Path(__file__).parent
ASKED = (
    "prompt",
    "references",
    "label",
    "chosen",
    "rejected",
    "ratings",
    "candidates",
    "golden",
    "section",
)  # of a held-out row
SIDE_BY_SIDE = 6  # systems in one card
LONGEST = 1500  # characters of a text that are shown
STEPS, PER_STEP = 6, 3  # samples over time
PLOTS = ("trajectories.svg", "losses.svg")  # of stage select


def render(report: Report, title: str, rows: int = 40, command: str = "") -> str:
    """The page.

    Args:
        rows: held-out rows whose outputs are shown, the first of the data: nobody has picked them.
        command: what makes the page again.
    """
    script, style = ((HERE / name).read_text(encoding="utf-8").strip() for name in ("search.js", "style.css"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "template.html.jinja").read_text(encoding="utf-8"))
    idents = (f"chart{i}" for i in range(1_000_000))
    every = [run for c in report.configurations for run in c.runs]
    return template.render(
        title=title, report=report, version=__version__, style=Markup(style), script=Markup(script),
        script_hash=_csp_hash(script), style_hash=_csp_hash(style),
        counts=_counts(report, every), chart=lambda c: chart(c, next(idents)), numbers=numbers, colours=charts.COLOURS,
        cards={stage.name: cards(stage, rows) for stage in report.stages},
        samples={stage.name: list(samples(stage)) for stage in report.stages},
        plots={stage.name: list(plots(stage)) for stage in report.stages},
        runs=_runs(report), environment=_environment(every), sources=_sources(every),
        histories=[(str(run.folder), run.starts) for run in every if run.starts], slug=_slug,
        command=command,
    )  # fmt: skip


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _counts(report: Report, runs: list[Record]) -> str:
    unfinished = sum(not run.finished for run in runs)
    stages = ", ".join(stage.name for stage in report.stages)
    return (
        f"{len(runs)} run{'s' * (len(runs) != 1)} in {len(report.configurations)} configuration{'s' * (len(report.configurations) != 1)}"
        + (f", {unfinished} unfinished" if unfinished else "")
        + (f"; {'stages' if len(report.stages) > 1 else 'stage'} {stages}" if stages else "")
        + "."
    )


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())


# ---- charts ----------------------------------------------------------------------------------------------------------


def chart(curve: Curve, ident: str) -> Markup:
    """The SVG of a curve."""
    return Markup(charts.line_chart(curve.title, curve.x_label, curve.title, curve.lines, ident))


def numbers(curve: Curve) -> Table:
    """The curve as a table: its text alternative."""
    rows = []
    for s in curve.lines:
        shown = [s.ys[0], min(s.ys), max(s.ys), s.ys[-1]]
        rows.append([Cell(s.label), *(Cell(charts.said(y)) for y in shown), Cell(charts.said(s.xs[-1]))])
    return Table(curve.title, ["line", "first", "lowest", "highest", "last", f"last {curve.x_label}"], rows)


# ---- texts -----------------------------------------------------------------------------------------------------------


def text_of(value: Any) -> str:
    """A prompt, a response or another value as it is to be read; long ones cut."""
    if isinstance(value, list) and value and all(isinstance(x, dict) and "content" in x for x in value):
        value = "\n".join(f"{x.get('role', '')}: {x['content']}" for x in value)
    if isinstance(value, list) and all(isinstance(x, str) for x in value):
        value = "\n".join(value)
    text = (
        value
        if isinstance(value, str)
        else f"{value:.4g}"
        if isinstance(value, float)
        else json.dumps(value, ensure_ascii=False)
    )
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def cards(stage: Stage, rows: int) -> Json:
    """Held-out rows, each with what every system said to it: the start, then the configurations, of one seed each.

    Systems are the configurations that have answered the very rows of the first; ``left_out`` names the others.
    """
    systems: list[tuple[str, list[Json]]] = []
    prompts: list[Any] = []
    left_out: list[str] = []
    starts: list[list[Json]] = []
    for c in stage.configurations:
        run = next((run for run in c.finished or c.runs if run.outputs()), None)
        after = run.outputs() if run else []
        if run is None or not after:
            continue
        asked = [e.get("prompt") for e in after]
        prompts = prompts or asked
        if asked != prompts or len(systems) >= SIDE_BY_SIDE:
            left_out.append(c.label)
            continue
        before = run.outputs("before")
        if [e.get("prompt") for e in before] == prompts and before not in starts:
            systems.append(("start" if not starts else f"start of {c.label}", before))
            starts.append(before)
        systems.append((c.label if len(c.runs) == 1 else f"{c.label}, seed {run.seed}", after))
    found = []
    for i in range(min(rows, len(prompts))):
        entries = [(name, each[i]) for name, each in systems]
        question = [(key, text_of(entries[0][1][key])) for key in ASKED if entries[0][1].get(key) not in (None, [], "")]
        said = [(name, *_answer(entry)) for name, entry in entries]
        found.append({"question": question, "said": said, "changed": len({text for _, text, _ in said}) > 1})
    return {"rows": found, "of": len(prompts), "left_out": left_out}


def _answer(entry: Json) -> tuple[str, str]:
    """(text, numbers) of an entry."""
    rest = {k: v for k, v in entry.items() if k not in (*ASKED, "response")}
    texts = [entry["response"]] if isinstance(entry.get("response"), str) else []
    texts += [f"{k}: {v}" for k, v in rest.items() if isinstance(v, str)]
    values = [f"{k.replace('_', ' ')} {text_of(v)}" for k, v in rest.items() if not isinstance(v, str)]
    return text_of("\n".join(texts)), ", ".join(values)


def samples(stage: Stage) -> Iterator[tuple[str, list[tuple[int, list[Json]]]]]:
    """Of a run of each configuration: a few samples at a few steps, from the first to the last."""
    for c in stage.configurations:
        for run in (c.finished or c.runs)[:1]:
            by_step: dict[int, list[Json]] = {}
            for one in run.samples():
                by_step.setdefault(one["step"], []).append(one)
            steps = sorted(by_step)
            some = sorted({steps[round(i * (len(steps) - 1) / (STEPS - 1))] for i in range(STEPS)}) if steps else []
            shown = [(s, [_sample(x) for x in by_step[s][:PER_STEP]]) for s in some]
            if shown:
                yield (c.label if len(c.runs) == 1 else f"{c.label}, seed {run.seed}"), shown


def _sample(one: Json) -> Json:
    audit = text_of(one["audit"]) if one.get("audit") else ""
    return {k: text_of(one.get(k)) for k in ("prompt", "response")} | {
        "score": "–" if one.get("score") is None else text_of(one["score"]), "audit": audit
    }  # fmt: skip


def plots(stage: Stage) -> Iterator[tuple[str, str]]:
    """(text alternative, data address) of the plots that a run has drawn itself."""
    for c in stage.configurations:
        for run in c.finished[:1]:
            for name in PLOTS:
                if (run.folder / name).is_file():
                    drawn = base64.b64encode((run.folder / name).read_bytes()).decode()
                    what = {
                        "trajectories.svg": "weights of each kind of knowledge over a training",
                        "losses.svg": "held-out loss over the phases of each episode",
                    }
                    yield f"{c.label}: {what[name]}", f"data:image/svg+xml;base64,{drawn}"


# ---- where it comes from ---------------------------------------------------------------------------------------------


def _runs(report: Report) -> Table:
    head = [
        "folder",
        "configuration",
        "seed",
        "state",
        "starts",
        "commit",
        "alignkit",
        "threads",
        "signature",
        "weights",
    ]
    rows = []
    for c in report.configurations:
        for run in c.runs:
            e = run.environment
            state = "finished" if run.finished else f"unfinished, {run.steps} steps"
            commit, weights = str(e.get("git_commit") or "–")[:10], str(run.result.get("weights_sha256") or "–")[:12]
            cells = [str(run.folder), c.label, str(run.seed), state, str(len(run.starts) or "–"), commit]
            cells += [str(e.get(k) or "–") for k in ("alignkit", "threads")]
            rows.append([Cell(x) for x in (*cells, str(run.result.get("signature") or "–"), weights)])
    return Table(
        "Runs", head, rows, ["Starts above 1: the run was stopped and resumed. Weights: SHA-256 of final/."], words=True
    )


def _environment(runs: list[Record]) -> Table:
    """Each version and machine, with how many runs had it."""
    rows = []
    known = [run.environment for run in runs if run.environment]
    keys: list[tuple[str, ...]] = [("python",), ("platform",), ("processor",), ("cores",), ("gpus",)]
    keys += [("packages", name) for name in dict.fromkeys(n for e in known for n in _names(e.get("packages")))]
    for key in keys:
        values = [json.dumps(_at({"e": e}, "e", *key)) for e in known]
        for value in dict.fromkeys(values):
            rows.append([Cell(key[-1]), Cell(value.strip('"')), Cell(str(values.count(value)))])
    return Table("Environment", ["what", "value", "runs"], rows, words=True)


def _names(packages: Any) -> list[str]:
    return list(packages) if isinstance(packages, dict) else []


def _sources(runs: list[Record]) -> Table:
    found: dict[tuple[str, str, str, str], int] = {}
    for run in runs:
        digests: Any = run.data.get("sha256")
        for what, digest in digests.items() if isinstance(digests, dict) else ():
            split = what.removeprefix("data.")
            rows = _at(run.data, "rows", split) if what != split else None
            source = str(_at(run.data, "sources", split) or "–") if what != split else "–"
            key = (what, source, f"{rows:,}" if isinstance(rows, int) else "–", str(digest)[:16])
            found[key] = found.get(key, 0) + 1
    rows_ = [[*map(Cell, key), Cell(str(n))] for key, n in found.items()]
    return Table("Data", ["what", "source", "rows", "SHA-256", "runs"], rows_, words=True)
