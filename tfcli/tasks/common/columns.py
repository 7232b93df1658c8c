"""Rows of tables for the tasks whose examples have parts: which column holds what, and lists in the cells of a csv."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tfcli.errors import UserError, nearest


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
