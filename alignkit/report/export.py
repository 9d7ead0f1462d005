"""Results as Markdown, LaTeX or CSV: numbers alone."""

from __future__ import annotations

import csv
import io

from alignkit.errors import UserError, suggest
from alignkit.report.content import Configuration, label, metrics_of, number
from alignkit.report.stats import interval

LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def export(configurations: list[Configuration], form: str, wanted: list[str] | None = None, how: str = "t") -> str:
    """The held-out results of configurations.

    Args:
        form: ``markdown``, ``latex`` (a booktabs table) or ``csv`` (a line a configuration and metric, unrounded).
        wanted: metrics to keep, in this order.

    Raises:
        UserError: no run is finished, or a metric that none has.
    """
    names = metrics_of(configurations)
    if not names:
        raise UserError(
            "table: none of these runs has a result on held-out rows. Finished runs with test rows have one."
        )
    for name in wanted or ():
        if name not in names:
            raise UserError(f"--metrics {name}: no run has it.{suggest(name, names)}")
    names = wanted or names
    if form == "csv":
        return _csv(configurations, names, how)
    head = ["configuration", "seeds", *map(label, names)]
    rows = []
    for c in configurations:
        if c.finished and any(c.values(name) for name in names):
            rows.append([c.label, str(len(c.finished)), *(_plus_minus(c, name, how, form) for name in names)])
    return _markdown(head, rows) if form == "markdown" else _latex(head, rows)


def _plus_minus(c: Configuration, name: str, how: str, form: str) -> str:
    """Mean ± half the interval over seeds; of bootstrap intervals, which are not even, the bounds."""
    values = list(c.values(name).values())
    if not values:
        return "–" if form == "markdown" else "--"
    found = interval(values, how)
    if found.low is None or found.high is None:
        return number(found.mean, name)
    spread = (found.high - found.low) / 2
    mean = number(found.mean, name, spread)
    if how == "bootstrap":
        return f"{mean} [{number(found.low, name, spread)}, {number(found.high, name, spread)}]"
    half = number(spread, name, spread)
    return f"{mean} ± {half}" if form == "markdown" else rf"${mean} \pm {half}$"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    return "\n".join([line(head), "|---|" + "---:|" * (len(head) - 1), *map(line, rows)])


def _latex(head: list[str], rows: list[list[str]]) -> str:
    def escaped(text: str) -> str:
        return "".join(LATEX.get(c, c) for c in text)

    def line(cells: list[str], plain: int) -> str:
        return " & ".join([*map(escaped, cells[:plain]), *cells[plain:]]) + r" \\"

    body = [line([row[0], *row[1:]], 1) for row in rows]
    columns = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(head, len(head)),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _csv(configurations: list[Configuration], names: list[str], how: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["stage", "configuration", "metric", "split", "seeds", "mean", "low", "high", "n"])
    for c in configurations:
        for name in names:
            values = c.values(name)
            if values:
                found = interval(list(values.values()), how)
                bounds = ["" if x is None else repr(x) for x in (found.low, found.high)]
                split = next(run.tested()[0] for run in c.finished if run.tested()[0])
                writer.writerow(
                    [c.stage, c.label, name, split, " ".join(map(str, values)), repr(found.mean), *bounds, found.n]
                )
    return out.getvalue().rstrip("\n")
