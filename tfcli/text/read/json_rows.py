"""Rows of JSON: one object a line, or all in one value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tfcli.errors import UserError
from tfcli.text.read.rows import Fault, OnFault, Row

LISTS = ("data", "rows", "examples", "train", "test", "validation")
"""Keys under which a JSON object may hold its rows."""


def lines(
    found: Iterable[str], name: str, *, expected: str, on_fault: OnFault, whole: Exception | None = None
) -> Iterator[Row]:
    """An object of each line, blank ones left out; ``expected`` is the hint of errors.

    ``whole`` says why all of the lines are not one value: what is wrong, where the first of them is not JSON either.
    """
    for number, line in enumerate(found, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = UserError(f"{where} is not JSON: {whole or error}", hint=expected)
            on_fault(Fault(where=where, kind="not JSON", error=said))
        else:
            yield from _row(row, where, expected, on_fault)
        whole = None


def any_layout(text: str, name: str, known: Sequence[str], *, expected: str, on_fault: OnFault) -> Iterator[Row]:
    """The rows of a list, of an object that holds one under one of ``LISTS``, or of JSON lines.

    An object over several lines is a row where it has one of the keys ``known``.
    Raises UserError for a list that is not JSON, and for an object that is no row and holds none.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{name} is not JSON: {error}", hint=expected) from None
        yield from lines(text.split("\n"), name, expected=expected, on_fault=on_fault, whole=error)
        return
    key = next((key for key in LISTS if isinstance(data, dict) and isinstance(data.get(key), list)), None)
    if isinstance(data, list) or key is not None:
        for index, row in enumerate(data if key is None else data[key]):
            where = f"{name}: row {index + 1}" if key is None else f"{name}: {key}[{index}]"
            yield from _row(row, where, expected, on_fault)
    elif "\n" not in text.strip() or not isinstance(data, dict) or not data.keys().isdisjoint(known):
        yield from _row(data, f"{name}:1", expected, on_fault)
    else:
        raise UserError(
            f"{name} holds one JSON object without rows",
            hint=f"expected a list, under one of: {', '.join(LISTS)}; {expected}",
        )


def _row(row: Any, where: str, expected: str, on_fault: OnFault) -> Iterator[Row]:
    if isinstance(row, dict):
        yield Row(where=where, values=row)
        return
    error = UserError(f"{where} is a JSON {type(row).__name__}, expected an object", hint=expected)
    on_fault(Fault(where=where, kind="not an object", error=error))
