"""Lines of text: of a file or stdin, one a text or a JSON object, a broken one said and left out; and on stderr."""

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


def note(line: str) -> None:
    """A line for people, on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def unread(failures: list[int]) -> RunError:
    """What is said at the end of lines that ``read_objects`` left out."""
    return RunError(f"{len(failures)} lines could not be read, as said above", hint="the others are done")


def read_objects(
    file: str,
    key: str,
    failures: list[int],
    parse: Callable[[dict[str, Any]], Any],
    plain: Callable[[str], Any] = str,
    *,
    encoding: str | None = None,
    on_error: Callable[[str], None] = lambda said: None,
) -> Iterator[Any]:
    """Each line of a file ("-": stdin) as ``plain`` has it, or of .jsonl as ``parse`` has its object.

    Stdin is JSON lines where ``parse`` takes its first line. Rows of a table with a column ``key`` are objects too.
    Files may be compressed (.gz, .bz2, .xz, .zst). A line that is none is reported on stderr with its number, and to
    ``on_error``, and its number put into ``failures``; the others go on. Raises UserError for a file that is not there
    or is corrupt, and for an encoding that is not known, or in which a line end is not one byte. Without an encoding it
    is UTF-8, and the command has no option for another.
    """
    from tfcli.text.read import files, tables
    from tfcli.text.read.sources import stdin

    hint = CONVERT if encoding is None else "name its encoding, as --encoding latin-1"
    encoding = encoding or "utf-8"
    files.check_encoding(encoding)
    if codecs.lookup(encoding).name == "utf-8-sig":
        encoding = "utf-8"  # whose byte order mark is let go anyway
    if file != "-" and not Path(file).is_file():
        raise UserError(f"no such file: {file}", hint=f'expected one text a line, or .jsonl with "{key}"')
    suffix = files.stem_suffix(Path(file))[0]
    if suffix in (".csv", ".tsv", ".parquet"):
        table = tables.read(file, known=(key,), encoding=encoding)
        if table.form.header:
            return _rows(table.rows, failures, parse, on_error)
    if "\n".encode(encoding) != b"\n":
        raise UserError(f"lines in {encoding} are not read", hint=f"{CONVERT} -f {encoding} -t utf-8")
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
    """Lines as objects where ``jsonl``; where it is None, if the first is one."""
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
            _say(f"{name}:{number}", error, on_error)
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
            _say(row.where, error, on_error)
            continue
        yield value


def _say(where: str, error: UserError, on_error: Callable[[str], None]) -> None:
    hint = f" ({error.hint})" if error.hint else ""
    print(f"error: {where} {error.message}{hint}", file=sys.stderr)
    on_error(f"{where} {error.message}")


def _first(line: str, parse: Callable[[dict[str, Any]], Any]) -> tuple[bool, Any]:
    """Whether a line is a JSON object that ``parse`` takes, and what it made of it: ``parse`` may count its calls."""
    try:
        return True, parse(_object(line))
    except UserError:
        return False, None


def decoded(data: bytes, encoding: str = "utf-8", hint: str = CONVERT) -> str:
    """Bytes as text; UserError where they are not in the encoding."""
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
