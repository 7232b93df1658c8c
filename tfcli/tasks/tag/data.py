"""Sentences with named entities, read from CoNLL columns, JSON or tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tfcli.errors import UserError
from tfcli.tasks.common import columns
from tfcli.tasks.common.report import Report
from tfcli.tasks.tag.schemes import TAG, Entity, Scheme, broken, entities, scheme_of, unified, write
from tfcli.tasks.tag.words import Span, joined, snapped, split
from tfcli.text.read import files, tables
from tfcli.text.read.files import Errors
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
class Keys:
    """Names of the columns or fields of a sentence; left out, they are recognised."""

    tokens: str | None = None
    tags: str | None = None
    text: str | None = None
    spans: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """A text, its words by their characters, and the entities of words; ``where`` it was read, "file:line".

    ``own_words``: the words were given; the text is made of them.
    """

    text: str
    words: tuple[Span, ...]
    entities: tuple[Entity, ...] = ()
    own_words: bool = False
    where: str = ""

    def tags(self, scheme: Scheme) -> list[str]:
        """One tag a word."""
        return write(self.entities, len(self.words), scheme)

    @property
    def tokens(self) -> list[str]:
        """The words themselves."""
        return [self.text[start:end] for start, end in self.words]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tagged:
    """Sentences, and the scheme that their tags are written in (None where there are none: spans of characters)."""

    sentences: tuple[Sentence, ...]
    scheme: Scheme | None
    bare: bool = False
    """No sentence says where entities are, nor that there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A sentence as it was read: tags that have still to be checked, or entities."""

    where: str
    text: str
    words: tuple[Span, ...]
    tags: list[str] | None = None
    entities: tuple[Entity, ...] = ()
    bare: bool = False
    """It says neither where entities are nor that there are none."""


def read(
    path: Path,
    report: Report,
    *,
    repair: bool = True,
    encoding: str = "utf-8",
    errors: Errors = "strict",
    keys: Keys | None = None,
) -> Tagged:
    """The sentences of a file: a table or JSON where its name says so (.csv, .tsv, .parquet, hf:NAME; .jsonl, .ndjson,
    .json), else CoNLL columns.

    A sentence whose tags do not follow the data's scheme keeps the entities that conlleval reads in it, and is counted;
    with ``repair`` off it is a UserError. What cannot be used is left out and counted in ``report``. Raises UserError
    for a file that is no text, is not in either form, or has no sentences.
    """
    before = dict(report.faults)
    keys = keys or Keys()
    conll = tables.kind_of(path) == "text"
    if conll:
        lines = files.lines(iter([report.text(path, encoding=encoding, errors=errors)]))
        rows = list(_conll(lines, str(path), report))
    else:
        rows = list(_rows(_table(path, keys, report, encoding, errors), keys, report))
    rows = _unprefixed(rows, report)
    usable = [row for row in rows if row.tags is None or _usable(row, report)]
    if not usable:
        hint = "expected a word and its tag a line" if conll else EXPECTED
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
    """Rows with BILOU as BIOES; where no tag but O has a letter, as "PER", each run of one label is an entity."""
    kinds = {tag for row in rows for tag in unified(row.tags or ()) if tag != "O"}
    plain = bool(kinds) and not any(TAG.fullmatch(tag) for tag in kinds)
    if plain:
        report.note("labels without B- or I-: a run of one label is one entity", len(kinds))
    made = []
    for row in rows:
        tags = row.tags
        if tags is not None:
            tags = unified(tags)
            if plain:
                runs = entities(["O" if tag == "O" else f"I-{tag}" for tag in tags])
                tags = write(runs, len(tags), "bio")
        made.append(replace(row, tags=tags))
    return made


def _sentence(row: _Row, scheme: Scheme | None, report: Report, repair: bool) -> Sentence:
    found = row.entities
    if row.tags is not None and scheme is not None:
        found = tuple(entities(row.tags))
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
    return Sentence(text=row.text, words=row.words, entities=found, own_words=own, where=row.where)


# CoNLL columns.


def _conll(lines: Iterable[str], name: str, report: Report) -> Iterator[_Row]:
    """A word a line with its tag in the last column, an empty line between sentences."""
    listed = [line.rstrip("\r\n") for line in lines]
    tabs = sum("\t" in line for line in listed if line.strip())
    by_tab = tabs * 2 > sum(1 for line in listed if line.strip())
    columns = [line.split("\t") if by_tab else SPACES.split(line.strip(" \t")) for line in listed]
    width = _usual_width(columns, listed)
    if width < 2:
        raise UserError(
            f"{name} has one column", hint="expected a word and its tag a line, with a tab or space between"
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


def _usual_width(columns: Sequence[list[str]], lines: Sequence[str]) -> int:
    widths = Counter(len(fields) for fields, line in zip(columns, lines, strict=True) if line.strip(" \t"))
    return widths.most_common(1)[0][0] if widths else 2


def _conll_sentence(group: Sequence[tuple[int, list[str]]], width: int, name: str, report: Report) -> Iterator[_Row]:
    if not group:
        return
    for number, fields in group:
        if len(fields) != width:
            kind = f"sentences with a line that has not {width} columns, left out"
            report.fault(kind, f"{name}:{number}")
            return
        if not fields[0].strip() or not fields[-1].strip():
            report.fault("sentences with an empty word or tag, left out", f"{name}:{number}")
            return
    text, words = joined(fields[0] for _, fields in group)
    yield _Row(where=f"{name}:{group[0][0]}", text=text, words=words, tags=[fields[-1].strip() for _, fields in group])


# Tables and JSON.


def _table(path: Path, keys: Keys, report: Report, encoding: str, errors: Errors) -> Iterator[Row]:
    """Rows of a table or of JSON; words and tags in the cells of a csv are lists, or have spaces between."""
    named = {name: key for name, key in asdict(keys).items() if key is not None}
    lists = [*(named[name] for name in ("tokens", "tags") if name in named), *TOKENS, *TAGS]
    tokens = (named.get("tokens"), *TOKENS)
    known = [*TOKENS, *TAGS, *SPANS, "text", *named.values()]
    found = tables.rows(path, known=known, header=True, encoding=encoding, errors=errors, expected=EXPECTED, whole=True)
    for row in report.table(found).rows:
        if found.form.kind not in tables.COLUMNS:
            yield row
            continue
        cells = columns.unfolded(row.values, {*lists, *SPANS, *named.values()} - {named.get("text", "text")})
        if any(cells.get(name) is not None for name in tokens if name):
            cells |= {name: cells[name].split() for name in lists if isinstance(cells.get(name), str)}
        yield Row(where=row.where, values=cells)


def _rows(found: Iterable[Row], keys: Keys, report: Report) -> Iterator[_Row]:
    seen: set[str] = set()
    for each in found:
        where, row = each.where, each.values
        if "id" in row:
            if str(row["id"]) in seen:
                report.fault("rows with the id of another, left out", where)
                continue
            seen.add(str(row["id"]))
        made = parse(columns.named(row, asdict(keys), where), where, report)
        if made is not None:
            yield made


def parse(row: dict[str, Any], where: str, report: Report) -> _Row | None:
    """A JSON object as a sentence, None where it cannot be used, which the report is told.

    Raises UserError for one that has neither words nor a text, or tags that are numbers.
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
    found = snapped(text, words, spans, report, where)
    return _Row(where=where, text=text, words=tuple(words), entities=tuple(found), bare=marked is None)


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
    """One span: {"start", "end", "label"}, or [start, end, label]; what its "text" says is held against the offsets."""
    said: Any = None
    if isinstance(item, dict):
        start, end = item.get("start"), item.get("end")
        label, said = item.get("label", item.get("type")), item.get("text")
    elif isinstance(item, list) and len(item) == 3:
        start, end, label = item
    else:
        start = end = label = None
    whole = isinstance(start, int) and isinstance(end, int) and isinstance(label, str) and label
    if not whole or isinstance(start, bool) or isinstance(end, bool):
        report.fault("spans without start, end and label, left out", where)
        return None
    assert isinstance(start, int) and isinstance(end, int)
    if isinstance(said, str) and said and text[max(0, start) : max(0, end)] != said:
        if text.count(said) != 1:
            report.fault("spans whose offsets miss their text, left out", where)
            return None
        report.fault("spans whose offsets miss their text, moved to it", where, "repaired")
        start = text.index(said)
        end = start + len(said)
    return start, end, str(label)
