"""Lines of a file or of stdin as texts or JSON objects; invalid ones are reported and skipped."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.errors import RunError, UserError

if TYPE_CHECKING:
    from tfcli.text.read.rows import Row

CONVERT = "convert it first, as with iconv"


def unread(failures: list[int], what: str = "line") -> RunError:
    """The error that ends a command after ``read_objects`` skipped lines."""
    count = f"{len(failures)} {what}{'' if len(failures) == 1 else 's'}"
    return RunError(f"{count} could not be read, see above", hint="all others were processed")


def read_objects(
    file: str,
    key: str,
    failures: list[int],
    parse: Callable[[dict[str, Any]], Any],
    plain: Callable[[str], Any] = str,
    *,
    encoding: str | None = None,
    on_error: Callable[[str], None] = lambda message: None,
) -> Iterator[Any]:
    """Yield ``plain(line)`` for each line of a file ("-": stdin), or ``parse(object)`` for .jsonl.

    Stdin is read as JSON lines if ``parse`` accepts its first line. Rows of a table with a column ``key`` are objects
    too. Files may be compressed (.gz, .bz2, .xz, .zst). Invalid lines are skipped: reported on stderr with their number
    and to ``on_error``, and their numbers appended to ``failures``. ``encoding``: None if the command has no option for
    it, which means UTF-8. Raises UserError for a missing or corrupt file, and for an encoding that is unknown or in
    which a line end is not one byte.
    """
    from tfcli.text.read import files, tables
    from tfcli.text.read.sources import stdin

    hint = CONVERT if encoding is None else "name its encoding, as --encoding latin-1"
    encoding = encoding or "utf-8"
    files.check_encoding(encoding)
    if codecs.lookup(encoding).name == "utf-8-sig":
        encoding = "utf-8"  # the byte order mark is removed in any case
    if file != "-" and not Path(file).is_file():
        raise UserError(f"no such file: {file}", hint=f'expected one text per line, or .jsonl with "{key}"')
    suffix = files.stem_suffix(Path(file))[0]
    if suffix in (".csv", ".tsv", ".parquet"):
        table = tables.read(file, known=(key,), encoding=encoding)
        if table.form.header:
            return _rows(table.rows, failures, parse, on_error)
    if "\n".encode(encoding) != b"\n":
        raise UserError(f"lines in {encoding} cannot be read", hint=f"{CONVERT} -f {encoding} -t utf-8")
    lines = stdin() if file == "-" else files.lines(files.blocks(Path(file), file))
    name = "stdin" if file == "-" else file
    jsonl = True if suffix in (".jsonl", ".ndjson") else None if file == "-" else False
    return _objects(lines, name, jsonl, lambda raw: decoded(raw, encoding, hint), failures, parse, plain, on_error)


def _objects(
    lines: Iterable[bytes],
    name: str,
    jsonl: bool | None,
    decode: Callable[[bytes], str],
    failures: list[int],
    parse: Callable[[dict[str, Any]], Any],
    plain: Callable[[str], Any],
    on_error: Callable[[str], None],
) -> Iterator[Any]:
    """Parse lines as JSON objects if ``jsonl``; if it is None, the first line decides."""
    for number, raw in enumerate(lines, 1):
        try:
            line = decode(raw).removesuffix("\n").removesuffix("\r")
            if number == 1:
                line = line.removeprefix("\ufeff")
            if jsonl and not line.strip():
                continue
            if jsonl is None and number == 1:
                jsonl, value = _first(line, parse)
                value = value if jsonl else plain(line)
            else:
                value = parse(_object(line)) if jsonl else plain(line)
        except UserError as error:
            failures.append(number)
            _report(f"{name}:{number}", error, on_error)
            continue
        yield value


def _rows(
    rows: Iterable[Row],
    failures: list[int],
    parse: Callable[[dict[str, Any]], Any],
    on_error: Callable[[str], None],
) -> Iterator[Any]:
    for number, row in enumerate(rows, 1):
        try:
            value = parse(dict(row.values))
        except UserError as error:
            failures.append(number)
            _report(row.where, error, on_error)
            continue
        yield value


def _report(where: str, error: UserError, on_error: Callable[[str], None]) -> None:
    hint = f" ({error.hint})" if error.hint else ""
    print(f"error: {where} {error.message}{hint}", file=sys.stderr)
    on_error(f"{where} {error.message}")


def _first(line: str, parse: Callable[[dict[str, Any]], Any]) -> tuple[bool, Any]:
    """Return whether a line is a JSON object that ``parse`` accepts, and its result: ``parse`` may count its calls."""
    try:
        return True, parse(_object(line))
    except UserError:
        return False, None


def decoded(data: bytes, encoding: str = "utf-8", hint: str = CONVERT) -> str:
    """Decode bytes. Raises UserError if they are not in the encoding."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == "utf-8" else encoding
        raise UserError(f"is not {name} at byte {error.start}", hint=hint) from None


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError("is not a JSON object")
    return row
