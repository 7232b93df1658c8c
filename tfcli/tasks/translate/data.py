"""Pairs of texts from files: two aligned files, lines with a tab, or rows with two columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfcli.errors import UserError
from tfcli.tasks.common.report import Report
from tfcli.tasks.translate.options import PairData
from tfcli.text.read import files, hf_data, tables

SOURCES, TARGETS = ("source", "src", "input", "question"), ("target", "tgt", "output", "answer")
"""Names of columns that are known."""
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


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
    digest = hashlib.sha256()
    found: list[Pair] = []
    if len(paths) == 2 and not any(_kind(path) in (*ROWS, ".tsv") for path in paths):
        read_ = [_text(path, options, digest, report) for path in paths]
        whole = enumerate(_aligned(paths, read_), 1)
        listed = [Pair(a, b, (f"{paths[0]}:{n}", f"{paths[1]}:{n}")) for n, (a, b) in whole]
    else:
        listed = [entry for path in paths for entry in _table(path, options, digest, report)]
    for pair in listed:
        if pair.source.strip() and pair.target.strip():
            found.append(pair)
        else:
            report.fault("pairs with an empty side, left out", pair.where[0])
    if not found:
        raise UserError(f"{' and '.join(map(str, paths))} hold no pairs of texts")
    return Pairs(pairs=found, hash=digest.hexdigest(), report=report)


def _halves(spec: str) -> list[str]:
    """Two files with a comma between, where there is no file of that name."""
    parts = spec.split(",")
    return parts if len(parts) == 2 and not Path(spec).exists() and Path(parts[0]).exists() else [spec]


def _kind(path: Path) -> str:
    return ".parquet" if hf_data.is_named(path) else files.stem_suffix(path)[0]


def _text(path: Path, options: PairData, digest: Any, report: Report) -> list[str]:
    """The lines of a text file; line breaks are \\n or \\r\\n, and no other character ends a line."""
    text = report.text(path, encoding=options.encoding, errors=options.errors)
    digest.update(bytes.fromhex(report.sources[-1].sha256))
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _aligned(paths: Sequence[Path], read_: Sequence[list[str]]) -> list[tuple[str, str]]:
    source, target = read_
    if len(source) != len(target):
        raise UserError(
            f"{paths[0]} has {len(source):,} lines, {paths[1]} has {len(target):,}",
            hint="line n of the one must be the translation of line n of the other",
        )
    return list(zip(source, target, strict=True))


def _table(path: Path, options: PairData, digest: Any, report: Report) -> list[Pair]:
    if _kind(path) not in ROWS:
        return _tabbed(path, options, digest, report)
    known = [*SOURCES, *TARGETS, *(name for name in (options.source, options.target) if name)]
    table = tables.read(path, known=known, encoding=options.encoding, errors=options.errors)
    report.source(table.name, bytes=table.bytes, sha256=table.sha256, replaced=table.replaced)
    digest.update(table.sha256.encode())
    found = []
    for row in table.rows:
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


def _tabbed(path: Path, options: PairData, digest: Any, report: Report) -> list[Pair]:
    """Lines with a tab between the two texts; quotes are part of a text, a first line of two known names is none."""
    lines = _text(path, options, digest, report)
    columns = (0, 1)
    if lines and (options.source or options.target or _is_header(lines[0])):
        names = [name.strip() for name in lines[0].split("\t")]
        columns = (
            names.index(_column(options.source, SOURCES, names, 0, f"{path}:1", "source")),
            names.index(_column(options.target, TARGETS, names, 1, f"{path}:1", "target")),
        )
        lines[0] = ""
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) <= max(columns):
            hint = "a source, a tab and a target" if len(cells) == 1 else None
            raise UserError(f"{path}:{number} has {len(cells)} fields: {line[:60]!r}", hint=hint)
        found.append(Pair(cells[columns[0]], cells[columns[1]], (f"{path}:{number}",)))
    return found


def _is_header(line: str) -> bool:
    names = [name.strip().lower() for name in line.split("\t")]
    return len(names) > 1 and any(n in SOURCES for n in names) and any(n in TARGETS for n in names)
