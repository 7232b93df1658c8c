"""Pairs of texts from files: two aligned files, lines with a tab, or rows with two columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tfcli.errors import UserError
from tfcli.tasks.common.report import Report
from tfcli.tasks.translate.options import PairData
from tfcli.text.read import delimited, files, tables

SOURCES, TARGETS = ("source", "src", "input", "question"), ("target", "tgt", "output", "answer")
"""Names of columns that are known."""
ROWS = ("jsonl", "json", "csv", "parquet", "hf")
"""Kinds of tables with a column for each side."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and its translation."""

    source: str
    target: str
    where: tuple[str, ...] = field(default=(), compare=False)
    """The line of both, or of each in a file of its own."""


@dataclass(kw_only=True)
class Pairs:
    """What files held."""

    pairs: list[Pair]
    hash: str
    report: Report


def read(specs: Sequence[str], options: PairData, report: Report | None = None) -> Pairs:
    """All pairs of files: of two text files line by line, else of each file row by row.

    Pairs with an empty side are counted and left out. Raises UserError for files that have other numbers of lines, for
    rows without both texts, and for no pairs at all.
    """
    paths = tables.expand([part for spec in specs for part in _halves(spec)])
    report = report or Report(strict=options.strict)
    first = len(report.sources)
    found: list[Pair] = []
    if len(paths) == 2 and not any(tables.kind_of(path) in (*ROWS, "tsv") for path in paths):
        whole = enumerate(_aligned(paths, [_lines(path, options, report) for path in paths]), 1)
        listed = [Pair(a, b, (f"{paths[0]}:{n}", f"{paths[1]}:{n}")) for n, (a, b) in whole]
    else:
        listed = [entry for path in paths for entry in _table(path, options, report)]
    for pair in listed:
        if pair.source.strip() and pair.target.strip():
            found.append(pair)
        else:
            report.fault("pairs with an empty side, left out", pair.where[0])
    if not found:
        raise UserError(f"{' and '.join(map(str, paths))} hold no pairs of texts")
    digest = hashlib.sha256()
    for source in report.sources[first:]:
        rows = tables.kind_of(source.name) in ROWS
        digest.update(source.sha256.encode() if rows else bytes.fromhex(source.sha256))
    return Pairs(pairs=found, hash=digest.hexdigest(), report=report)


def _halves(spec: str) -> list[str]:
    """Two files with a comma between, where there is no file of that name."""
    parts = spec.split(",")
    return parts if len(parts) == 2 and not Path(spec).exists() and Path(parts[0]).exists() else [spec]


def _lines(path: Path, options: PairData, report: Report) -> list[str]:
    """The lines of a text file; line breaks are \\n or \\r\\n, and no other character ends a line."""
    text = report.text(path, encoding=options.encoding, errors=options.errors)
    return [line.removesuffix("\n").removesuffix("\r") for line in files.lines(iter([text]))]


def _aligned(paths: Sequence[Path], read_: Sequence[list[str]]) -> list[tuple[str, str]]:
    source, target = read_
    if len(source) != len(target):
        raise UserError(
            f"{paths[0]} has {len(source):,} lines, {paths[1]} has {len(target):,}",
            hint="line n of the one must be the translation of line n of the other",
        )
    return list(zip(source, target, strict=True))


def _table(path: Path, options: PairData, report: Report) -> list[Pair]:
    if tables.kind_of(path) not in ROWS:
        return _tabbed(path, options, report)
    known = [*SOURCES, *TARGETS, *(name for name in (options.source, options.target) if name)]
    listed = tables.rows(path, known=known, encoding=options.encoding, errors=options.errors, whole=True)
    found = []
    for row in report.table(listed).rows:
        values = row.values.get("translation", row.values)  # as the data sets of Hugging Face have it
        values = values if isinstance(values, dict) else row.values
        keys = [key for key, value in values.items() if isinstance(value, str)]
        source = _column(options.source, SOURCES, keys, 0, row.where, "source")
        target = _column(options.target, TARGETS, keys, 1, row.where, "target")
        found.append(Pair(values[source], values[target], (row.where,)))
    return found


def _column(asked: str | None, known: Sequence[str], keys: Sequence[str], place: int, where: str, what: str) -> str:
    """The column of a side: the one that is asked for, one of a known name, or the one of two at its place."""
    if asked is not None:
        if asked not in keys:
            raise UserError(f"{where} has no text {asked!r}", hint=f"it has: {', '.join(keys) or 'none'}")
        return asked
    named = [key for key in keys if key.lower() in known]
    if named:
        return named[0]
    if len(keys) == 2:
        return keys[place]
    raise UserError(
        f"{where}: which of {', '.join(keys) or 'no texts'} is the {what}?", hint=f"name it: --set data.{what}=COLUMN"
    )


def _tabbed(path: Path, options: PairData, report: Report) -> list[Pair]:
    """Lines with a tab between the two texts; quotes are part of a text, a first line of two known names is none."""
    text = report.text(path, encoding=options.encoding, errors=options.errors)
    records = [each for each in delimited.plain(iter([text])) if any(cell.strip() for cell in each[1])]
    places = (0, 1)
    if records and (options.source or options.target or _is_header(records[0][1])):
        first, fields = records.pop(0)
        names = [name.strip() for name in fields]
        places = (
            names.index(_column(options.source, SOURCES, names, 0, f"{path}:{first}", "source")),
            names.index(_column(options.target, TARGETS, names, 1, f"{path}:{first}", "target")),
        )
    found = []
    for number, cells in records:
        if len(cells) <= max(places):
            line = "\t".join(cells)
            hint = "a source, a tab and a target" if len(cells) == 1 else None
            raise UserError(f"{path}:{number} has {len(cells)} fields: {line[:60]!r}", hint=hint)
        found.append(Pair(cells[places[0]], cells[places[1]], (f"{path}:{number}",)))
    return found


def _is_header(cells: Sequence[str]) -> bool:
    names = [name.strip().lower() for name in cells]
    return len(names) > 1 and any(n in SOURCES for n in names) and any(n in TARGETS for n in names)
