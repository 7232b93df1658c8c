"""Tables: JSON, csv, tsv, Parquet, lines that begin with their label, ``hf:NAME``.

``rows`` streams them in bounded memory (except JSON that is not one object per line); ``read`` returns all rows at
once. ``delimited``, ``json_rows`` and ``parquet`` read the formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from tfcli.errors import UserError
from tfcli.text.read import delimited, files, hf_data, json_rows, parquet
from tfcli.text.read.files import Count, Digest, Errors
from tfcli.text.read.rows import Ask, Fault, Form, Kind, OnFault, Row, refuse

EXPECTED = 'expected rows such as {"text": "...", "label": "..."}'
PREFIX = "__label__"
"""The prefix of each label in fastText's files."""
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
COLUMNS: tuple[Kind, ...] = ("csv", "tsv", "parquet", "hf")
"""The kinds whose rows all have the same columns."""
Texts = Callable[[], Iterator[str]]
"""Each call reads a file from its beginning, in pieces of text."""


def kind_of(path: str | Path) -> Kind:
    """Return the kind of a file by its name; "text" for unknown suffixes."""
    return "hf" if hf_data.is_named(path) else KINDS.get(files.stem_suffix(Path(path))[0], "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All rows of a file."""

    name: str
    form: Form
    rows: list[Row]
    replaced: int
    """Invalid bytes (or sequences of them) replaced by U+FFFD."""
    digest: Digest
    """The digest of the decompressed file, or of the rows of ``hf:NAME`` as JSON."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a file, which can be iterated over once, and its form."""

    name: str
    form: Form
    count: Count
    """The replacements so far."""
    digest: Digest
    """The digest of what was read so far; of nothing for Parquet without ``whole``."""
    select: Callable[[Sequence[str] | None], Iterator[Row]]
    """Iterate over the rows; a columnar file (Parquet) reads only the given columns, others all."""

    def __iter__(self) -> Iterator[Row]:
        return self.select(None)

    def table(self) -> Table:
        """Read all rows; the columns are those that any row has."""
        rows = list(self)
        columns = self.form.columns or tuple(dict.fromkeys(key for row in rows for key in row.values))
        form = replace(self.form, columns=columns)
        return Table(name=self.name, form=form, rows=rows, replaced=self.count.replaced, digest=self.digest)


def read(path: str | Path, *, known: Sequence[str], encoding: str = "utf-8", errors: Errors = "strict") -> Table:
    """Read all rows of a file or of ``hf:NAME``, as ``rows`` does; the file is read once."""
    return rows(path, known=known, encoding=encoding, errors=errors, whole=True).table()


def rows(
    path: str | Path,
    *,
    name: str | None = None,
    known: Sequence[str] = (),
    header: bool | None = None,
    kind: Kind | None = None,
    encoding: str | None = None,
    errors: Errors = "strict",
    expected: str = EXPECTED,
    on_fault: OnFault = refuse,
    count: Count | None = None,
    whole: bool = False,
) -> Rows:
    """Stream the rows of a file or of the dataset ``hf:NAME``, in memory that does not grow with the file.

    Messages call it ``name``; ``kind`` overrides what its suffix says. ``header`` says whether the first line is one;
    None: if it has one of the ``known`` columns. ``encoding`` is that of ``files.texts``. Text and files with tabs
    are read twice, as quotes count only if they are consistent in the whole file; with ``whole``, the file is read once
    and kept in memory, as ``hf:NAME`` always is. Class labels of Hugging Face's datasets are read as their names.

    Raises UserError, here or at a row, for invalid input, with the file and the line; a fault of a single row goes to
    ``on_fault``, with ``expected`` as the hint.
    """
    name, kind, digest = name or str(path), kind or kind_of(path), Digest()
    count = count or Count(name=name)
    if kind == "hf":
        columns, values = hf_data.rows(str(path))
        numbered = (Row(where=f"{name}: row {number}", values=row) for number, row in enumerate(values, 1))
        form, digest = Form(kind=kind, columns=columns), hf_data.digest(values)
        return Rows(name=name, form=form, count=count, digest=digest, select=lambda _: numbered)
    path = Path(path)
    if kind == "parquet":
        form, table = parquet.opened(path, name, digest.update if whole else None)
        return Rows(name=name, form=form, count=count, digest=digest, select=partial(parquet.rows, table, name))

    def text() -> Iterator[str]:
        return files.texts(path, name, errors, count, encoding=encoding, seen=digest.update)

    def look() -> Iterator[str]:
        return files.texts(path, name, errors, Count(name=name), encoding=encoding)

    if whole:
        pieces = list(text())
        look = text = partial(iter, pieces)
    ask = Ask(name=name, known=known, header=header, expected=expected, on_fault=on_fault)
    form, stream = _of_text(kind, look, text, ask)
    return Rows(name=name, form=form, count=count, digest=digest, select=lambda _: stream)


def _of_text(kind: Kind, look: Texts, text: Texts, ask: Ask) -> tuple[Form, Iterator[Row]]:
    """Return the form of a text, which may take a ``look`` at all of it, and its rows."""
    if kind == "jsonl":
        return Form(kind=kind), json_rows.lines(files.lines(text()), ask)
    if kind == "json":
        return Form(kind=kind), json_rows.any_layout("".join(text()), ask)
    if kind == "text" and not _has_tabs(look()):
        return _labeled(files.lines(text()), ask.name)
    quoted = kind == "csv" or delimited.consistent(look())
    records = delimited.records(text(), ask.name, kind) if quoted else delimited.plain(text())
    return _table(records, Form(kind=kind), ask)


def _table(records: Iterator[delimited.Record], form: Form, ask: Ask) -> tuple[Form, Iterator[Row]]:
    """Return the form, with the columns of the first record (numbered without a header), and the rows."""
    line, fields = next(records, (0, []))
    if not line:
        return form, iter(())
    first = [cell.strip() for cell in fields]
    lower = [cell.lower() for cell in first]
    header = any(cell.lower() in lower for cell in ask.known) if ask.header is None else ask.header
    if header and (twice := [cell for cell in ask.known if lower.count(cell.lower()) > 1]):
        raise UserError(f"{ask.name} has several columns {twice[0]!r}", hint="give each column its own name")
    columns = tuple(first) if header else tuple(str(number) for number in range(1, len(first) + 1))
    form = replace(form, columns=columns, header=header)
    return form, _filled(records if header else chain([(line, fields)], records), form, ask)


def _filled(records: Iterable[delimited.Record], form: Form, ask: Ask) -> Iterator[Row]:
    columns = form.columns
    for line, fields in records:
        where = f"{ask.name}:{line}"
        if len(fields) == len(columns):
            values = dict(zip(columns, fields, strict=True))
            if len(values) < len(columns):  # of columns with the same name, the first counts
                values |= dict(zip(reversed(columns), reversed(fields), strict=True))
            yield Row(where=where, values=values)
            continue
        first, listed = ("header", f"columns: {', '.join(columns)}; ") if form.header else ("first line", "")
        error = UserError(
            f"{where} has {len(fields)} fields, the {first} has {len(columns)}",
            hint=f'{listed}put text with a separator or line break in "quotes"',
        )
        ask.on_fault(Fault(where=where, kind="rows with another number of fields", error=error))


def _has_tabs(pieces: Iterator[str]) -> bool:
    """Return whether there are non-blank lines and all of them have a tab."""
    return {"\t" in line for line in files.lines(pieces) if line.strip()} == {True}


def _labeled(lines: Iterator[str], name: str) -> tuple[Form, Iterator[Row]]:
    """Return the form and rows of lines that begin with a label, such as ``NUM:date When ...``."""
    rows = (_label_first(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    first = next(rows, None)
    columns = ("label", "fine", "text") if first is not None and "fine" in first.values else ("label", "text")
    return Form(kind="text", columns=columns), chain([] if first is None else [first], rows)


def _label_first(line: str, where: str) -> Row:
    label, _, rest = line.strip().partition(" ")
    if label.startswith(PREFIX):
        prefixed = re.match(rf"(?:{PREFIX}\S+\s*)+", line.strip())
        assert prefixed is not None
        labels = [word.removeprefix(PREFIX) for word in prefixed[0].split()]
        text = line.strip()[prefixed.end() :]
        return Row(where=where, values={"label": labels[0] if len(labels) == 1 else labels, "text": text})
    if ":" in label.strip(":"):
        return Row(where=where, values={"label": label.partition(":")[0], "fine": label, "text": rest})
    raise UserError(
        f"{where} begins with {label[:40]!r}, which is not a label",
        hint="expected lines that begin with LABEL:fine or __label__LABEL; or give a .jsonl, .csv or .tsv file",
    )


def expand(specs: Sequence[str]) -> list[Path]:
    """Return the files that names and globs match, ``hf:NAME`` as it is; UserError for a directory or no match."""
    paths: list[Path] = []
    for spec in specs:
        path = Path(spec)
        if path.is_dir():
            raise UserError(f"{path} is a directory", hint="name the files in it")
        paths += [path] if path.exists() or hf_data.is_named(spec) else files.matches(spec)
    return paths
