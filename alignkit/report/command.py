"""The words of ``alignkit report``, ``compare``, ``diff`` and ``table``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from alignkit.errors import UserError
from alignkit.files import write_atomically
from alignkit.report.collect import Record, collect, configurations

RUNS = "run directories, folders of runs, or globs"


class _Words(argparse.ArgumentParser):
    """argparse, whose complaints are a user's mistakes like others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('alignkit ')}: {message}. See `{self.prog} --help`.")


def report(words: list[str]) -> None:
    """Write the page, print the tables."""
    parser = _parser("report", "one HTML file about runs, and the same tables in the terminal")
    parser.add_argument("runs", nargs="+", metavar="RUN", help=RUNS)
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the page; by default report.html in the folder that is named, else here"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="the configuration that others are compared with: label, name or folder"
    )
    parser.add_argument("--title", help="of the page")
    parser.add_argument(
        "--rows", type=_count, default=40, metavar="N", help="held-out rows whose outputs are shown (40)"
    )
    _interval(parser)
    given = parser.parse_args(words)
    found, warnings = collect(given.runs)
    groups, more = configurations(found)

    from alignkit.report.content import build
    from alignkit.report.page import render
    from alignkit.report.terminal import console, summary

    content = build(groups, [*warnings, *more], given.baseline, given.interval)
    only = Path(given.runs[0]).expanduser()
    file = (
        Path(given.output).expanduser()
        if given.output
        else (only if len(given.runs) == 1 and only.is_dir() else Path()) / "report.html"
    )
    title = given.title or (f"{only.resolve().name}: report" if len(given.runs) == 1 and only.is_dir() else "Report")
    page = render(content, title, given.rows, shlex.join(["alignkit", "report", *words]))
    try:
        write_atomically(file, page)
    except OSError as e:
        raise UserError(f"{file} cannot be written ({e.strerror}). Choose another with --output FILE.") from None
    summary(console(), content)
    print(f"report: {file} ({len(page.encode()) / 1024:,.0f} KB)")


def compare(words: list[str]) -> None:
    """Print how two configurations differ."""
    parser = _parser("compare", "two configurations: settings that differ, results with differences, ledgers")
    parser.add_argument("a", metavar="A", help="a run, or a folder or glob of runs that differ in their seed")
    parser.add_argument("b", metavar="B", help="the other; differences are B less A")
    _interval(parser)
    given = parser.parse_args(words)

    from alignkit.report.compare import compare as compared
    from alignkit.report.compare import sides
    from alignkit.report.content import of_runs
    from alignkit.report.terminal import console, show

    warnings: list[str] = []
    both, every = [], []
    for word in (given.a, given.b):
        found, odd = collect([word])
        groups, more = configurations(found)
        both.append(sides(groups, word))
        every += found
        warnings += [*odd, *more]
    labelled, _ = configurations(every)  # so that the two are told apart by what differs
    labels = {id(run): c.label for c in labelled for run in c.runs}
    for side in both:
        side.label = labels.get(id(side.first), side.label)
    if both[0].label == both[1].label:
        both[0].label, both[1].label = given.a, given.b
    tables, odd = compared(both[0], both[1], given.interval)
    out = console()
    for table in tables:
        show(out, table)
    sys.stdout.flush()
    for text in dict.fromkeys([*odd, *warnings, *(w for side in both for w in of_runs(side))]):
        print(f"warning: {text}", file=sys.stderr)


def diff(words: list[str]) -> None:
    """Print what two run directories do not share besides their results."""
    parser = _parser("diff", "what two runs do not share: settings, data, packages and commit, command")
    parser.add_argument("a", metavar="A", help="a run directory")
    parser.add_argument("b", metavar="B", help="the other")
    given = parser.parse_args(words)

    from alignkit.report.compare import PLACES, records
    from alignkit.report.terminal import console, show

    both = [_one(given.a), _one(given.b)]
    tables = records(both[0], both[1], (given.a, given.b))
    out = console()
    for each in tables:
        show(out, each)
    if not tables:
        print("nothing differs: settings, data, packages, commit and command are the same.")
    print(f"({', '.join(PLACES)} say where a run lies and are left out. Results: alignkit compare {given.a} {given.b})")
    sys.stdout.flush()
    for word, run in zip((given.a, given.b), both, strict=True):
        for problem in run.problems:
            print(f"warning: {word}: {problem}.", file=sys.stderr)


def _one(word: str) -> Record:
    """The run that is named; of a pipeline the pipeline itself.

    Raises:
        UserError: there is none, or there are several.
    """
    found, _ = collect([word])
    alone = [run for run in found if run.pipeline is None]
    if len(alone) > 1:
        raise UserError(
            f"diff: {word} holds {len(alone)} runs. Name one: {', '.join(str(run.folder) for run in alone[:4])}."
        )
    return (alone or found)[0]


def table(words: list[str]) -> None:
    """Print results for a paper, a README or a program."""
    parser = _parser("table", "held-out results, a line a configuration: mean ± half the 95 % interval over seeds")
    parser.add_argument("runs", nargs="+", metavar="RUN", help=RUNS)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", dest="form", action="store_const", const="markdown", help="the default")
    form.add_argument("--latex", dest="form", action="store_const", const="latex", help="a booktabs table")
    form.add_argument(
        "--csv", dest="form", action="store_const", const="csv", help="a line a configuration and metric, unrounded"
    )
    parser.add_argument("--metrics", metavar="A,B", help="these alone, in this order")
    _interval(parser)
    given = parser.parse_args(words)
    found, warnings = collect(given.runs)
    groups, more = configurations(found)

    from alignkit.report.content import of_runs
    from alignkit.report.export import export

    groups = [c for c in groups if c.stage != "pipeline"]
    print(export(groups, given.form or "markdown", given.metrics.split(",") if given.metrics else None, given.interval))
    sys.stdout.flush()
    for text in dict.fromkeys([*warnings, *more, *(w for c in groups for w in of_runs(c))]):
        print(f"warning: {text}", file=sys.stderr)


def _parser(verb: str, what: str) -> argparse.ArgumentParser:
    os.environ.setdefault("COLUMNS", "100")  # of argparse's help
    return _Words(prog=f"alignkit {verb}", description=what, allow_abbrev=False)


def _interval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval",
        choices=("t", "bootstrap"),
        default="t",
        help="over seeds: Student's t (default) or percentile bootstrap",
    )


def _count(text: str) -> Any:
    n = int(text)
    if n < 0:
        raise ValueError
    return n
