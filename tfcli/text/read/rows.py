"""The values that all readers of tables share: rows with their place, the form of a file, faults of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tfcli.errors import UserError

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "hf"]
"""``json`` is JSON in any layout: a list, an object with a list in it, one object, or JSON lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One example; messages show its place, ``where``."""

    where: str
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """The recognized form of a file; without a header, its columns are "1", "2" and so on."""

    kind: Kind
    columns: tuple[str, ...] = ()
    """Empty for JSON, where each row has its own."""
    header: bool = True
    strings: tuple[str, ...] = ()
    """The columns of type string, in files with types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """An invalid row, and the error to raise unless the caller skips it."""

    where: str
    kind: Literal["lines that are not JSON", "rows that are no objects", "rows with another number of fields"]
    error: UserError


OnFault = Callable[[Fault], None]
"""Called with each ``Fault``; if it returns, the row is skipped."""


def refuse(fault: Fault) -> None:
    """Raise the error: the ``OnFault`` that skips no row."""
    raise fault.error


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """The arguments of ``tables.rows`` that its readers need."""

    name: str
    known: Sequence[str]
    header: bool | None
    expected: str
    on_fault: OnFault
