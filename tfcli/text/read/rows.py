"""What every reader of a table gives: rows with their place, what was recognised of the file, what a row has wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tfcli.errors import UserError

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "hf"]
"""``json`` is JSON in any layout: a list, an object with a list in it, one object, or JSON lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One example; ``where`` is its place for messages."""

    where: str
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What was recognised of a file. Of one without a header the columns are "1", "2" and so on."""

    kind: Kind
    columns: tuple[str, ...] = ()
    """Empty where each row names its own: JSON."""
    header: bool = True
    strings: tuple[str, ...] = ()
    """The columns that hold strings by their type, of a file that has types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A row that is none, and the error that it is unless the caller goes on without it."""

    where: str
    kind: Literal["lines that are not JSON", "rows that are no objects", "rows with another number of fields"]
    error: UserError


OnFault = Callable[[Fault], None]
"""Told of each ``Fault``; where it returns, the row is left out."""


def refuse(fault: Fault) -> None:
    """The ``OnFault`` that goes on without no row."""
    raise fault.error


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What is asked of a file, as ``tables.rows`` says."""

    name: str
    known: Sequence[str]
    header: bool | None
    expected: str
    on_fault: OnFault
