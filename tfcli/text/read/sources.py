"""Sources of text: files, directories, globs, stdin and ``hf:NAME``, read as documents in bounded chunks.

A plain text file is one document, line breaks included; so is each line of JSON lines and each row of a table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tfcli import disk
from tfcli.config.options import DataOptions
from tfcli.errors import RunError, UserError, absent
from tfcli.text.read import files, hf_data, tables
from tfcli.text.read.files import Count, Counts
from tfcli.text.read.rows import Kind

CHUNK = 1 << 20
"""The approximate number of characters in a chunk."""
EXPECTED_JSON = 'expected one JSON object a line, such as {"text": "..."}'


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file to read; messages and data reports show its ``name``."""

    path: Path
    kind: Kind
    name: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document of the source with index ``source``; ``end`` marks the document's last piece."""

    text: str
    end: bool
    source: int = 0


@contextmanager
def spooling(inside: Path | None = None) -> Iterator[Path]:
    """A temporary directory for copies of what can be read only once, deleted at the end of the block.

    It is created in ``inside``, or in the system's directory for temporary files. Raises RunError if it cannot be.
    """
    import tempfile

    try:
        temporary = tempfile.TemporaryDirectory(
            dir=inside, prefix="tfcli-", suffix=disk.mark(), ignore_cleanup_errors=True
        )
    except OSError as error:
        where = inside or "the directory for temporary files"
        raise RunError(f"cannot create a directory in {where}: {error.strerror}") from None
    with temporary as directory:
        yield Path(directory)


def find(specs: Sequence[str], *, spool: Path, on_note: Callable[[str], None] | None = None) -> list[Source]:
    """Return the sources for files, directories (recursive, sorted, no hidden files), globs, "-" and ``hf:NAME:SPLIT``.

    Datasets, stdin ("-") and pipes are copied to a file in the directory ``spool`` (see ``spooling``), as text is read
    more than once. Non-text files in a directory are skipped and reported to ``on_note``.
    Raises UserError for a name that matches nothing.
    """
    if not specs:
        raise UserError("no text was given", hint="name a file, a directory, a glob, or - for stdin")
    sources: list[Source] = []
    for spec in specs:
        path = Path(spec)
        if spec == "-":
            sources.append(_stdin(spool))
        elif hf_data.is_named(spec):
            sources.append(_named(spec, spool / f"hf-{len(sources)}.parquet"))
        elif path.is_dir():
            sources += _directory(path, on_note)
        elif path.is_file():
            sources.append(_source(path))
        elif path.exists():  # a pipe, as in <(zcat corpus.gz)
            with path.open("rb") as file:
                sources.append(_spooled(file, spec, spool))
        else:
            for match in files.matches(spec):
                sources += _directory(match, on_note) if match.is_dir() else [_source(match)]
    return sources


def _named(spec: str, path: Path) -> Source:
    dataset = hf_data.load(spec)
    try:
        dataset.to_parquet(path)
    except OSError as error:
        raise RunError(f"{spec} cannot be copied to {path.parent}: {error.strerror}") from None
    return Source(path=path, kind="parquet", name=spec)


def _source(path: Path) -> Source:
    kind = tables.KINDS.get(files.stem_suffix(path)[0], "text")
    return Source(path=path, kind="jsonl" if kind == "json" else kind, name=str(path))


def _directory(path: Path, on_note: Callable[[str], None] | None) -> list[Source]:
    kept: list[Source] = []
    skipped: list[Source] = []
    for entry in sorted(path.rglob("*")):
        if not entry.is_file() or any(part.startswith(".") for part in entry.relative_to(path).parts):
            continue
        source = _source(entry)
        binary = source.kind != "parquet" and files.what_it_is(_head(source)) not in (None, "UTF-16 text")
        (skipped if binary else kept).append(source)
    if not kept:
        raise UserError(f"no text in the directory {path}", hint="text, .jsonl, .csv, .tsv and .parquet files are read")
    if skipped and on_note:
        names = ", ".join(source.path.name for source in skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        on_note(f"skipped {len(skipped)} in {path} that are not text: {names}")
    return kept


def _head(source: Source) -> bytes:
    try:
        return next(files.blocks(source.path, source.name), b"")[: files.SNIFF]
    except UserError:
        return b""  # the reader will report why


def stdin() -> BinaryIO:
    """Return the byte stream of stdin; UserError if the process has none."""
    if sys.stdin is None:
        raise UserError("stdin is closed", hint="pipe a text in, or name a file")
    return sys.stdin.buffer


def _stdin(spool: Path) -> Source:
    stream = stdin()
    if sys.stdin.isatty():
        raise UserError("stdin is a terminal, not a text", hint="pipe a text in, or name a file")
    return _spooled(stream, "stdin", spool)


def _spooled(stream: BinaryIO, name: str, spool: Path) -> Source:
    import shutil
    import tempfile

    try:
        with tempfile.NamedTemporaryFile("wb", dir=spool, prefix="stdin-", suffix=".txt", delete=False) as file:
            shutil.copyfileobj(stream, file, files.BLOCK)
    except OSError as error:
        raise RunError(f"{name} cannot be copied to {spool}: {error.strerror}") from None
    return Source(path=Path(file.name), kind="text", name=name)


def read(sources: Sequence[Source], options: DataOptions, counts: Counts | None = None) -> Iterator[Chunk]:
    """Yield every document of ``sources``, in order, in chunks of about ``CHUNK`` characters.

    Empty documents are dropped and counted. ``counts`` gets one ``Count`` per source, complete once all is read.
    Raises UserError for invalid input, with the file and the line or byte.
    """
    counts = Counts() if counts is None else counts
    for index, source in enumerate(sources):
        count = Count(name=source.name)
        counts.sources.append(count)
        if source.kind == "text":
            pieces = files.texts(source.path, source.name, options.errors, count)
            yield from _document(pieces, source.name, count, index)
            continue
        for where, text in _column(source, options, count):
            pieces = (text[at : at + CHUNK] for at in range(0, len(text), CHUNK))
            yield from _document(pieces, where, count, index)


def _document(pieces: Iterable[str], where: str, count: Count, index: int) -> Iterator[Chunk]:
    rest = ""
    for piece in pieces:
        rest += piece
        if len(rest) > CHUNK:
            at = cut_point(rest, len(rest) - 1)
            head, rest = rest[:at], rest[at:]
            count.bytes += utf8_length(head)
            yield Chunk(head, False, index)
    if not rest:
        count.drop(where)
        return
    count.documents += 1
    count.bytes += utf8_length(rest)
    yield Chunk(rest, True, index)


def cut_point(text: str, limit: int) -> int:
    """Return where to cut ``text``: the last place up to ``limit`` < len(text) after a run of line breaks.

    If there is none, before a word, else at ``limit``. No token of the usual tokenizers crosses the first two.
    """
    at = text.rfind("\n", 0, limit) + 1
    while at and text[at] == "\n":  # within a run of line breaks, which some tokenizers have tokens for
        start = at - 1
        while start and text[start - 1] == "\n":
            start -= 1
        at = text.rfind("\n", 0, start) + 1 if start else 0
    if at:
        return at
    at = text.rfind(" ", 1, limit)
    while at > 0 and text[at - 1] == " ":
        at -= 1
    return at if at > 0 else limit


def utf8_length(text: str) -> int:
    """Bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def pick_key(row: Mapping[str, object], wanted: str | None, where: str) -> str:
    """Return the field with the text: ``wanted``, else text, content or the only one with a string; else UserError."""
    listed = ", ".join(map(str, row))
    if wanted is not None:
        if wanted in row:
            return wanted
        raise absent(f"{where} has no field {wanted!r}", wanted, row)
    for usual in ("text", "content"):
        if isinstance(row.get(usual), str):
            return usual
    strings = [key for key, value in row.items() if isinstance(value, str) and not _is_number(value)]
    if len(strings) == 1:
        return strings[0]
    raise UserError(
        f"cannot tell which field of {where} has the text", hint=f"name it with --text-key; it has: {listed}"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _value(value: object, where: str, key: str, options: DataOptions, count: Count) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {type(value).__name__}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if options.errors == "strict":
            raise UserError(
                f"{where}: {key!r} has a lone surrogate at character {error.start}, which is not text",
                hint="replace and count what is invalid: --errors replace",
            ) from None
        value, replaced = re.subn(r"[\ud800-\udfff]", "\ufffd", value)
        count.replace(replaced, where)
    return value


def _column(source: Source, options: DataOptions, count: Count) -> Iterator[tuple[str, str]]:
    table = tables.rows(
        source.path, name=source.name, kind=source.kind, header=True, errors=options.errors, expected=EXPECTED_JSON,
        count=count,
    )  # fmt: skip
    key: str | None = None
    columns: list[str] | None = None
    if source.kind == "parquet":  # the types of its columns tell which has the text, so that only that one is read
        examples = {name: "x" if name in table.form.strings else 0 for name in table.form.columns}
        key = pick_key(examples, options.text_key, source.name)
        columns = [key]
    for row in table.select(columns):
        if key is None or key not in row.values:
            where = source.name if table.form.columns else row.where
            key = pick_key(row.values, key or options.text_key, where)
        yield row.where, _value(row.values[key], row.where, key, options, count)
