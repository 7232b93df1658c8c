"""Files of labeled rows: every format gives the same rows, and errors name the line."""

import gzip
import json
from pathlib import Path

import pytest

from tfcli.errors import UserError
from tfcli.text.read.tables import expand, read

ROWS = [('a, "b"\nc', "x"), ("Größe", "y")]
KNOWN = ("text", "label")


def values(path: Path, **more: str) -> list[tuple[str, str]]:
    table = read(path, known=KNOWN, **more)  # type: ignore[arg-type]
    return [(row.values["text"], row.values["label"]) for row in table.rows]


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    """Catches quotes and line breaks in csv that tear a row, a byte order mark in the first name, latin-1."""
    import csv
    import io

    objects = [{"text": text, "label": label} for text, label in ROWS]
    out = io.StringIO()
    csv.writer(out).writerows([KNOWN, *ROWS])
    lines = "".join(json.dumps(row) + "\n" for row in objects)
    for name, data in {
        "a.jsonl": lines.encode(),
        "b.json": json.dumps(objects).encode(),
        "c.json": json.dumps({"data": objects}).encode(),
        "d.json": lines.encode(),
        "e.csv": b"\xef\xbb\xbf" + out.getvalue().encode(),
        "f.jsonl.gz": gzip.compress(lines.encode()),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert values(tmp_path / name) == ROWS, name
    (tmp_path / "g.csv").write_bytes(out.getvalue().encode("latin-1"))
    assert values(tmp_path / "g.csv", encoding="latin-1") == ROWS
    with pytest.raises(UserError, match=r"g.csv is not UTF-8: byte 0xf6 .* line 4.*--encoding latin-1"):
        values(tmp_path / "g.csv")
    assert read(tmp_path / "g.csv", known=KNOWN, errors="replace").replaced == 2


@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_column_that_is_there_twice(tmp_path: Path, name: str, between: str) -> None:
    """Catches the last of two columns silently used."""
    (tmp_path / name).write_text(between.join(["text", "label", "Label"]) + "\n" + between.join("abc") + "\n")
    with pytest.raises(UserError, match=f"{name} has several columns 'label'"):
        values(tmp_path / name)


def test_lines_that_begin_with_their_label(tmp_path: Path) -> None:
    """TREC's lines and fastText's; catches a fine label taken for the coarse one."""
    path = tmp_path / "a.txt"
    path.write_text("NUM:date When ?\nHUM:ind Who : me ?\r\n")
    assert values(path) == [("When ?", "NUM"), ("Who : me ?", "HUM")]
    assert [row.values["fine"] for row in read(path, known=KNOWN).rows] == ["NUM:date", "HUM:ind"]
    path.write_text("__label__a __label__b some text\n__label__c more\n")
    assert values(path) == [("some text", ["a", "b"]), ("more", "c")]
    path.write_text("no label here\n")
    with pytest.raises(UserError, match=r"a.txt:1 begins with 'no', which is not a label"):
        values(path)


def test_tables_without_a_header_and_with_stray_quotes(tmp_path: Path) -> None:
    """Catches a first row taken for a header, and a quote in tsv that swallows the lines up to the next."""
    path = tmp_path / "a.tsv"
    path.write_text('ham\t"Hi" he said\nspam\tWIN "now\n')
    table = read(path, known=KNOWN)
    assert (table.form.header, table.form.columns) == (False, ("1", "2"))
    assert [row.values["2"] for row in table.rows] == ['"Hi" he said', 'WIN "now']


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"text,label\na,b,c\n", "a.csv:2 has 3 fields, the header has 2"),
        ("a.csv", b'text,label\n"a,b\n', "is not valid csv"),
        ("a.jsonl", b'{"text": 1}\nno\n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1 is a JSON list, expected an object"),
        ("a.json", b'{"x": 1}\n{', "is not JSON"),
        ("a.csv", b"\x89PNG\r\n\x00", "is a PNG image"),
        ("a.txt", "x y".encode("utf-16"), "--encoding utf-16"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    """Catches a traceback, and rows that are skipped silently."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read(tmp_path / name, known=KNOWN)
    assert message in str(error.value)
    with pytest.raises(UserError, match="unknown encoding"):
        read(tmp_path / name, known=KNOWN, encoding="latin-17")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    """The nearest name, directories, globs."""
    path = tmp_path / "train.conll"
    path.write_text("a O\n")
    assert expand([str(path)]) == expand([str(tmp_path / "*.conll")]) == [path]
    with pytest.raises(UserError, match=r"did you mean .*train\.conll"):
        expand([str(tmp_path / "trian.conll")])
    with pytest.raises(UserError, match="is a directory"):
        expand([str(tmp_path)])
