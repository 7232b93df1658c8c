"""The sample data is what its README says it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tfcli.tasks.answer import data as questions
from tfcli.tasks.chat import data as dialogue
from tfcli.tasks.classify import data as labels
from tfcli.tasks.classify.options import ClassifyData
from tfcli.tasks.common.report import Report
from tfcli.tasks.tag import data as entities
from tfcli.tasks.translate import data as pairs
from tfcli.tasks.translate.options import PairData

SAMPLE_DATA = Path(__file__).resolve().parent.parent / "sample_data"
FILES = sorted(path for path in SAMPLE_DATA.rglob("*") if path.is_file())


def listed_bytes() -> dict[str, int]:
    """File name -> bytes, from the table in the README."""
    rows = re.findall(
        r"^\| (\S+) \| [^|]+ \| ([\d,]+) \|", (SAMPLE_DATA / "README.md").read_text("utf-8"), re.MULTILINE
    )
    return {name: int(size.replace(",", "")) for name, size in rows}


def test_readme_lists_every_file_with_its_size() -> None:
    actual = {path.relative_to(SAMPLE_DATA).as_posix(): path.stat().st_size for path in FILES}
    del actual["README.md"]
    assert listed_bytes() == actual


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_is_clean_utf8(path: Path) -> None:
    data = path.read_bytes()
    text = data.decode("utf-8")
    assert not text.startswith("\ufeff")
    assert b"\r" not in data
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_english_is_large_enough_and_without_markup() -> None:
    text = (SAMPLE_DATA / "english.txt").read_text("utf-8")
    assert len(text.encode()) >= 1_000_000
    assert not re.search(r"[<>&\d\u2018\u2019\u201c\u201d]", text)


def test_chinese_is_mostly_han() -> None:
    text = (SAMPLE_DATA / "chinese.txt").read_text("utf-8")
    assert 200_000 <= len(text.encode()) <= 500_000
    han = sum("\u3400" <= char <= "\u9fff" or char >= "\U00020000" for char in text)
    assert han / len(text) > 0.75


def test_prompts_are_six_short_lines() -> None:
    prompts = (SAMPLE_DATA / "prompts.txt").read_text("utf-8").splitlines()
    assert len(prompts) == 6
    assert all(0 < len(prompt) <= 60 and prompt == prompt.strip() for prompt in prompts)


def test_labeled_samples_are_read_without_a_fault() -> None:
    """Each by its task's reader, where whatever is wrong is fatal: offsets, tags, turns, columns."""
    notes: list[str] = []
    mail = labels.read([str(SAMPLE_DATA / "mail.tsv")], ClassifyData(strict=True), name="mail", note=notes.append)
    assert labels.names_of(mail) == ["mail", "spam"]
    assert len(mail.examples) == len({example.text for example in mail.examples}) == 1800
    assert notes == []
    tagged = entities.read(SAMPLE_DATA / "entities.conll", Report(strict=True), repair=False)
    assert tagged.scheme == "bio"
    assert {entity.label for sentence in tagged.sentences for entity in sentence.entities} == {
        "person",
        "place",
        "group",
    }
    asked = questions.read(SAMPLE_DATA / "questions.json", Report(strict=True))
    assert asked.version == 2
    assert [len(asked.questions), sum(not question.answers for question in asked.questions)] == [207, 40]
    verses, _ = pairs.read([str(SAMPLE_DATA / "english-spanish.tsv")], PairData(), Report(strict=True))
    assert len(verses) == len({pair.source for pair in verses}) == 3492
    talk = dialogue.read(SAMPLE_DATA / "dialogue.jsonl", Report(strict=True))
    assert len(talk) == 541


def test_mail_tells_of_no_one() -> None:
    """An address, or a number that may be a telephone's, in what once was private."""
    text = (SAMPLE_DATA / "mail.tsv").read_text("utf-8")
    assert not re.search(r"\S@\S|\d{7}|\d{3}-\d{4}", text)
