"""Records of csv and tsv, as Python's csv module reads them but without its limit on the length of a field.

That limit is global to the process: it cannot be changed for one reader alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from tfcli.errors import UserError
from tfcli.text.read import files

Record = tuple[int, list[str]]
"""The number of its last line and its fields."""


class Malformed(UserError):
    """The error for inconsistent quotes."""

    def __init__(self, where: str, kind: str, error: str) -> None:
        hint = 'put a field with a comma, quote or line break in "quotes", and double the quotes in it'
        super().__init__(f"{where} is not valid {kind}: {error}", hint=hint)


def records(pieces: Iterator[str], name: str, kind: str) -> Iterator[Record]:
    """Yield the records of csv or tsv (``kind``) without empty lines; a quoted field may contain line breaks.

    Lines end with \\n, \\r\\n or \\r. Raises Malformed.
    """
    delimiter = "," if kind == "csv" else "\t"
    lines = enumerate(_lines(pieces), 1)
    for number, line in lines:
        if '"' not in line:
            if line := line.rstrip("\r\n"):
                yield number, line.split(delimiter)
            continue
        fields: list[str] = []
        at = 0
        while True:
            if line.startswith('"', at):
                parts: list[str] = []
                at += 1
                while (end := line.find('"', at)) < 0 or line.startswith('"', end + 1):
                    parts.append(line[at:] if end < 0 else line[at : end + 1])  # of two quotes, the first is text
                    at = end + 2
                    if end < 0:
                        number, line = next(lines, (number, ""))
                        at = 0
                        if not line:
                            raise Malformed(f"{name}:{number}", kind, "unexpected end of data")
                fields.append("".join([*parts, line[at:end]]))
                at = end + 1
                if line[at : at + 1] not in ("", "\r", "\n", delimiter):
                    raise Malformed(f"{name}:{number}", kind, f"'{delimiter}' expected after '\"'")
            else:
                end = line.find(delimiter, at)
                fields.append(line[at:].rstrip("\r\n") if end < 0 else line[at:end])
                at = len(line) if end < 0 else end
            if not line.startswith(delimiter, at):
                break
            at += 1
        yield number, fields


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    for line in files.lines(pieces):
        if "\r" in line and line.index("\r") < len(line.rstrip("\n")) - 1:
            yield from io.StringIO(line, newline="")
        else:
            yield line


def consistent(pieces: Iterator[str]) -> bool:
    """Return whether quotes are consistent in a whole tsv: every record has the same number of fields."""
    try:
        return len({len(fields) for _, fields in records(pieces, "", "tsv")}) < 2
    except Malformed:
        return False


def plain(pieces: Iterator[str]) -> Iterator[Record]:
    """Yield the non-empty lines split at each tab, with quotes as text."""
    for number, line in enumerate(files.lines(pieces), 1):
        line = line.removesuffix("\n").removesuffix("\r")
        if line.strip("\r"):
            yield number, line.split("\t")
