"""Sentences with named entities, read from CoNLL columns, JSON or tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tfcli.errors import UserError
from tfcli.tasks.common import columns
from tfcli.tasks.common.report import Report
from tfcli.tasks.tag.options import TagData
from tfcli.tasks.tag.schemes import TAG, Entity, Scheme, broken, entities, scheme_of, unified, write
from tfcli.tasks.tag.words import Span, joined, snapped, split
from tfcli.text.read import files, tables
from tfcli.text.read.rows import Row

TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")
SPANS = ("spans", "entities", "label", "labels")
EXPECTED = (
    'expected {"tokens": [...], "tags": [...]} or {"text": "...", "spans": [{"start": 0, "end": 5, "label": "x"}]}'
)
UNTAGGED = "sentences with neither tags nor spans, taken as without entities"
SPACES = re.compile(r"[ \t]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """A text, the spans of its words, and their entities; ``where`` it was read, "file:line".

    ``own_words``: the words were given, and the text is made of them.
    """

    text: str
    words: tuple[Span, ...]
    entities: tuple[Entity, ...] = ()
    own_words: bool = False
    where: str = ""

    def tags(self, scheme: Scheme) -> list[str]:
        """Return one tag per word."""
        return write(self.entities, len(self.words), scheme)

    @property
    def tokens(self) -> list[str]:
        """The words as strings."""
        return [self.text[start:end] for start, end in self.words]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tagged:
    """The sentences of a file, and the scheme of their tags (None for spans of characters)."""

    sentences: tuple[Sentence, ...]
    scheme: Scheme | None
    bare: bool = False
    """True if no sentence has tags or spans, not even empty ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A sentence as it was read: unchecked tags, or entities."""

    where: str
    text: str
    words: tuple[Span, ...]
    tags: list[str] | None = None
    entities: tuple[Entity, ...] = ()
    bare: bool = False
    """True if it has neither tags nor spans."""


def read(path: Path, report: Report, options: TagData | None = None, *, repair: bool = True) -> Tagged:
    """Read the sentences of a file: a table (.csv, .tsv, .parquet, hf:NAME), JSON (.jsonl, .ndjson, .json), else CoNLL.

    A sentence whose tags do not follow the data's scheme keeps the entities that conlleval reads in it, and is counted;
    with ``repair`` off it raises UserError. What cannot be used is skipped and counted in ``report``. Raises UserError
    for a file that is not text, has neither form, or has no sentences.
    """
    before = dict(report.faults)
    keys = (options or TagData()).keys
    conll = tables.kind_of(path) == "text"
    if conll:
        rows = list(_conll(files.lines(iter([report.text(path)])), str(path), report))
    else:
        rows = list(_rows(_table(path, keys, report), keys, report))
    rows = _unprefixed(rows, report)
    usable = [row for row in rows if row.tags is None or _usable(row, report)]
    if not usable:
        hint = "expected a word and its tag per line" if conll else EXPECTED
        raise report.none("sentences", str(path), before=before, hint=hint)
    bare = sum(row.bare for row in usable)
    report.note(UNTAGGED, bare)
    tagged = any(row.tags is not None for row in usable)
    scheme = scheme_of(tag for row in usable if row.tags for tag in row.tags) if tagged else None
    sentences = tuple(_sentence(row, scheme, report, repair) for row in usable)
    return Tagged(sentences=sentences, scheme=scheme, bare=bare == len(usable))


def _usable(row: _Row, report: Report) -> bool:
    assert row.tags is not None
    odd = next((tag for tag in row.tags if not TAG.fullmatch(tag)), None)
    if odd is not None:
        report.fault("sentences with a tag that is neither O nor B-, I-, E-, S-, left out", f"{row.where} {odd!r}")
    return odd is None


def _unprefixed(rows: list[_Row], report: Report) -> list[_Row]:
    """Return rows with BILOU as BIOES; where tags have no prefix, such as "PER", each run of one label is an entity."""
    kinds = {tag for row in rows for tag in unified(row.tags or ()) if tag != "O"}
    plain = bool(kinds) and not any(TAG.fullmatch(tag) for tag in kinds)
    if plain:
        report.note("labels without B- or I-: a run of one label is one entity", len(kinds))

    def bio(tags: list[str]) -> list[str]:
        tags = unified(tags)
        runs = entities(["O" if tag == "O" else f"I-{tag}" for tag in tags]) if plain else []
        return write(runs, len(tags), "bio") if plain else tags

    return [row if row.tags is None else replace(row, tags=bio(row.tags)) for row in rows]


def _sentence(row: _Row, scheme: Scheme | None, report: Report, repair: bool) -> Sentence:
    listed = row.entities
    if row.tags is not None and scheme is not None:
        listed = tuple(entities(row.tags))
        at = broken(row.tags, scheme)
        if at is not None and not repair:
            raise UserError(
                f"{row.where}: word {at + 1} has the tag {row.tags[at]}, which does not follow {scheme.upper()}",
                hint="--set tag.repair=true reads such tags as conlleval does",
            )
        if at is not None:
            kind = f"sentences whose tags do not follow {scheme.upper()}, read as conlleval does"
            report.fault(kind, row.where, "repaired")
    own = row.tags is not None
    return Sentence(text=row.text, words=row.words, entities=listed, own_words=own, where=row.where)


# CoNLL columns.


def _conll(lines: Iterable[str], name: str, report: Report) -> Iterator[_Row]:
    """Read a word per line, its tag in the last column, and an empty line between sentences."""
    listed = [line.rstrip("\r\n") for line in lines]
    tabs = sum("\t" in line for line in listed if line.strip())
    by_tab = tabs * 2 > sum(1 for line in listed if line.strip())
    columns = [line.split("\t") if by_tab else SPACES.split(line.strip(" \t")) for line in listed]
    widths = Counter(len(fields) for fields, line in zip(columns, listed, strict=True) if line.strip(" \t"))
    width = widths.most_common(1)[0][0] if widths else 2
    if width < 2:
        raise UserError(
            f"{name} has one column", hint="expected a word and its tag per line, with a tab or space between"
        )
    group: list[tuple[int, list[str]]] = []
    for number, (line, fields) in enumerate(zip([*listed, ""], [*columns, []], strict=True), 1):
        if not line.strip(" \t"):
            yield from _conll_sentence(group, width, name, report)
            group = []
        elif fields[0] == "-DOCSTART-":
            continue
        elif line.startswith("#") and len(fields) != width:
            report.note("comment lines", action="dropped", where=f"{name}:{number}")
        else:
            group.append((number, fields))


def _conll_sentence(group: Sequence[tuple[int, list[str]]], width: int, name: str, report: Report) -> Iterator[_Row]:
    if not group:
        return
    for number, fields in group:
        if len(fields) != width:
            kind = f"sentences with a line that does not have {width} columns, left out"
            report.fault(kind, f"{name}:{number}")
            return
        if not fields[0].strip() or not fields[-1].strip():
            report.fault("sentences with an empty word or tag, left out", f"{name}:{number}")
            return
    text, words = joined(fields[0] for _, fields in group)
    yield _Row(where=f"{name}:{group[0][0]}", text=text, words=words, tags=[fields[-1].strip() for _, fields in group])


# Tables and JSON.


def _table(path: Path, keys: Mapping[str, str | None], report: Report) -> Iterator[Row]:
    """Read rows of a table or of JSON; words and tags in the cells of a csv are lists, or separated by spaces."""
    named = {name: key for name, key in keys.items() if key is not None}
    lists = [*(named[name] for name in ("tokens", "tags") if name in named), *TOKENS, *TAGS]
    tokens = (named.get("tokens"), *TOKENS)
    known = [*TOKENS, *TAGS, *SPANS, "text", *named.values()]
    table = report.table(path, known, header=True, expected=EXPECTED)
    for row in table.rows:
        if table.form.kind not in tables.COLUMNS:
            yield row
            continue
        cells = columns.unfolded(row.values, {*lists, *SPANS, *named.values()} - {named.get("text", "text")})
        if any(cells.get(name) is not None for name in tokens if name):
            cells |= {name: cells[name].split() for name in lists if isinstance(cells.get(name), str)}
        yield Row(where=row.where, values=cells)


def _rows(listed: Iterable[Row], keys: Mapping[str, str | None], report: Report) -> Iterator[_Row]:
    seen: set[str] = set()
    for each in listed:
        where, row = each.where, each.values
        if "id" in row:
            if str(row["id"]) in seen:
                report.fault("rows with the id of another, left out", where)
                continue
            seen.add(str(row["id"]))
        parsed = parse(columns.named(row, keys, where), where, report)
        if parsed is not None:
            yield parsed


def parse(row: dict[str, Any], where: str, report: Report) -> _Row | None:
    """Parse an object as a sentence; None, counted in the report, where it cannot be used.

    Raises UserError for one with neither words nor a text, or with numbers as tags.
    """
    tokens = next((row[key] for key in TOKENS if isinstance(row.get(key), list)), None)
    if tokens is not None:
        return _from_tokens(row, tokens, where, report)
    text = row.get("text")
    if not isinstance(text, str):
        raise UserError(f"{where} has neither words nor a text", hint=EXPECTED)
    if not text.strip():
        report.fault("empty texts, left out", where)
        return None
    words = split(text)
    marked: list[Any] | None = next((row[key] for key in SPANS if isinstance(row.get(key), list)), None)
    spans = [span for span in (_span(item, text, where, report) for item in marked or ()) if span]
    listed = snapped(text, words, spans, report, where)
    return _Row(where=where, text=text, words=tuple(words), entities=tuple(listed), bare=marked is None)


def _from_tokens(row: dict[str, Any], tokens: list[Any], where: str, report: Report) -> _Row | None:
    tags = next((row[key] for key in TAGS if isinstance(row.get(key), list)), None)
    if not tokens:
        report.fault("empty texts, left out", where)
        return None
    if not all(isinstance(token, str) and token.strip() for token in tokens):
        report.fault("sentences with an empty word or tag, left out", where)
        return None
    if tags is not None and any(isinstance(tag, int | float) for tag in tags):
        raise UserError(f"{where} has numbers as tags", hint='write them as words: "B-person", "I-person", "O"')
    if tags is not None and (len(tags) != len(tokens) or not all(isinstance(tag, str) and tag for tag in tags)):
        report.fault("sentences with another number of tags than of words, left out", where)
        return None
    text, words = joined(tokens)
    return _Row(where=where, text=text, words=words, tags=tags, bare=tags is None)


def _span(item: Any, text: str, where: str, report: Report) -> tuple[int, int, str] | None:
    """Parse {"start", "end", "label"}, or [start, end, label]; a "text" is compared with the offsets."""
    expected: Any = None
    if isinstance(item, dict):
        start, end = item.get("start"), item.get("end")
        label, expected = item.get("label", item.get("type")), item.get("text")
    elif isinstance(item, list) and len(item) == 3:
        start, end, label = item
    else:
        start = end = label = None
    whole = isinstance(start, int) and isinstance(end, int) and isinstance(label, str) and label
    if not whole or isinstance(start, bool) or isinstance(end, bool):
        report.fault("spans without start, end and label, left out", where)
        return None
    assert isinstance(start, int) and isinstance(end, int)
    if isinstance(expected, str) and expected and text[max(0, start) : max(0, end)] != expected:
        if text.count(expected) != 1:
            report.fault("spans whose offsets miss their text, left out", where)
            return None
        report.fault("spans whose offsets miss their text, moved to it", where, "repaired")
        start = text.index(expected)
        end = start + len(expected)
    return start, end, str(label)
