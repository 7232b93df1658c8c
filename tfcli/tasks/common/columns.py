"""Rows of tables for the tasks whose examples have parts: which column holds what, and lists in the cells of a csv."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfcli.errors import UserError, nearest
from tfcli.tasks.common.options import FinetuneData
from tfcli.tasks.common.report import Report
from tfcli.text.read import files, hf_data

SUFFIXES = (".csv", ".tsv", ".parquet")


def is_table(path: object) -> bool:
    """Whether a file has columns by its name, or is a data set ``hf:NAME``."""
    return hf_data.is_named(path) or files.stem_suffix(Path(str(path)))[0] in SUFFIXES


def read(
    path: object, known: Sequence[str], options: FinetuneData, report: Report
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row of a table; ``known`` are names of columns that make a first line of csv a header."""
    table = report.table(str(path), known=known, encoding=options.encoding, errors=options.errors)
    names = list(table.columns)
    rows = table.rows
    if not table.header and rows:  # none of its names is known, but there must be a line of them
        names, rows = [str(value).strip() for value in rows[0].values.values()], rows[1:]
    for row in rows:
        yield row.where, dict(zip(names, row.values.values(), strict=True)) if not table.header else row.values


def named(row: dict[str, Any], keys: Mapping[str, str | None], where: str) -> dict[str, Any]:
    """A row with its column ``keys[name]`` under ``name`` too, for each that is given.

    Raises UserError for a column that is not there, with the nearest spelling.
    """
    given = {name: key for name, key in keys.items() if key is not None}
    for key in given.values():
        if key not in row:
            guess, there = nearest(key, row), f"it has: {', '.join(map(str, row))}"
            hint = f"did you mean {guess!r}? {there}" if guess else there
            raise UserError(f"{where} has no column {key!r}", hint=hint)
    return {**row, **{name: row[key] for name, key in given.items()}}


def unfolded(row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A row with the lists and objects that its cells under ``names`` write, as JSON or as Python does."""
    return {**row, **{name: _value(row[name]) for name in names if isinstance(row.get(name), str)}}


def _value(cell: str) -> Any:
    if not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return cell
