"""Records of csv and tsv, by the rules of Python's csv module, of fields of any length."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import chain

from tfcli.text.read import files

Record = tuple[int, list[str]]
"""The number of its last line, and its fields."""


class Malformed(Exception):
    """Quotes that make no sense; ``line`` is where."""

    def __init__(self, line: int, error: csv.Error) -> None:
        super().__init__(str(error))
        self.line = line


def records(pieces: Iterator[str], delimiter: str) -> Iterator[Record]:
    """The records of a text in pieces, empty lines left out; a field with quotes may hold line breaks.

    A line ends with \\n, \\r\\n or \\r. The csv module's limit of the length of a field is the process's: it is neither
    changed nor obeyed. Raises Malformed.
    """
    held: list[str] = []  # lines of the record that is being read
    number = 0

    def pulled() -> Iterator[str]:
        nonlocal number
        for line in _lines(pieces):
            number += 1
            held.append(line)
            yield line

    lines = pulled()
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        held.clear()
        try:
            fields = next(reader, None)
            if fields is None:
                return
        except csv.Error as error:
            if sum(map(len, held)) <= csv.field_size_limit():
                raise Malformed(number, error) from None
            try:
                fields = record(chain(held.copy(), lines), delimiter)
            except csv.Error as second:
                raise Malformed(number, second) from None
        if fields:
            yield number, fields


def record(lines: Iterator[str], delimiter: str) -> list[str]:
    """The fields of the record that begins with the first of ``lines``, as csv.reader has them, without its limit."""
    line, at = next(lines), 0
    fields: list[str] = []
    while True:
        if line.startswith('"', at):
            parts: list[str] = []
            at += 1
            while (end := line.find('"', at)) < 0 or line.startswith('"', end + 1):
                parts.append(line[at:] if end < 0 else line[at : end + 1])  # of two quotes the first is text
                at = end + 2
                if end < 0:
                    line, at = next(lines, ""), 0
                    if not line:
                        raise csv.Error("unexpected end of data")
            parts.append(line[at:end])
            at = end + 1
            fields.append("".join(parts))
            if line[at : at + 1] not in ("", "\r", "\n", delimiter):
                raise csv.Error(f"'{delimiter}' expected after '\"'")
        else:
            end = line.find(delimiter, at)
            fields.append(line[at:].rstrip("\r\n") if end < 0 else line[at:end])
            at = len(line) if end < 0 else end
        if not line.startswith(delimiter, at):
            return fields
        at += 1


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    for line in files.lines(pieces):
        if "\r" in line and line.index("\r") < len(line.rstrip("\n")) - 1:
            yield from io.StringIO(line, newline="")
        else:
            yield line


def consistent(pieces: Iterator[str], delimiter: str) -> bool:
    """Whether quotes make sense in all of a text: every record has the same number of fields."""
    try:
        found = records(pieces, delimiter)
        _, first = next(found, (0, []))
        return all(len(fields) == len(first) for _, fields in found)
    except Malformed:
        return False


def plain(pieces: Iterator[str], delimiter: str) -> Iterator[Record]:
    """Lines split at each delimiter, empty ones left out: quotes are text."""
    for number, line in enumerate(files.lines(pieces), 1):
        line = line.removesuffix("\n").removesuffix("\r")
        if line.strip("\r"):
            yield number, line.split(delimiter)
