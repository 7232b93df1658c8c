"""What commands print: JSON and tables on stdout, notes and progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import typer

SECONDS_BETWEEN_LINES = 10.0
"""Between two lines of progress where stderr is not a live screen."""


def note(line: str) -> None:
    """Print a line for people on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    """Print a JSON object as one line, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> None:
    """Print a table: rich's on a terminal, aligned columns elsewhere; ``numbers``: all columns after the first are."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for column in table.columns[1:]:
            column.justify = "right" if numbers else "left"
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [f"{cell:{'>' if numbers and at else '<'}{widths[at]}}" for at, cell in enumerate(row)]
        typer.echo("  ".join(cells).rstrip())


class Ticker:
    """A clock for lines of progress."""

    def __init__(self) -> None:
        self.start = self._last = time.monotonic()

    def due(self) -> bool:
        """Return True at most once every ten seconds, first ten seconds after the start."""
        now = time.monotonic()
        due = now - self._last >= SECONDS_BETWEEN_LINES
        if due:
            self._last = now
        return due
