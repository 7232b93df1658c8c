"""Texts with labels from rows of files: columns recognized, and labels read."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from tfcli.errors import UserError, absent, nearest
from tfcli.tasks.classify.options import ClassifyData
from tfcli.tasks.common.report import Report
from tfcli.text.read import tables
from tfcli.text.read.rows import Row
from tfcli.text.read.tables import Table

TEXTS = (
    "text", "sentence", "question", "content", "sentence1", "question1", "premise", "text_a", "review", "message",
    "comment", "tweet", "query", "utterance", "document", "body", "title",
)  # fmt: skip
PAIRS = ("sentence2", "question2", "hypothesis", "text_b", "text_pair", "pair")
LABELS = (
    "label", "labels", "category", "class", "target", "intent", "label_text", "label_name", "sentiment", "topic",
    "coarse_label", "categories", "tags",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A text or a pair of texts, and its labels."""

    text: str
    pair: str | None
    labels: tuple[str, ...]
    where: str

    @property
    def key(self) -> tuple[str, str]:
        """The stripped texts: equal in duplicates, empty in an example without a text."""
        return self.text.strip(), (self.pair or "").strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The columns of a table."""

    text: str
    pair: str | None
    label: str


@dataclass(kw_only=True)
class Part:
    """The examples of some files."""

    name: str
    examples: list[Example]
    multi: bool
    columns: list[dict[str, str | None]] = field(default_factory=list)
    """The columns of each file."""
    hash: str = ""
    """Hash of everything that was read."""


def known(options: ClassifyData) -> list[str]:
    """Return the names of columns that make a first line a header."""
    named = [key for key in (options.text_key, options.pair_key, options.label_key) if key and not key.isdecimal()]
    return [*TEXTS, *PAIRS, *LABELS, *named]


def read(
    specs: Sequence[str],
    options: ClassifyData,
    *,
    name: str,
    note: Callable[[str], None],
    report: Report | None = None,
) -> Part:
    """Read the examples of files. Rows without a label are skipped and counted, or an error under --strict."""
    part = Part(name=name, examples=[], multi=options.label_separator is not None)
    report = report or Report.of(options)
    first = len(report.sources)
    for path in tables.expand(specs):
        table = report.table(path, known(options))
        if not table.rows:
            raise UserError(f"{table.name} has no rows", hint="expected one example per row, with a text and a label")
        columns = find_columns(table, options)
        if not table.form.header:
            note(f"{table.name} has no header: column {columns.label} is the label, column {columns.text} the text")
        _add(part, table, columns, options, report)
        part.columns.append({"name": table.name, **asdict(columns)})
    part.hash = hashlib.sha256("\0".join(each.sha256 for each in report.sources[first:]).encode()).hexdigest()
    part.examples = _whole_numbers(part, note)
    return part


def find_columns(table: Table, options: ClassifyData) -> Columns:
    """Return the columns of text, second text and label: those named in the settings, by a usual name, or by content.

    Raises UserError, with the columns of the table, where that is ambiguous.
    """
    there = table.form.columns
    listed = f"{table.name} has: {', '.join(there)}"
    lower = {column.lower(): column for column in reversed(there)}

    def pick(wanted: str | None, usual: Sequence[str], what: str) -> str | None:
        if wanted is not None:
            if wanted not in there:
                raise absent(f"{table.name} has no column {wanted!r} for the {what}", wanted, there)
            return wanted
        return next((lower[name] for name in usual if name in lower), None)

    label = pick(options.label_key, LABELS, "label")
    text = pick(options.text_key, [name for name in TEXTS if lower.get(name) != label], "text")
    pair = pick(options.pair_key, PAIRS, "second text")
    if (label is None or text is None) and not table.form.header and len(there) == 2:
        few, many = sorted(there, key=lambda column: len({row.values[column] for row in table.rows}))
        label = label or (few if text != few else many)
        text = text or (many if label != many else few)
    if text is None:
        raise UserError(f"which column holds the text? {listed}", hint="name it: --set data.text_key=NAME")
    if label is None:
        raise UserError(f"which column holds the label? {listed}", hint="name it: --set data.label_key=NAME")
    return Columns(text=text, pair=pair if pair != text else None, label=label)


def _add(part: Part, table: Table, columns: Columns, options: ClassifyData, report: Report) -> None:
    for row in table.rows:
        labels = _labels(row, columns.label, part, options)
        if labels is None:
            report.fault("rows without a label, left out", row.where)
            continue
        text = _text(row, columns.text)
        pair = None if columns.pair is None else _text(row, columns.pair)
        if options.strict and not text.strip() and not (pair or "").strip():
            raise UserError(f"{row.where} has an empty text", hint="leave --strict out to go on with such rows")
        part.examples.append(Example(text=text, pair=pair, labels=labels, where=row.where))


def _text(row: Row, key: str) -> str:
    value = row.values.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{row.where}: {key!r} is {type(value).__name__}, expected a string",
            hint="name the column with the text: --set data.text_key=NAME",
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{row.where}: {key!r} has a lone surrogate, which is not text",
            hint="repair the text, or leave the row out",
        ) from None
    return value


def _labels(row: Row, key: str, part: Part, options: ClassifyData) -> tuple[str, ...] | None:
    """Return the labels of a row, None where its cell is empty or null; "none" and "nan" are labels."""
    value = row.values.get(key)
    if isinstance(value, list | tuple):
        part.multi = True
        return tuple(dict.fromkeys(_label(entry, row, key) for entry in value))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if options.label_separator is not None and isinstance(value, str):
        return tuple(dict.fromkeys(each.strip() for each in value.split(options.label_separator) if each.strip()))
    label = _label(value, row, key)
    return (label,) if label else None


def _label(value: object, row: Row, key: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float):
        return str(value)
    raise UserError(
        f"{row.where}: {key!r} is {type(value).__name__}, expected a label or a list of labels",
        hint="name the column with the label: --set data.label_key=NAME",
    )


def _whole_numbers(part: Part, note: Callable[[str], None]) -> list[Example]:
    """Return the examples with labels such as 1.0 as 1. Raises UserError for fractions, which are not classes."""
    written = Counter(label for example in part.examples for label in example.labels)
    numbers: dict[str, float] = {}
    for label in written:
        try:
            numbers[label] = float(label)
        except ValueError:
            return part.examples
        if not math.isfinite(numbers[label]):  # a class called nan
            return part.examples
    floats = [label for label in numbers if not label.lstrip("+-").isdecimal()]
    if not floats:
        return part.examples
    broken = [label for label in floats if not numbers[label].is_integer()]
    if broken:
        where = next(example.where for example in part.examples if broken[0] in example.labels)
        raise UserError(
            f"{where}: the label is {broken[0]}, a number with a fraction",
            hint="classify learns classes, not amounts: round the labels, or name their ranges",
        )
    note(f"{part.name}: labels such as {floats[0]} are read as whole numbers")
    new = {label: str(int(number)) for label, number in numbers.items()}
    return [replace(example, labels=tuple(new[label] for label in example.labels)) for example in part.examples]


def names_of(part: Part) -> list[str]:
    """Return the labels, numbers in order and others by name. Raises UserError where there are too few or too many."""
    names = {label for example in part.examples for label in example.labels}
    if not part.examples:
        raise UserError(f"{part.name} has no rows with a label", hint="name its column: --set data.label_key=NAME")
    if len(names) < 2 and not (part.multi and names):
        raise UserError(
            f"all {len(part.examples)} examples of {part.name} have one label, {min(names, default='')!r}",
            hint="a classifier needs at least two; is data.label_key the right column?",
        )
    if all(label.lstrip("+-").isdecimal() for label in names):
        return sorted(names, key=int)
    if len(names) > 50 and 2 * len(names) > len(part.examples):
        raise UserError(
            f"{len(names)} different labels in {len(part.examples)} examples of {part.name}",
            hint="is data.label_key the right column?",
        )
    return sorted(names)


def check_known(part: Part, names: Sequence[str], *, of: str) -> None:
    """Raise UserError if a part has labels that ``of`` (training data, or a model) does not have."""
    strange = Counter(label for example in part.examples for label in example.labels if label not in set(names))
    if not strange:
        return
    first = next(example for example in part.examples if any(label in strange for label in example.labels))
    listed = ", ".join(f"{label!r} ({count})" for label, count in strange.most_common(5))
    guess = nearest(next(iter(strange)), names)
    known_names = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise UserError(
        f"{first.where}: {part.name} has labels that {of} does not have: {listed}",
        hint=f"{f'did you mean {guess!r}? ' if guess else ''}known: {known_names}",
    )
