"""The reader of tables: JSON, csv, tsv, Parquet, lines that begin with their label, ``hf:NAME``.

Rows come one after another in bounded memory (``rows``; JSON that is not a line a row needs all of its text), or all at
once with what is known only then (``read``). ``delimited``, ``json_rows`` and ``parquet`` read the forms.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from tfcli.errors import UserError
from tfcli.text.read import delimited, files, hf_data, json_rows, parquet
from tfcli.text.read.files import Count, Errors
from tfcli.text.read.rows import Fault, Form, Kind, OnFault, Row, refuse

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
Select = Callable[[Sequence[str] | None], Iterator[Row]]


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
    sha256: str
    """Of the decompressed bytes of a file, or of the rows of a data set ``hf:NAME``."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that any row has."""
        return self.form.columns

    @property
    def header(self) -> bool:
        """Whether the columns have names of their own."""
        return self.form.header

    @property
    def digest(self) -> bytes:
        """What the file adds to a hash over several."""
        return self.sha256.encode() if hf_data.is_named(self.name) else bytes.fromhex(self.sha256)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a file, to go through once: first what was recognised of it, then each as it is read."""

    name: str
    form: Form
    count: Count
    """What was replaced so far."""
    select: Select
    """The rows, of the given columns alone where the file has them apart (Parquet), else whole."""
    hexdigest: Callable[[], str]

    def __iter__(self) -> Iterator[Row]:
        return self.select(None)

    @property
    def sha256(self) -> str:
        """Of the decompressed bytes of a file, or of the rows of a data set ``hf:NAME``, that were read so far."""
        return self.hexdigest()

    def table(self) -> Table:
        """All of them, with the columns that any has."""
        listed = list(self)
        columns = self.form.columns or tuple(dict.fromkeys(key for row in listed for key in row.values))
        form = replace(self.form, columns=columns)
        return Table(name=self.name, form=form, rows=listed, replaced=self.count.replaced, sha256=self.sha256)


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
    name, kind, digest = name or str(path), kind or kind_of(path), hashlib.sha256()
    told = count or Count(name=name)
    if kind == "hf":
        columns, listed = hf_data.rows(str(path))
        numbered = (Row(where=f"{name}: row {number}", values=row) for number, row in enumerate(listed, 1))
        form, of_rows = Form(kind=kind, columns=columns), partial(hf_data.digest, listed)
        return Rows(name=name, form=form, count=told, select=lambda _: numbered, hexdigest=of_rows)
    path = Path(path)
    if kind == "parquet":
        form, table = parquet.opened(path, name, digest.update if whole else None)
        hexdigest: Callable[[], str] = digest.hexdigest if whole else partial(_hash, path)
        return Rows(name=name, form=form, count=told, select=partial(parquet.rows, table, name), hexdigest=hexdigest)

    def text() -> Iterator[str]:
        return files.texts(path, name, errors, told, encoding=encoding, seen=digest.update)

    def look() -> Iterator[str]:
        return files.texts(path, name, errors, Count(name=name), encoding=encoding)

    if whole:
        pieces = list(text())
        look = text = partial(iter, pieces)
    form, made = _of_text(kind, look, text, name, known, header, expected, on_fault)
    return Rows(name=name, form=form, count=told, select=lambda _: made, hexdigest=digest.hexdigest)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_text(
    kind: Kind,
    look: Texts,
    text: Texts,
    name: str,
    known: Sequence[str],
    header: bool | None,
    expected: str,
    on_fault: OnFault,
) -> tuple[Form, Iterator[Row]]:
    """What a text is, after a ``look`` at it where that takes all of it, and its rows."""
    if kind == "jsonl":
        found = json_rows.lines(files.lines(text()), name, expected=expected, on_fault=on_fault)
        return Form(kind=kind), found
    if kind == "json":
        found = json_rows.any_layout("".join(text()), name, known, expected=expected, on_fault=on_fault)
        return Form(kind=kind), found
    if kind == "text" and not _has_tabs(look()):
        return _labelled(files.lines(text()), name)
    quoted = kind == "csv" or delimited.consistent(look(), "\t")
    delimiter = "," if kind == "csv" else "\t"
    records = delimited.records(text(), delimiter) if quoted else delimited.plain(text(), delimiter)
    return _table(_well_formed(records, name, kind), Form(kind=kind, quoted=quoted), name, known, header, on_fault)


def _well_formed(records: Iterator[delimited.Record], name: str, kind: Kind) -> Iterator[delimited.Record]:
    try:
        yield from records
    except delimited.Malformed as error:
        raise UserError(
            f"{name}:{error.line} is not valid {kind}: {error}",
            hint='a field with a comma, quote or line break goes in "quotes", a quote in it is doubled',
        ) from None


def _table(
    records: Iterator[delimited.Record],
    form: Form,
    name: str,
    known: Sequence[str],
    header: bool | None,
    on_fault: OnFault,
) -> tuple[Form, Iterator[Row]]:
    """The columns that the first record names, or has the number of, and rows of it and the others."""
    line, fields = next(records, (0, []))
    if not line:
        return form, iter(())
    first = [cell.strip() for cell in fields]
    lower = [cell.lower() for cell in first]
    if header is None:
        header = any(cell.lower() in lower for cell in known)
    if header and (twice := [cell for cell in known if lower.count(cell.lower()) > 1]):
        raise UserError(f"{name} has several columns {twice[0]!r}", hint="give each column a name of its own")
    columns = tuple(first) if header else tuple(str(number) for number in range(1, len(first) + 1))
    form = replace(form, columns=columns, header=header)
    return form, _filled(records if header else chain([(line, fields)], records), form, name, on_fault)


def _filled(records: Iterable[delimited.Record], form: Form, name: str, on_fault: OnFault) -> Iterator[Row]:
    columns = form.columns
    twice = len(set(columns)) < len(columns)
    for line, fields in records:
        where = f"{name}:{line}"
        if len(fields) == len(columns):
            values = dict(zip(columns, fields, strict=True))
            if twice:  # the first of a name counts
                values |= dict(zip(reversed(columns), reversed(fields), strict=True))
            yield Row(where=where, values=values)
            continue
        of = "header" if form.header else "first line"
        listed = f"columns: {', '.join(columns)}; " if form.header else ""
        error = UserError(
            f"{where} has {len(fields)} fields, the {of} has {len(columns)}",
            hint=f'{listed}text with a separator or line break in it goes in "quotes"',
        )
        on_fault(Fault(where=where, kind="number of fields", error=error))


def _has_tabs(pieces: Iterator[str]) -> bool:
    """Whether every line that is not blank has one, and there are such lines."""
    some = False
    for line in files.lines(pieces):
        if line.strip():
            some = "\t" in line
            if not some:
                break
    return some


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
        return Row(
            where=where,
            values={"label": found[0] if len(found) == 1 else found, "text": line.strip()[labels.end() :]},
        )
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
