"""Questions about texts, from SQuAD's JSON (v1 and v2), rows of JSON, or tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from tfcli.errors import UserError
from tfcli.tasks.answer.options import AnswerData
from tfcli.tasks.common import columns
from tfcli.tasks.common.report import Report
from tfcli.text.read import tables
from tfcli.text.read.rows import Row

EXPECTED = (
    'expected {"data": [{"paragraphs": [{"context": "...", "qas": [...]}]}]}, or rows with "question", "context" and '
    '"answers"'
)
LEFT_OUT = "questions that should have an answer and have none, left out"
PLAUSIBLE = "plausible_answers"
FLAT = ("answer_text", "answer")
"""Names of a column with the text of an answer, beside "answer_start"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A text, and its first character in the context; None where the context does not hold it."""

    text: str
    start: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question, unanswerable where it has no ``answers``; ``group`` is its article.

    ``plausible`` answers are those that an unanswerable question seems to have (Rajpurkar et al. 2018, 3).
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    group: str
    where: str = ""
    plausible: tuple[Answer, ...] = ()

    @property
    def golds(self) -> tuple[str, ...]:
        """Texts of the answers."""
        return tuple(answer.text for answer in self.answers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """The questions of a file; version 2 where some may be unanswerable."""

    questions: tuple[Question, ...]
    version: Literal[1, 2]


def read(path: Path, report: Report, options: AnswerData | None = None) -> Questions:
    """Read the questions of a file: SQuAD's JSON, a JSON list, JSON lines, or a table (.csv, .tsv, .parquet, hf:NAME).

    What cannot be used is skipped, and offsets that miss their answer (not a plausible one) are moved to its nearest
    place; ``report`` counts both. Raises UserError for a file that is not such JSON, or holds no question.
    """
    before = dict(report.faults)
    keys = (options or AnswerData()).keys
    named = [key for key in keys.values() if key is not None]
    known = ["question", "context", "answers", "answer_start", "paragraphs", *FLAT, *named]
    kind = tables.kind_of(path)
    table = report.table(path, known, header=True, kind=kind if kind in tables.COLUMNS else "json", expected=EXPECTED)
    rows = _of_json(table.rows) if table.form.kind == "json" else _of_table(table.rows, keys["answers"])
    questions: dict[str, Question] = {}
    unanswerable = False
    for given, group, where in rows:
        row = columns.named(given, keys, where)
        group = group or _group(row)
        unanswerable |= "is_impossible" in row or not _listed(row.get("answers"))
        question = parse(row, group, where, report)
        if question is not None and questions.setdefault(question.id, question) is not question:
            report.fault("questions with the id of another, left out", where)
    if not questions:
        raise report.none("questions", str(path), before=before, hint=EXPECTED)
    return Questions(questions=tuple(questions.values()), version=2 if unanswerable else 1)


def _of_table(rows: Iterable[Row], asked: str | None) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield (row, article, where); cells of a csv hold answers as JSON, or one text with its offset beside it."""
    key = asked or "answers"
    for each in rows:
        row = columns.unfolded(each.values, [key, PLAUSIBLE])
        there = [name for name in (key, *(() if asked else FLAT)) if name in row]
        if not there and asked is None:
            row = {**row, key: []}
        elif there and not isinstance(row[there[0]], (list, dict)):
            text, start = row[there[0]], _whole(row.get("answer_start"))
            row = {**row, key: [{"text": text, "answer_start": start}] if text else []}
        if "is_impossible" in row:
            row = {**row, "is_impossible": str(row["is_impossible"]).lower() in ("true", "1")}  # a csv has words
        yield row, _group(row), each.where


def _whole(cell: Any) -> Any:
    return int(cell) if isinstance(cell, str) and cell.strip().isdecimal() else cell


def _of_json(rows: Iterable[Row]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield (row, article, where) of SQuAD's articles, and of rows that are questions."""
    for row in rows:
        if "paragraphs" in row.values:
            yield from _article(row.values, row.where)
        else:
            yield row.values, _group(row.values), row.where


def _group(row: dict[str, Any]) -> str:
    return str(row.get("title") or row.get("context") or "")


def _article(item: dict[str, Any], where: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    for number, paragraph in enumerate(_list(item, "paragraphs", where)):
        inside = f"{where}.paragraphs[{number}]"
        if not isinstance(paragraph, dict) or not isinstance(paragraph.get("context"), str):
            raise UserError(f'{inside} has no "context" with a string', hint=EXPECTED)
        for index, qa in enumerate(_list(paragraph, "qas", inside)):
            if not isinstance(qa, dict):
                raise UserError(f"{inside}.qas[{index}] is not an object", hint=EXPECTED)
            row = {**qa, "context": paragraph["context"]}
            yield row, str(item.get("title") or paragraph["context"]), f"{inside}.qas[{index}]"


def _list(item: dict[str, Any], key: str, where: str) -> list[Any]:
    if not isinstance(item.get(key), list):
        raise UserError(f'{where} has no list "{key}"', hint=EXPECTED)
    return list(item[key])


def parse(row: dict[str, Any], group: str, where: str, report: Report) -> Question | None:
    """Parse a row as a question; None, counted in the report, where it cannot be used.

    Raises UserError for a row without a question or context.
    """
    question, context = row.get("question"), row.get("context")
    if not isinstance(question, str) or not isinstance(context, str):
        raise UserError(f'{where} has no "question" and "context" with strings', hint=EXPECTED)
    if not question.strip() or not context.strip():
        report.fault("questions or contexts that are empty, left out", where)
        return None
    listed = _listed(row.get("answers"))
    answers = tuple(filter(None, (_answer(item, context, where, report) for item in listed)))
    impossible = row.get("is_impossible")
    if not answers and (listed or impossible is False):
        report.fault(LEFT_OUT, where)
        return None
    if answers and impossible is True:
        kind = "questions that are marked impossible and have an answer, which counts"
        report.fault(kind, where, "repaired")
    return Question(
        id=str(row.get("id", where)),
        question=question,
        context=context,
        answers=answers,
        group=group,
        where=where,
        plausible=() if answers else tuple(_plausible(row, context, where, report)),
    )


def _plausible(row: dict[str, Any], context: str, where: str, report: Report) -> Iterator[Answer]:
    """Yield the plausible answers that are at their offset; others are no fault, as no score depends on them."""
    for text, start in _listed(row.get(PLAUSIBLE) or None):
        if _is_at(text, start, context):
            yield Answer(text=text, start=start)
        else:
            kind = "plausible answers that are not at their offset, left out"
            report.note(kind, action="dropped", where=where)


def _listed(answers: Any) -> list[tuple[Any, Any]]:
    """Return (text, start) of each answer of a list of objects, or of an object of two lists, as in ``datasets``."""
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if isinstance(texts, str):
            return [(texts, starts)]
        if not isinstance(texts, list):
            return [(None, None)]
        starts = starts if isinstance(starts, list) and len(starts) == len(texts) else [None] * len(texts)
        return list(zip(texts, starts, strict=True))
    if isinstance(answers, list):
        return [
            (item.get("text"), item.get("answer_start")) if isinstance(item, dict) else (None, None) for item in answers
        ]
    return [] if answers is None else [(None, None)]


def _answer(item: tuple[Any, Any], context: str, where: str, report: Report) -> Answer | None:
    text, start = item
    if not isinstance(text, str) or not text.strip():
        report.fault("answers without a text, left out", where)
        return None
    if _is_at(text, start, context):
        return Answer(text=text, start=start)
    known = _is_offset(start)
    places = [index for index in range(len(context)) if context.startswith(text, index)]
    if not places:
        report.fault("answers that the context does not hold, scored but not trained on", where)
        return Answer(text=text, start=None)
    outside = known and not 0 <= start < len(context)
    problem = "is outside the context" if outside else "misses them"
    report.fault(f"answers whose offset {problem}, moved to where they are", where, "repaired")
    return Answer(text=text, start=min(places, key=lambda place: abs(place - (start if known else 0))))


def _is_at(text: Any, start: Any, context: str) -> bool:
    """Return whether an answer is a text, and the context has it there."""
    usable = isinstance(text, str) and text.strip() and _is_offset(start) and start >= 0
    return bool(usable) and context[start : start + len(text)] == text


def _is_offset(start: Any) -> TypeGuard[int]:
    return isinstance(start, int) and not isinstance(start, bool)
