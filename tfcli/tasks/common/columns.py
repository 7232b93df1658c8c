"""Rows of tables for the tasks whose examples have parts: which column holds what, and lists in the cells of a csv."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from tfcli.errors import absent


def named(row: dict[str, Any], keys: Mapping[str, str | None], where: str) -> dict[str, Any]:
    """A row with its column ``keys[name]`` under ``name`` too, for each that is given.

    Raises UserError for a column that is not there, with the nearest spelling.
    """
    given = {name: key for name, key in keys.items() if key is not None}
    for key in given.values():
        if key not in row:
            raise absent(f"{where} has no column {key!r}", key, row)
    return {**row, **{name: row[key] for name, key in given.items()}}


def unfolded(row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A row with the lists and objects that its cells under ``names`` write, as JSON or as Python does."""
    return {**row, **{name: _value(row[name]) for name in names if isinstance(row.get(name), str)}}


def _value(cell: str) -> Any:
    if not cell.lstrip().startswith(("[", "{")):
        return cell
    parses: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for parse in parses:
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(cell.strip())
    return cell
