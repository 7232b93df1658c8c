"""Rows of JSON: one object per line, or all in one value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tfcli.errors import UserError
from tfcli.text.read.rows import Ask, Fault, Row

LISTS = ("data", "rows", "examples", "train", "test", "validation")
"""Keys under which a JSON object may have its rows."""


def lines(text: Iterable[str], ask: Ask, whole: Exception | None = None) -> Iterator[Row]:
    """Yield the object of each non-blank line.

    ``whole`` is the error of parsing all lines as one value, reported if the first line is not JSON either.
    """
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        where = f"{ask.name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = UserError(f"{where} is not JSON: {whole or error}", hint=ask.expected)
            ask.on_fault(Fault(where=where, kind="lines that are not JSON", error=message))
        else:
            yield from _row(row, where, ask)
        whole = None


def any_layout(text: str, ask: Ask) -> Iterator[Row]:
    """Yield the rows of a list, of an object with a list under one of ``LISTS``, or of JSON lines.

    An object over several lines is a row if it has a known key.
    Raises UserError for a list that is not JSON, and for an object that neither is a row nor has any.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{ask.name} is not JSON: {error}", hint=ask.expected) from None
        yield from lines(text.split("\n"), ask, whole=error)
        return
    key = next((key for key in LISTS if isinstance(data, dict) and isinstance(data.get(key), list)), None)
    if isinstance(data, list) or key is not None:
        for index, row in enumerate(data if key is None else data[key]):
            yield from _row(row, f"{ask.name}: " + (f"row {index + 1}" if key is None else f"{key}[{index}]"), ask)
    elif "\n" not in text.strip() or not isinstance(data, dict) or not data.keys().isdisjoint(ask.known):
        yield from _row(data, f"{ask.name}:1", ask)
    else:
        raise UserError(
            f"{ask.name} has one JSON object without rows",
            hint=f"expected a list under one of: {', '.join(LISTS)}; {ask.expected}",
        )


def _row(row: Any, where: str, ask: Ask) -> Iterator[Row]:
    if isinstance(row, dict):
        yield Row(where=where, values=row)
        return
    error = UserError(f"{where} is a JSON {type(row).__name__}, expected an object", hint=ask.expected)
    ask.on_fault(Fault(where=where, kind="rows that are no objects", error=error))
