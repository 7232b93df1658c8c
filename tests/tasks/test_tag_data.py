"""CoNLL columns and JSON lines with tags or spans: what is read, and that nothing is left out in silence."""

import json
from pathlib import Path
from typing import Any

import pytest

from tfcli.errors import UserError
from tfcli.tasks.common.report import Report
from tfcli.tasks.tag.data import Tagged, read
from tfcli.tasks.tag.words import split


def conll(tmp_path: Path, text: str, report: Report | None = None, **options: Any) -> Tagged:
    path = tmp_path / "data.conll"
    path.write_bytes(text.encode())
    return read(path, report or Report(), **options)


def lines(tmp_path: Path, *rows: Any, report: Report | None = None) -> Tagged:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(path, report or Report())


def test_columns_by_tab_or_space(tmp_path: Path) -> None:
    """Four columns, DOCSTART, blank lines with a tab, comments, words that begin with #, CRLF, no last line break."""
    text = "-DOCSTART- -X- -X- O\n\nRick NNP x B-per\nMorty NNP x I-per\n\t\n# a comment\n#tag NN x O\r\nin IN x O"
    report = Report()
    data = conll(tmp_path, text, report)
    assert [s.tokens for s in data.sentences] == [["Rick", "Morty"], ["#tag", "in"]]
    assert data.sentences[0].entities == (("per", 0, 2),)
    assert data.sentences[0].where.endswith(":3")
    assert data.scheme == "bio"
    assert report.faults == {}
    assert report.notes == {"comment lines": 1}
    tabbed = conll(tmp_path, "New York\tB-loc\nis\tO\n")
    assert tabbed.sentences[0].tokens == ["New York", "is"], "a word may hold a space"


def test_every_oddity_of_columns_is_counted_with_its_line(tmp_path: Path) -> None:
    text = "a O\nb O\n\nc\n\nd O\n e O O\n\nf\tX-per\n\ng\tI-per\n\nh\tO\n"
    report = Report()
    data = conll(tmp_path, text.replace("\t", " "), report)
    assert [s.tokens for s in data.sentences] == [["a", "b"], ["g"], ["h"]]
    assert report.faults == {
        "sentences with a line that does not have 2 columns, left out": 2,
        "sentences with a tag that is neither O nor B-, I-, E-, S-, left out": 1,
        "sentences whose tags do not follow BIO, read as conlleval does": 1,
    }
    assert any(":11" in line for line in report.lines()), report.lines()


@pytest.mark.parametrize("bad", ["a O\nb O\n\nc\n", "a O\nb I-x\n", "a O\nb X-x\nc B-x\n"])
def test_strict_makes_each_fatal(tmp_path: Path, bad: str) -> None:
    with pytest.raises(UserError, match=r"data\.conll:\d"):
        conll(tmp_path, bad, Report(strict=True))


def test_broken_tags_are_refused_by_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.conll:1: word 2 has the tag I-x, which does not follow BIO"):
        conll(tmp_path, "a O\nb I-x\n", repair=False)


def test_other_schemes(tmp_path: Path) -> None:
    """BIOES, BILOU, and labels without a letter."""
    assert conll(tmp_path, "a B-x\nb E-x\nc S-x\n").sentences[0].entities == (("x", 0, 2), ("x", 2, 3))
    bilou = conll(tmp_path, "a B-x\nb L-x\nc U-x\n")
    assert (bilou.scheme, bilou.sentences[0].entities) == ("bioes", (("x", 0, 2), ("x", 2, 3)))
    report = Report()
    plain = conll(tmp_path, "a PER\nb PER\nc O\nd LOC\n", report)
    assert plain.sentences[0].entities == (("PER", 0, 2), ("LOC", 3, 4))
    assert report.notes, "said, for neighbours of one label become one"


def test_files_that_hold_no_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one column"):
        conll(tmp_path, "a\nb\n")
    with pytest.raises(UserError, match="no sentences"):
        conll(tmp_path, "\n\n")
    with pytest.raises(UserError, match=r"that can be used: 1 sentences with a line .* columns, left out \(.*:2\)"):
        conll(tmp_path, "Ada B-per\nLovelace\nin O\n")
    path = tmp_path / "latin.conll"
    path.write_bytes("Zoë B-per\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8: byte 0xeb"):
        read(path, Report())
    assert read(path, Report(encoding="latin-1")).sentences[0].tokens == ["Zoë"]
    path.write_bytes("\ufeffZoe B-per\n".encode())
    assert read(path, Report()).sentences[0].tokens == ["Zoe"]


def test_json_with_tokens_or_spans(tmp_path: Path) -> None:
    """Offsets in characters, also behind emoji; doccano's lists; whitespace at a span's ends is let go."""
    data = lines(
        tmp_path,
        {"tokens": ["Ada", "in", "Paris"], "ner_tags": ["B-per", "O", "B-loc"]},
        {"text": "🎉 Ada Lovelace, 从前 in Paris.", "spans": [{"start": 1, "end": 14, "label": "per"}]},
        {"text": "Ada", "label": [[0, 3, "per"]]},
        {"text": "nothing here"},
    )
    first, second, third, fourth = data.sentences
    assert first.entities == (("per", 0, 1), ("loc", 2, 3))
    assert second.tokens == ["🎉", "Ada", "Lovelace", ",", "从", "前", "in", "Paris", "."]
    assert second.entities == (("per", 1, 3),)
    assert third.entities == (("per", 0, 1),)
    assert fourth.entities == ()
    report = Report()
    lines(tmp_path, {"text": "Ada", "spans": [[0, 3, "per"]]}, {"text": "a"}, {"tokens": ["b"]}, report=report)
    assert report.notes == {"sentences with neither tags nor spans, taken as without entities": 2}
    assert lines(tmp_path, {"text": "Ada"}, {"tokens": ["Ada"]}).bare and not data.bare
    assert lines(tmp_path, {"text": "a", "spans": []}).scheme is None


def test_every_oddity_of_json_is_counted(tmp_path: Path) -> None:
    text = "Ada Lovelace in Paris"
    report = Report()
    spans: list[Any] = [
        {"start": 0, "end": 12, "label": "per"},
        {"start": 4, "end": 12, "label": "per"},  # within the one before
        {"start": 16, "end": 99, "label": "loc"},
        {"start": -1, "end": 2, "label": "loc"},
        {"start": 5, "end": 5, "label": "loc"},
        {"start": 17, "end": 20, "label": "loc"},  # within Paris
        {"start": 0, "end": 3, "label": "per", "text": "London"},
        {"start": 0, "end": 3, "label": "loc", "text": "in"},  # is elsewhere
        {"start": "0", "end": 3, "label": "loc"},
        [0, 3],
        {"start": 12, "end": 13, "label": "loc"},  # a space
    ]
    data = lines(
        tmp_path,
        {"id": 1, "text": text, "spans": spans},
        {"id": 1, "text": text},
        {"id": 2, "tokens": ["a", "b"], "tags": ["O"]},
        {"id": 3, "tokens": [], "tags": []},
        {"id": 4, "text": " "},
        {"id": 5, "tokens": ["a", ""], "tags": ["O", "O"]},
        report=report,
    )
    assert len(data.sentences) == 1
    assert data.sentences[0].entities == (("per", 0, 2), ("loc", 2, 3), ("loc", 3, 4))
    assert report.faults == {
        "spans that overlap another, left out": 1,
        "spans outside the text, left out": 3,
        "spans that begin or end within a word, extended to it": 1,
        "spans whose offsets miss their text, left out": 1,
        "spans whose offsets miss their text, moved to it": 1,
        "spans without start, end and label, left out": 2,
        "spans without a word in them, left out": 1,
        "rows with the id of another, left out": 1,
        "sentences with another number of tags than of words, left out": 1,
        "empty texts, left out": 2,
        "sentences with an empty word or tag, left out": 1,
    }


def test_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for text, words in (("{", "not JSON"), ("[1]", "JSON list"), ('{"a": 1}', "neither words nor a text")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read(path, Report())
    with pytest.raises(UserError, match="numbers as tags"):
        lines(tmp_path, {"tokens": ["a"], "ner_tags": [0]})


def test_words_of_a_text() -> None:
    """Signs apart, ideographs apart, combining marks with their letter."""

    def words(text: str) -> list[str]:
        return [text[start:end] for start, end in split(text)]

    assert words("don't  stop_it, e\u0301te\u0301!") == ["don", "'", "t", "stop_it", ",", "e\u0301te\u0301", "!"]
    assert words("X从前Y 日本") == ["X", "从", "前", "Y", "日", "本"]
    assert words(" \n") == []
