"""The reader of tables: JSON, csv, tsv, Parquet, lines that begin with their label, ``hf:NAME``.

Rows come one after another in bounded memory (``rows``; JSON that is not a line a row needs all of its text), or all at
once with what is known only then (``read``). ``delimited``, ``json_rows`` and ``parquet`` read the forms.
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
"""Before each label, in fastText's files."""
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COLUMNS: tuple[Kind, ...] = ("csv", "tsv", "parquet", "hf")
"""Kinds whose rows have the same columns."""
Texts = Callable[[], Iterator[str]]
"""The text of a file in pieces, from its beginning at every call."""


def kind_of(path: str | Path) -> Kind:
    """What a file is by its name: "text" where that says nothing."""
    return "hf" if hf_data.is_named(path) else KINDS.get(files.stem_suffix(Path(path))[0], "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All rows of a file."""

    name: str
    form: Form
    rows: list[Row]
    replaced: int
    """Bytes (or sequences of them) that became U+FFFD."""
    digest: Digest
    """Of the file, decompressed; of ``hf:NAME`` of its rows as JSON."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a file, to go through once: first what was recognised of it, then each as it is read."""

    name: str
    form: Form
    count: Count
    """What was replaced so far."""
    digest: Digest
    """Of what was read so far; of Parquet that is not read whole of nothing."""
    select: Callable[[Sequence[str] | None], Iterator[Row]]
    """The rows, of the given columns alone where the file has them apart (Parquet), else whole."""

    def __iter__(self) -> Iterator[Row]:
        return self.select(None)

    def table(self) -> Table:
        """All of them, with the columns that any has."""
        listed = list(self)
        columns = self.form.columns or tuple(dict.fromkeys(key for row in listed for key in row.values))
        form = replace(self.form, columns=columns)
        return Table(name=self.name, form=form, rows=listed, replaced=self.count.replaced, digest=self.digest)


def read(path: str | Path, *, known: Sequence[str], encoding: str = "utf-8", errors: Errors = "strict") -> Table:
    """All rows of a file or of ``hf:NAME``, as ``rows`` gives them; the file is opened and read once."""
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
    """The rows of a file, or of the data set that ``hf:NAME`` names, in memory that does not grow with the file.

    ``name`` is how messages call it, ``kind`` what it is where its name does not say. Its first line is a header where
    ``header`` says so, or if it is None, where the line has one of ``known``. Without an ``encoding`` it is UTF-8, and
    the command has no option for another. Tables with tabs, and text, are gone through twice, as quotes in them count
    only where they make sense in all of the file; with ``whole`` the file is read once, and held. So is ``hf:NAME``.
    Classes that Hugging Face's library numbers are read by their names.

    Raises UserError, here or at a row, for whatever is not what it should be, with the file and the line; what a single
    row has wrong goes to ``on_fault``, ``expected`` being the hint.
    """
    name, kind, digest = name or str(path), kind or kind_of(path), Digest()
    told = count or Count(name=name)
    if kind == "hf":
        columns, listed = hf_data.rows(str(path))
        numbered = (Row(where=f"{name}: row {number}", values=row) for number, row in enumerate(listed, 1))
        form, digest = Form(kind=kind, columns=columns), hf_data.digest(listed)
        return Rows(name=name, form=form, count=told, digest=digest, select=lambda _: numbered)
    path = Path(path)
    if kind == "parquet":
        form, table = parquet.opened(path, name, digest.update if whole else None)
        return Rows(name=name, form=form, count=told, digest=digest, select=partial(parquet.rows, table, name))

    def text() -> Iterator[str]:
        return files.texts(path, name, errors, told, encoding=encoding, seen=digest.update)

    def look() -> Iterator[str]:
        return files.texts(path, name, errors, Count(name=name), encoding=encoding)

    if whole:
        pieces = list(text())
        look = text = partial(iter, pieces)
    ask = Ask(name=name, known=known, header=header, expected=expected, on_fault=on_fault)
    form, made = _of_text(kind, look, text, ask)
    return Rows(name=name, form=form, count=told, digest=digest, select=lambda _: made)


def _of_text(kind: Kind, look: Texts, text: Texts, ask: Ask) -> tuple[Form, Iterator[Row]]:
    """What a text is, after a ``look`` at it where that takes all of it, and its rows."""
    if kind == "jsonl":
        return Form(kind=kind), json_rows.lines(files.lines(text()), ask)
    if kind == "json":
        return Form(kind=kind), json_rows.any_layout("".join(text()), ask)
    if kind == "text" and not _has_tabs(look()):
        return _labelled(files.lines(text()), ask.name)
    quoted = kind == "csv" or delimited.consistent(look())
    records = delimited.records(text(), ask.name, kind) if quoted else delimited.plain(text())
    return _table(records, Form(kind=kind), ask)


def _table(records: Iterator[delimited.Record], form: Form, ask: Ask) -> tuple[Form, Iterator[Row]]:
    """The columns that the first record names, or has the number of, and rows of it and the others."""
    line, fields = next(records, (0, []))
    if not line:
        return form, iter(())
    first = [cell.strip() for cell in fields]
    lower = [cell.lower() for cell in first]
    header = any(cell.lower() in lower for cell in ask.known) if ask.header is None else ask.header
    if header and (twice := [cell for cell in ask.known if lower.count(cell.lower()) > 1]):
        raise UserError(f"{ask.name} has several columns {twice[0]!r}", hint="give each column a name of its own")
    columns = tuple(first) if header else tuple(str(number) for number in range(1, len(first) + 1))
    form = replace(form, columns=columns, header=header)
    return form, _filled(records if header else chain([(line, fields)], records), form, ask)


def _filled(records: Iterable[delimited.Record], form: Form, ask: Ask) -> Iterator[Row]:
    columns = form.columns
    for line, fields in records:
        where = f"{ask.name}:{line}"
        if len(fields) == len(columns):
            values = dict(zip(columns, fields, strict=True))
            if len(values) < len(columns):  # the first of a name counts
                values |= dict(zip(reversed(columns), reversed(fields), strict=True))
            yield Row(where=where, values=values)
            continue
        of = "header" if form.header else "first line"
        listed = f"columns: {', '.join(columns)}; " if form.header else ""
        error = UserError(
            f"{where} has {len(fields)} fields, the {of} has {len(columns)}",
            hint=f'{listed}text with a separator or line break in it goes in "quotes"',
        )
        ask.on_fault(Fault(where=where, kind="rows with another number of fields", error=error))


def _has_tabs(pieces: Iterator[str]) -> bool:
    """Whether every line that is not blank has one, and there are such lines."""
    return {"\t" in line for line in files.lines(pieces) if line.strip()} == {True}


def _labelled(lines: Iterator[str], name: str) -> tuple[Form, Iterator[Row]]:
    """Lines that each begin with a label, as ``NUM:date When ...``."""
    found = (_label_first(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    first = next(found, None)
    columns = ("label", "fine", "text") if first is not None and "fine" in first.values else ("label", "text")
    return Form(kind="text", columns=columns), chain([] if first is None else [first], found)


def _label_first(line: str, where: str) -> Row:
    label, _, rest = line.strip().partition(" ")
    if label.startswith(PREFIX):
        labels = re.match(rf"(?:{PREFIX}\S+\s*)+", line.strip())
        assert labels is not None
        found = [word.removeprefix(PREFIX) for word in labels[0].split()]
        one = found[0] if len(found) == 1 else found
        return Row(where=where, values={"label": one, "text": line.strip()[labels.end() :]})
    if ":" in label.strip(":"):
        return Row(where=where, values={"label": label.partition(":")[0], "fine": label, "text": rest})
    raise UserError(
        f"{where} begins with {label[:40]!r}, which is no label",
        hint="lines of text begin with LABEL:fine or __label__LABEL; .jsonl, .csv and .tsv files have columns",
    )


def expand(specs: Sequence[str]) -> list[Path]:
    """The files that names and globs stand for, ``hf:NAME`` as it is.

    Raises UserError for one that stands for none, and for a directory.
    """
    found: list[Path] = []
    for spec in specs:
        path = Path(spec)
        if path.is_dir():
            raise UserError(f"{path} is a directory", hint="name the files in it that are to be read")
        found += [path] if path.exists() or hf_data.is_named(spec) else files.matches(spec)
    return found
