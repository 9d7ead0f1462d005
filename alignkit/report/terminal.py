"""Tables in the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from alignkit.report.content import Report, Table

PIPED = 200  # characters of a line where the output is no terminal


def console(stream: Any = None) -> Console:
    """A console that cuts nothing off when its output goes to a file."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPED, highlight=False, soft_wrap=False)


def show(out: Console, table: Table) -> None:
    """Print a table and its notes."""
    grid = Grid(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table.head):
        grid.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(cell.text, style="dim" if cell.faint else "bold" if cell.strong else "") for cell in row))
    out.print(grid)
    for note in table.notes:
        out.print(Text(note, style="dim"))
    out.print()


def summary(out: Console, report: Report) -> None:
    """The tables that fit a screen, the verdicts, the warnings; warnings last, where they are read."""
    for table in report.pipelines:
        show(out, table)
    for stage in report.stages:
        out.print(Text(f"stage {stage.name}", style="bold"))
        for table in stage.tables[:3]:
            show(out, table)
        for text in stage.verdicts:
            out.print(Text(text))
        out.print()
    for text in report.alarms:
        out.print(Text(f"alarm: {text}"))
    for text in report.warnings:
        out.print(Text(f"warning: {text}"))
