"""Labelled rows as tables: JSON, JSON lines, csv, tsv, Parquet, lines that begin with their label, ``hf:NAME``.

A data set for finetuning is read whole. Text files are in the encoding that is asked for; a byte order mark is dropped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tfcli.errors import UserError
from tfcli.text.read import files, hf_data

LISTS = ("data", "rows", "examples", "train", "test", "validation")
"""Keys under which a JSON object may hold its rows."""
EXPECTED = 'expected rows such as {"text": "...", "label": "..."}'
PREFIX = "__label__"
"""Before each label, in fastText's files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One example; ``where`` is its place for messages."""

    where: str
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A file of rows. Of one without a header the columns are "1", "2" and so on."""

    name: str
    columns: tuple[str, ...]
    rows: list[Row]
    header: bool
    replaced: int
    """Bytes (or sequences of them) that became U+FFFD."""
    sha256: str
    """Of the decompressed bytes of a file, or of the rows of a data set ``hf:NAME``."""

    @property
    def digest(self) -> bytes:
        """What the file adds to a hash over several."""
        return self.sha256.encode() if hf_data.is_named(self.name) else bytes.fromhex(self.sha256)


def read(
    path: str | Path, *, known: Sequence[str], encoding: str = "utf-8", errors: Literal["strict", "replace"] = "strict"
) -> Table:
    """The table in a file, by its suffix, or the data set that ``hf:NAME`` names.

    A first line of csv or tsv is a header where it has one of ``known``. Classes that Hugging Face's library numbers
    are read by their names, in Parquet too.

    Raises UserError for whatever is not what it should be, with the file and the line.
    """
    if hf_data.is_named(path):
        return _named(str(path))
    path = Path(path)
    name, suffix = str(path), files.stem_suffix(path)[0]
    if suffix == ".parquet":
        return _parquet(path)
    data = b"".join(files.blocks(path, name))
    text, replaced = decode(data, name, encoding, errors)
    columns: tuple[str, ...] = ()
    header = True
    if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and not text.lstrip().startswith("[")):
        rows = _json_lines(text, name) if suffix != ".json" else _json_any(text, name)
    elif suffix == ".json":
        rows = _json_list(_parse(text, name), name)
    elif suffix in (".csv", ".tsv"):
        rows, columns, header = _table(text, name, "\t" if suffix == ".tsv" else ",", known)
    else:
        rows, columns, header = _lines(text, name, known)
    if not columns:
        columns = tuple(dict.fromkeys(key for row in rows for key in row.values))
    digest = hashlib.sha256(data).hexdigest()
    return Table(name=name, columns=columns, rows=rows, header=header, replaced=replaced, sha256=digest)


def check_encoding(encoding: str) -> None:
    """UserError for one that Python does not know."""
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError):
        raise UserError(f"unknown encoding {encoding!r}", hint="for example: utf-8, latin-1, cp1252, utf-16") from None


def decode(data: bytes, name: str, encoding: str, errors: Literal["strict", "replace"]) -> tuple[str, int]:
    """Bytes as text, and how many sequences were replaced. UserError with byte and line for what is not text."""
    head = data[: files.SNIFF]
    what = files.what_it_is(head)
    check_encoding(encoding)
    if what is not None and not (what == "UTF-16 text" and encoding.lower().replace("_", "-").startswith("utf-16")):
        hint = "read it with: --encoding utf-16" if what == "UTF-16 text" else "expected .jsonl, .csv, .tsv or text"
        raise UserError(f"{name} is {what}, expected text in {encoding}", hint=hint)
    utf8 = encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    codec = "utf-8-sig" if utf8 else encoding
    try:
        return data.decode(codec), 0
    except UnicodeDecodeError as error:
        if errors == "replace":
            text = data.decode(codec, "replace")
            return text, text.count("\ufffd") - (data.count(b"\xef\xbf\xbd") if utf8 else 0)
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} is not {encoding.upper()}: byte 0x{data[error.start]:02x} at offset {error.start}, line {line}",
            hint="name its encoding, as --encoding latin-1, or replace and count what is invalid: --errors replace",
        ) from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}", hint=EXPECTED) from None


def _json_any(text: str, name: str) -> list[Row]:
    """A .json file that is one object with the rows in it, or in truth JSON lines."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return _json_lines(text, name)
    for key in LISTS:
        if isinstance(data, dict) and isinstance(data.get(key), list):
            return _json_list(data[key], name)
    if isinstance(data, dict) and "\n" not in text.strip():
        return _json_list([data], name)
    raise UserError(
        f"{name} holds one JSON object without rows", hint=f"expected a list, under one of: {', '.join(LISTS)}"
    )


def _json_list(data: Any, name: str) -> list[Row]:
    rows = []
    for number, row in enumerate(data, 1):
        where = f"{name}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is a JSON {type(row).__name__}, expected an object")
        rows.append(Row(where=where, values=row))
    return rows


def _json_lines(text: str, name: str) -> list[Row]:
    found = files.json_lines(text.split("\n"), name, hint=EXPECTED, of_object=None)
    return [Row(where=where, values=row) for where, row in found]


def _cells(text: str, name: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """(line, fields) of each row. Quotes in tsv count only where they make sense throughout the file."""
    before = csv.field_size_limit(2**31 - 1)  # a process-wide setting of the csv module
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            found = [(rows.line_num, row) for row in rows if row]
            if delimiter != "\t" or len({len(row) for _, row in found}) < 2:
                return found
        except csv.Error as error:
            if delimiter != "\t":
                raise UserError(
                    f"{name}:{rows.line_num} is not valid csv: {error}",
                    hint='a field with a comma, quote or line break goes in "quotes", a quote in it is doubled',
                ) from None
        lines = enumerate(text.split("\n"), 1)
        return [(number, line.removesuffix("\r").split("\t")) for number, line in lines if line.strip("\r")]
    finally:
        csv.field_size_limit(before)


def _table(text: str, name: str, delimiter: str, known: Sequence[str]) -> tuple[list[Row], tuple[str, ...], bool]:
    cells = _cells(text, name, delimiter)
    if not cells:
        return [], (), True
    first = [cell.strip() for cell in cells[0][1]]
    wanted = {key.lower() for key in known}
    header = any(cell.lower() in wanted for cell in first)
    if header and (twice := [cell for cell in known if [each.lower() for each in first].count(cell.lower()) > 1]):
        raise UserError(f"{name} has several columns {twice[0]!r}", hint="give each column a name of its own")
    columns = tuple(first) if header else tuple(str(number) for number in range(1, len(first) + 1))
    rows = []
    for line, fields in cells[1 if header else 0 :]:
        if len(fields) != len(columns):
            raise UserError(
                f"{name}:{line} has {len(fields)} fields, the first line has {len(columns)}",
                hint='text with a separator or line break in it goes in "quotes"',
            )
        rows.append(Row(where=f"{name}:{line}", values=dict(zip(columns, fields, strict=True))))
    return rows, columns, header


def _lines(text: str, name: str, known: Sequence[str]) -> tuple[list[Row], tuple[str, ...], bool]:
    """Lines of a text file: with tabs a table, else each begins with its label, as ``NUM:date When ...``."""
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and all("\t" in line for _, line in lines):
        return _table(text, name, "\t", known)
    rows = []
    for number, line in lines:
        where = f"{name}:{number}"
        label, _, rest = line.strip().partition(" ")
        if label.startswith(PREFIX):
            labels = re.match(rf"(?:{PREFIX}\S+\s*)+", line.strip())
            assert labels is not None
            found = [word.removeprefix(PREFIX) for word in labels[0].split()]
            values = {"label": found[0] if len(found) == 1 else found, "text": line.strip()[labels.end() :]}
        elif ":" in label.strip(":"):
            values = {"label": label.partition(":")[0], "fine": label, "text": rest}
        else:
            raise UserError(
                f"{where} begins with {label[:40]!r}, which is no label",
                hint="lines of text begin with LABEL:fine or __label__LABEL; .jsonl, .csv and .tsv files have columns",
            )
        rows.append(Row(where=where, values=values))
    return rows, ("label", "fine", "text") if rows and "fine" in rows[0].values else ("label", "text"), True


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        data = path.read_bytes()
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        listed = table.to_pylist()
        if b"huggingface" in (table.schema.metadata or {}):
            from datasets import Features

            listed = hf_data.with_names(listed, Features.from_arrow_schema(table.schema))
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # the last of classes that datasets cannot read
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    return Table(
        name=str(path),
        columns=tuple(table.column_names),
        rows=[Row(where=f"{path}: row {number}", values=row) for number, row in enumerate(listed, 1)],
        header=True,
        replaced=0,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _named(spec: str) -> Table:
    columns, listed = hf_data.rows(spec)
    return Table(
        name=spec,
        columns=columns,
        rows=[Row(where=f"{spec}: row {number}", values=row) for number, row in enumerate(listed, 1)],
        header=True,
        replaced=0,
        sha256=hf_data.digest(listed),
    )


def expand(specs: Sequence[str]) -> list[Path]:
    """The files that names and globs stand for, ``hf:NAME`` as it is.

    Raises UserError for one that stands for none, and for a directory.
    """
    import glob

    found: list[Path] = []
    for spec in specs:
        path = Path(spec)
        if path.is_dir():
            raise UserError(f"{path} is a directory", hint="name the files in it that are to be read")
        if path.exists() or hf_data.is_named(spec):
            found.append(path)
            continue
        matches = [Path(match) for match in sorted(glob.glob(spec, recursive=True))]  # noqa: PTH207
        if not matches:
            raise files.missing(path)
        found += matches
    return found
