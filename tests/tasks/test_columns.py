"""Data of tag, answer and chat from csv, tsv, Parquet and data sets by name: the same examples as from JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from tfcli.config.resolve import resolve
from tfcli.errors import UserError
from tfcli.tasks.answer import task as answer
from tfcli.tasks.answer.options import AnswerConfig
from tfcli.tasks.chat import task as chat
from tfcli.tasks.common.report import Report
from tfcli.tasks.tag import task as tag
from tfcli.tasks.translate import data as pairs
from tfcli.tasks.translate.options import PairData
from tfcli.text.read import tables

TOKENS = [
    {"tokens": ["Ada", "Lovelace", "lived", "in", "London"], "tags": ["B-person", "I-person", "O", "O", "B-place"]},
    {"tokens": ["he", "said", '"no"'], "tags": ["O", "O", "O"]},
]
SPANS = [
    {"text": 'Ada, of "London"', "spans": [{"start": 0, "end": 3, "label": "person"}]},
    {"text": "no", "spans": []},
]
SQUAD = [
    {
        "question": "Who?",
        "context": "Ada wrote it.",
        "answers": {"text": ["Ada", "Ada"], "answer_start": [0, 0]},
        "plausible_answers": [],
    },
    {
        "question": "When?",
        "context": "Ada wrote it.",
        "answers": {"text": [], "answer_start": []},
        "plausible_answers": [{"text": "Ada", "answer_start": 0}],
    },
]
TURNS = [
    {"messages": [{"role": "user", "content": "hi, there"}, {"role": "assistant", "content": "yes"}]},
    {"messages": [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": '"c"'}]},
]
PAIRS = [{"prompt": "one", "response": "two"}, {"prompt": "three,\n3", "response": '"four"'}]


def forms(folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The rows as files of every kind: lists in the cells of csv and tsv as JSON, as Python's, and as they are."""
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, delimiter, write in (("a.csv", ",", json.dumps), ("a.tsv", "\t", json.dumps), ("python.csv", ",", repr)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            out = csv.writer(file, delimiter=delimiter)
            out.writerow(rows[0])
            out.writerows([v if isinstance(v, str) else write(v) for v in row.values()] for row in rows)
    Dataset.from_list(list(rows)).to_parquet(folder / "a.parquet")
    Dataset.from_list(list(rows)).save_to_disk(folder / "saved")
    names = ["a.jsonl", "a.csv", "a.tsv", "python.csv", "a.parquet"]
    return {name: str(folder / name) for name in names} | {"hf": f"hf:{folder / 'saved'}"}


def config(task: Any, *sets: str) -> Any:
    return resolve(task, sets=list(sets))[0]


def sentences(spec: str, *sets: str) -> list[Any]:
    found, _ = tag.read([spec], config(tag.TagConfig, *sets), Report())
    return [(s.text, s.words, s.entities, s.own_words) for s in found]


def questions(spec: str, *sets: str) -> Any:
    found, version = answer.read([spec], config(AnswerConfig, *sets), Report())
    return version, [(q.question, q.context, q.answers, q.group, q.plausible) for q in found]


def conversations(spec: str, *sets: str) -> list[Any]:
    return [one.messages for one in chat._read([spec], config(chat.ChatConfig, *sets), Report())]


READERS = {
    "tokens": (TOKENS, sentences),
    "spans": (SPANS, sentences),
    "squad": (SQUAD, questions),
    "messages": (TURNS, conversations),
    "pairs": (PAIRS, conversations),
}


@pytest.mark.parametrize("kind", READERS)
def test_every_form_gives_the_same_examples(tmp_path: Path, kind: str) -> None:
    rows, read = READERS[kind]
    specs = forms(tmp_path, rows)
    expected = read(specs["a.jsonl"])
    assert len(expected) == 2
    for name, spec in specs.items():
        assert read(spec) == expected, name
        assert list(map(str, tables.expand([spec]))) == [str(spec)]


RENAMED: dict[str, tuple[dict[str, str], list[str]]] = {
    "tokens": ({"tokens": "w", "tags": "t"}, ["data.tokens_key=w", "data.tags_key=t"]),
    "spans": ({"text": "body", "spans": "marks"}, ["data.text_key=body", "data.spans_key=marks"]),
    "squad": (
        {"question": "q", "context": "c", "answers": "a"},
        ["data.question_key=q", "data.context_key=c", "data.answers_key=a"],
    ),
    "messages": ({"messages": "turns"}, ["data.messages_key=turns"]),
    "pairs": ({"prompt": "x", "response": "y"}, ["data.prompt_key=x", "data.response_key=y"]),
}


@pytest.mark.parametrize("kind", READERS)
def test_columns_are_named_by_settings(tmp_path: Path, kind: str) -> None:
    rows, read = READERS[kind]
    names, sets = RENAMED[kind]
    (tmp_path / "as").mkdir()
    expected = read(forms(tmp_path / "as", rows)["a.jsonl"])
    specs = forms(tmp_path, [{names.get(key, key): value for key, value in row.items()} for row in rows])
    for name, spec in specs.items():
        assert read(spec, *sets) == expected, name
    key, wanted = sets[0].split("=")
    for spec in (specs["a.csv"], specs["a.parquet"], specs["hf"]):
        with pytest.raises(UserError, match=f"has no column '{wanted}{wanted[-1]}s?' .*it has: {wanted}"):
            read(spec, f"{key}={wanted}{wanted[-1]}", *sets[1:])


def test_cells_with_spaces_between_words(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,words,ner_tags\n1,Ada lived,B-person O\n2,in Rome,O B-place\n")
    assert [s[0] for s in sentences(str(tmp_path / "a.csv"))] == ["Ada lived", "in Rome"]
    assert [len(s[2]) for s in sentences(str(tmp_path / "a.csv"))] == [1, 1]


def test_one_answer_a_row_in_columns(tmp_path: Path) -> None:
    text = "question,context,answer_text,answer_start\nWho?,Ada wrote it.,Ada,0\nWhen?,Ada wrote it.,,\n"
    (tmp_path / "a.csv").write_text(text)
    version, found = questions(str(tmp_path / "a.csv"))
    assert version == 2 and [[(a.text, a.start) for a in q[2]] for q in found] == [[("Ada", 0)], []]
    (tmp_path / "b.csv").write_text(text.replace("answer_text", "reply"))
    assert [q[2] for q in questions(str(tmp_path / "b.csv"), "data.answers_key=reply")[1]] == [q[2] for q in found]


def test_empty_cells_are_questions_without_an_answer(tmp_path: Path) -> None:
    """Would catch an empty cell that is taken for answers that are broken, and left out without a word."""
    text = "question,context,answers,is_impossible\nWhen?,Ada wrote it.,,True\n"
    (tmp_path / "a.csv").write_text(text)
    version, found = questions(str(tmp_path / "a.csv"))
    assert version == 2 and [q[2] for q in found] == [()]
    (tmp_path / "a.csv").write_text(text.replace("True", "False"))
    with pytest.raises(UserError, match="no questions that can be used: 1 questions that should have an answer"):
        questions(str(tmp_path / "a.csv"))


def test_numbered_tags_of_a_data_set_are_their_names(tmp_path: Path) -> None:
    """conll2003 as the hub has it."""
    names = ["O", "B-PER", "I-PER"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    made = Dataset.from_list([{"tokens": ["Ada", "Lovelace", "wrote"], "ner_tags": [1, 2, 0]}], features=features)
    made.save_to_disk(tmp_path / "d")
    made.to_parquet(tmp_path / "d.parquet")
    for spec in (f"hf:{tmp_path / 'd'}", str(tmp_path / "d.parquet")):
        ((text, _, entities, _),) = sentences(spec)
        assert text == "Ada Lovelace wrote" and [(e.label, e.start, e.end) for e in entities] == [("PER", 0, 2)]


def test_translations_of_a_data_set(tmp_path: Path) -> None:
    Dataset.from_list([{"translation": {"en": "one", "de": "eins"}}]).save_to_disk(tmp_path / "d")
    assert pairs.read([f"hf:{tmp_path / 'd'}"], PairData(), Report())[0] == [pairs.Pair(source="one", target="eins")]
