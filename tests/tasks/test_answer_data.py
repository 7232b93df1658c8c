"""Questions from SQuAD's JSON and from rows: what is read, and that nothing is left out in silence."""

import json
from pathlib import Path
from typing import Any

import pytest

from tfcli.errors import UserError
from tfcli.tasks.answer.data import Questions, read
from tfcli.tasks.common.report import Report

CONTEXT = "Rollo was a Norse leader. Rollo ruled 🎉 Normandy."


def load(tmp_path: Path, data: Any, report: Report | None = None) -> Questions:
    path = tmp_path / "data.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return read(path, report or Report())


def squad(*qas: dict[str, Any], context: str = CONTEXT) -> dict[str, Any]:
    return {"version": "x", "data": [{"title": "Normans", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


def qa(id: str, *answers: tuple[str, int], **more: Any) -> dict[str, Any]:
    listed = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": id, "question": "Who?", "answers": listed, **more}


def test_version_1_and_2(tmp_path: Path) -> None:
    first = load(tmp_path, squad(qa("1", ("Rollo", 0), ("Normandy", 40))))
    assert first.version == 1
    (question,) = first.questions
    assert (question.golds, question.group) == (("Rollo", "Normandy"), "Normans")
    assert [answer.start for answer in question.answers] == [0, 40]
    second = load(tmp_path, squad(qa("1", ("Rollo", 0), is_impossible=False), qa("2", is_impossible=True)))
    assert second.version == 2
    assert second.questions[1].golds == ()


def test_plausible_answers(tmp_path: Path) -> None:
    """They are none; those that are not at their offset are counted; beside an answer they say nothing."""
    said = [
        {"text": "Rollo", "answer_start": 26},
        {"text": "Rollo", "answer_start": 1},
        {"text": "", "answer_start": 0},
    ]
    report = Report()
    unanswerable, answered, plain = load(
        tmp_path,
        squad(
            qa("1", is_impossible=True, plausible_answers=said),
            qa("2", ("Norse", 12), plausible_answers=said),
            qa("3", is_impossible=True),
        ),
        report,
    ).questions
    assert [(each.text, each.start) for each in unanswerable.plausible] == [("Rollo", 26)]
    assert unanswerable.golds == ()
    assert answered.plausible == plain.plausible == ()
    assert report.faults == {}
    assert report.notes == {"plausible answers that are not at their offset, left out": 2}


def test_rows_as_datasets_has_them(tmp_path: Path) -> None:
    """A list, one object, and JSON lines; a row without answers makes version 2."""
    row = {"id": "1", "question": "Who?", "context": CONTEXT, "answers": {"text": ["Rollo"], "answer_start": [26]}}
    none = {"id": "2", "question": "Who?", "context": "Another.", "answers": {"text": [], "answer_start": []}}
    for data in ([row, none], json.dumps(row) + "\n\n" + json.dumps(none) + "\n"):
        found = load(tmp_path, data)
        assert [question.golds for question in found.questions] == [("Rollo",), ()]
        assert found.questions[0].answers[0].start == 26
        assert found.version == 2
        assert found.questions[0].group != found.questions[1].group
    assert load(tmp_path, row).version == 1


def test_every_oddity_is_counted(tmp_path: Path) -> None:
    report = Report()
    found = load(
        tmp_path,
        squad(
            qa("1", ("Rollo", 24)),  # misses by two: the second one is meant
            qa("2", ("Rollo", 999)),
            qa("3", ("Normandy", -5)),
            qa("4", ("Harald", 0)),
            qa("5", (" ", 0)),
            qa("1", ("Norse", 12)),
            qa("6", is_impossible=False),
            qa("7", ("Norse", 12), is_impossible=True),
            {"id": "8", "question": " ", "answers": []},
            {"id": "9", "question": "Who?", "answers": ["Rollo"]},
            {"id": "10", "question": "Who?", "answers": {"text": ["Rollo"]}},
        ),
        report,
    )
    by_id = {question.id: question for question in found.questions}
    assert list(by_id) == ["1", "2", "3", "4", "7", "10"]
    starts = {id: [answer.start for answer in question.answers] for id, question in by_id.items()}
    assert starts == {"1": [26], "2": [26], "3": [40], "4": [None], "7": [12], "10": [0]}
    assert report.faults == {
        "answers whose offset misses them, moved to where they are": 2,
        "answers whose offset is outside the context, moved to where they are": 2,
        "answers that the context does not hold, scored but not trained on": 1,
        "answers without a text, left out": 2,
        "questions that should have an answer and have none, left out": 3,
        "questions with the id of another, left out": 1,
        "questions that are marked impossible and have an answer, which counts": 1,
        "questions or contexts that are empty, left out": 1,
    }
    assert "data[0].paragraphs[0].qas[0]" in report.lines()[0]


@pytest.mark.parametrize(
    "bad", [qa("1", ("Rollo", 1)), qa("1", ("Harald", 0)), qa("1", is_impossible=False), qa("1", ("", 0))]
)
def test_strict_makes_each_fatal(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"qas\[0\]"):
        load(tmp_path, squad(bad), Report(strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("3", "JSON int"),
        ('{"data": []}', "no questions"),
        ('{"data": [{"paragraphs": 3}]}', 'no list "paragraphs"'),
        ('{"data": [{"paragraphs": [{"context": "a"}]}]}', 'no list "qas"'),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', 'no "context"'),
        ('{"question": "a"}', 'no "question" and "context"'),
        ("[[]]", "JSON list, expected an object"),
        ('{"data": [{"paragraphs": [{"context": "a", "qas": [1]}]}]}', "not an object"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, text)
