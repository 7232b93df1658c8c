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
"""Names of columns that are recognized."""
ROWS = ("jsonl", "json", "csv", "parquet", "hf")
"""Kinds of tables with a column for each side."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and its translation."""

    source: str
    target: str
    where: tuple[str, ...] = field(default=(), compare=False)
    """The line of both, or one of each file."""


def read(specs: Sequence[str], options: PairData, report: Report) -> tuple[list[Pair], str]:
    """Read the pairs of two aligned text files, or of the rows of each file, and hash the files.

    Pairs with an empty side are skipped and counted. Raises UserError for aligned files that differ in length, for rows
    without both texts, and for no pairs at all.
    """
    paths = tables.expand([part for spec in specs for part in _halves(spec)])
    first = len(report.sources)
    pairs: list[Pair] = []
    if len(paths) == 2 and not any(tables.kind_of(path) in (*ROWS, "tsv") for path in paths):
        whole = enumerate(_aligned(paths, [_lines(path, report) for path in paths]), 1)
        listed = [Pair(a, b, (f"{paths[0]}:{n}", f"{paths[1]}:{n}")) for n, (a, b) in whole]
    else:
        listed = [entry for path in paths for entry in _table(path, options, report)]
    for pair in listed:
        if pair.source.strip() and pair.target.strip():
            pairs.append(pair)
        else:
            report.fault("pairs with an empty side, left out", pair.where[0])
    if not pairs:
        raise UserError(f"{' and '.join(map(str, paths))} hold no pairs of texts")
    digest = hashlib.sha256()
    for source in report.sources[first:]:
        rows = tables.kind_of(source.name) in ROWS
        digest.update(source.sha256.encode() if rows else bytes.fromhex(source.sha256))
    return pairs, digest.hexdigest()


def _halves(spec: str) -> list[str]:
    """Split two files with a comma between, where no file has that name."""
    parts = spec.split(",")
    return parts if len(parts) == 2 and not Path(spec).exists() and Path(parts[0]).exists() else [spec]


def _lines(path: Path, report: Report) -> list[str]:
    """Return the lines of a text file, which end with \\n or \\r\\n alone."""
    return [line.removesuffix("\n").removesuffix("\r") for line in files.lines(iter([report.text(path)]))]


def _aligned(paths: Sequence[Path], sides: Sequence[list[str]]) -> list[tuple[str, str]]:
    source, target = sides
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
    pairs = []
    for row in report.table(path, known).rows:
        values = row.values.get("translation", row.values)  # as the data sets of Hugging Face have it
        values = values if isinstance(values, dict) else row.values
        keys = [key for key, value in values.items() if isinstance(value, str)]
        source = _column(options.source, SOURCES, keys, 0, row.where, "source")
        target = _column(options.target, TARGETS, keys, 1, row.where, "target")
        pairs.append(Pair(values[source], values[target], (row.where,)))
    return pairs


def _column(asked: str | None, known: Sequence[str], keys: Sequence[str], place: int, where: str, what: str) -> str:
    """Return the column of a side: by the settings, by a known name, or of two columns by its place."""
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
    """Read lines with a tab between the texts; quotes are text, and a first line of two known names is a header."""
    records = [each for each in delimited.plain(iter([report.text(path)])) if any(cell.strip() for cell in each[1])]
    places = (0, 1)
    if records and (options.source or options.target or _is_header(records[0][1])):
        first, fields = records.pop(0)
        names = [name.strip() for name in fields]
        places = (
            names.index(_column(options.source, SOURCES, names, 0, f"{path}:{first}", "source")),
            names.index(_column(options.target, TARGETS, names, 1, f"{path}:{first}", "target")),
        )
    pairs = []
    for number, cells in records:
        if len(cells) <= max(places):
            line = "\t".join(cells)
            hint = "a source, a tab and a target" if len(cells) == 1 else None
            raise UserError(f"{path}:{number} has {len(cells)} fields: {line[:60]!r}", hint=hint)
        pairs.append(Pair(cells[places[0]], cells[places[1]], (f"{path}:{number}",)))
    return pairs


def _is_header(cells: Sequence[str]) -> bool:
    names = [name.strip().lower() for name in cells]
    return len(names) > 1 and any(n in SOURCES for n in names) and any(n in TARGETS for n in names)
