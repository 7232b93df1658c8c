"""Reading text: every format and compression, and clear errors for everything else."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from pathlib import Path

import pytest

from tfcli.config.options import DataOptions
from tfcli.errors import UserError
from tfcli.text.read import sources
from tfcli.text.read.files import Counts, lines
from tfcli.text.read.sources import find, read

NOWHERE = Path("nothing is copied")


def documents(*specs: str | Path, counts: Counts | None = None, **options: str) -> list[str]:
    """Read all documents."""
    whole: list[str] = []
    rest = ""
    sources = find([str(spec) for spec in specs], spool=NOWHERE)
    for chunk in read(sources, DataOptions(**options), counts):  # type: ignore[arg-type]
        rest += chunk.text
        if chunk.end:
            whole.append(rest)
            rest = ""
    assert not rest
    return whole


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document_unchanged(tmp_path: Path) -> None:
    """Catches universal newlines, stripping, and cuts that lose text."""
    text = "a\r\nb\rc\x85d\u2028e\n\n\n  f \t\0x"
    assert documents(put(tmp_path / "a.txt", "x" * 9000 + text)) == ["x" * 9000 + text]


def test_a_long_document_comes_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches text lost or doubled at chunk boundaries, and characters cut by blocks of bytes."""
    monkeypatch.setattr(sources, "CHUNK", 50)
    monkeypatch.setattr("tfcli.text.read.files.BLOCK", 7)
    text = "".join(f"ligne {n} é漢👩\n" * (n % 3) + "\n" * (n % 4) for n in range(200)) + "q" * 500
    path = put(tmp_path / "a.txt", text)
    chunks = list(read(find([str(path)], spool=tmp_path), DataOptions()))
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.end for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) > 20
    rows = put(tmp_path / "a.jsonl", json.dumps({"text": text}) + "\n")
    assert documents(rows) == [text]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_text_and_what_is_left_of_a_damaged_one(tmp_path: Path, suffix: str) -> None:
    """Catches a truncated archive read as if it were whole."""
    zstandard = pytest.importorskip("zstandard")
    text = "".join(f"line {n * 7919 % 1000}\n" for n in range(5000))
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    data = compress(text.encode())
    assert documents(put(tmp_path / f"a.txt{suffix}", data)) == [text]
    assert documents(put(tmp_path / f"two.txt{suffix}", data + data)) == [text + text]
    for name, broken in (("cut", data[: len(data) // 2]), ("other", b"this is not compressed at all" * 9)):
        with pytest.raises(UserError, match="corrupt or truncated"):
            documents(put(tmp_path / f"{name}.txt{suffix}", broken))


def test_zstandard_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError) as caught:
        documents(put(tmp_path / "a.txt.zst", b"x"))
    assert "tfcli[zstd]" in (caught.value.hint or "")


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "a\nb"}, {"id": 2, "text": ""}, {"id": 3, "text": None}, {"text": "é\u2028x"}]
    path = put(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    counts = Counts()
    assert documents(path, counts=counts) == ["a\nb", "é\u2028x"]
    assert (counts.sources[0].documents, counts.sources[0].empty, counts.sources[0].bytes) == (2, 2, 9)
    assert documents(put(tmp_path / "b.jsonl", '{"n": 1, "body": "x"}\n')) == ["x"]
    assert documents(put(tmp_path / "c.jsonl", '{"a": "x", "b": "y"}\n'), text_key="b") == ["y"]


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ('{"text": "a"}\n{"text": \n', "a.jsonl:2 is not JSON", "one JSON object a line"),
        ('{"text": "a"}\n[1]\n', "a.jsonl:2 is a JSON list", "text"),
        ('{"a": "x", "b": "y"}\n', "cannot tell which field", "a, b"),
        ('{"text": 3}\n', "cannot tell which field", "text"),
        ('{"text": "a"}\n{"text": 3}\n', "a.jsonl:2: 'text' is int", None),
        ('{"text": "a"}\n{"body": "b", "x": 1}\n', "a.jsonl:2 has no field 'text'", "body, x"),
        ('{"text": "\\ud800"}\n', "a.jsonl:1.*surrogate", "--errors replace"),
    ],
)
def test_broken_json_lines(tmp_path: Path, content: str, message: str, hint: str | None) -> None:
    with pytest.raises(UserError, match=message) as caught:
        documents(put(tmp_path / "a.jsonl", content))
    assert hint is None or hint in (caught.value.hint or "")


def test_a_surrogate_is_replaced_and_counted(tmp_path: Path) -> None:
    counts = Counts()
    assert documents(put(tmp_path / "a.jsonl", '{"text": "x\\ud800"}'), errors="replace", counts=counts) == ["x\ufffd"]
    assert counts.sources[0].replaced == 1


def test_tables(tmp_path: Path) -> None:
    """Catches quotes, separators and line breaks within a field, and the csv module's field limit."""
    long = "y" * 200_000
    path = put(tmp_path / "a.csv", f'id,text\n1,"a, ""b""\nc"\n2,\n3,{long}\n')
    assert documents(path) == ['a, "b"\nc', long]
    assert documents(put(tmp_path / "a.tsv", "n\tbody\n1\ta, b\n")) == ["a, b"]
    with pytest.raises(UserError, match="cannot tell which field"):
        documents(put(tmp_path / "b.csv", "a,b\nx,y\n"))
    with pytest.raises(UserError, match=r"b\.csv:3 has 3 fields, the header has 2"):
        documents(put(tmp_path / "b.csv", "id,text\n1,y\n2,y,z\n"))
    with pytest.raises(UserError, match="no field 'body'"):
        documents(path, text_key="body")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["a\nb", None, "é"]}), path)
    counts = Counts()
    assert documents(path, counts=counts) == ["a\nb", "é"]
    assert counts.sources[0].empty_at == [f"{path}: row 2"], "the first row is 1"
    with pytest.raises(UserError, match="no field 'x'"):
        documents(path, text_key="x")
    with pytest.raises(UserError, match="not a readable Parquet"):
        documents(put(tmp_path / "b.parquet", b"PAR1 and nothing"))


def test_directories_and_globs(tmp_path: Path) -> None:
    """Catches an order that depends on the file system, hidden files, and files skipped without a note."""
    put(tmp_path / "b.txt", "B")
    put(tmp_path / "a" / "c.md", "C")
    put(tmp_path / ".hidden" / "x.txt", "no")
    put(tmp_path / "pic.png", b"\x89PNG\r\n\x1a\n" + bytes(50))
    notes: list[str] = []
    assert [source.path.name for source in find([str(tmp_path)], spool=tmp_path, on_note=notes.append)] == [
        "c.md",
        "b.txt",
    ]
    assert notes == [f"skipped 1 in {tmp_path} that are not text: pic.png"]
    assert documents(str(tmp_path / "*.txt"), str(tmp_path / "a")) == ["B", "C"]


def test_stdin_is_spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches reading stdin twice."""
    stdin = io.TextIOWrapper(io.BytesIO("from é pipe\r\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    found = find(["-"], spool=tmp_path)
    for _ in range(2):
        assert [chunk.text for chunk in read(found, DataOptions())] == ["from é pipe\r\n"]
    assert found[0].name == "stdin"


def test_a_pipe_is_spooled(tmp_path: Path) -> None:
    """Catches <(zcat corpus.gz), which gives its text once, read as empty the second time."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(b"once only")
    found = find([f"/dev/fd/{reading}"], spool=tmp_path)
    os.close(reading)
    assert found[0].path.parent == tmp_path
    for _ in range(2):
        assert [chunk.text for chunk in read(found, DataOptions())] == ["once only"]


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    put(tmp_path / "corpus.txt", "x")
    with pytest.raises(UserError, match="no such file") as caught:
        find([str(tmp_path / "corpsu.txt")], spool=tmp_path)
    assert "corpus.txt" in (caught.value.hint or "")
    with pytest.raises(UserError, match="no file matches"):
        find([str(tmp_path / "*.nothing")], spool=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no text in the directory"):
        find([str(tmp_path / "empty")], spool=tmp_path)
    with pytest.raises(UserError, match="no text was given"):
        find([], spool=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "PNG image"),
        (b"PK\x03\x04" + bytes(99), "zip archive"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip data without the .gz suffix"),
        (b"text with\0a NUL", "binary data"),
        ("UTF-16 text é".encode("utf-16"), "UTF-16"),
        ("UTF-16 text without a mark".encode("utf-16-le"), "UTF-16"),
    ],
)
def test_what_is_not_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        documents(put(tmp_path / "a.txt", content))


def test_invalid_utf8_is_placed_or_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an offset counted from the block instead of the file, and text cut short at its end."""
    monkeypatch.setattr("tfcli.text.read.files.BLOCK", 5)
    data = "é\nligne deux é\n".encode() + b"bad \xe8 here \xff\n"
    path = put(tmp_path / "a.txt", data)
    with pytest.raises(UserError, match=f"byte 0xe8 at offset {data.index(0xE8)}, line 3") as caught:
        documents(path)
    assert "--errors replace" in (caught.value.hint or "")
    counts = Counts()
    assert documents(path, errors="replace", counts=counts) == [data.decode(errors="replace")]
    assert counts.sources[0].replaced == 2
    with pytest.raises(UserError, match="offset 2, line 1"):
        documents(put(tmp_path / "cut.txt", "ab漢".encode()[:-1]))


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    counts = Counts()
    assert documents(put(tmp_path / "a.txt", b"\xef\xbb\xbfhi\xef\xbb\xbf"), counts=counts) == ["hi\ufeff"]
    assert counts.sources[0].boms == 1


def test_lines_end_at_line_feeds_only() -> None:
    assert list(lines(iter(["a\r", "\nb\x85c", "\u2028", "\n\n", "d"]))) == ["a\r\n", "b\x85c\u2028\n", "\n", "d"]
