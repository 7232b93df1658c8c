"""Files written by csv, json and pyarrow are read back equal, streamed and whole, with any cells."""

import csv
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfcli.errors import UserError
from tfcli.text.read import delimited, files, tables
from tfcli.text.read.files import Count
from tfcli.text.read.rows import Fault

PARTS = st.sampled_from(["a", '"', '""', ",", "\t", "\n", "\r", "\r\n", " ", "é", "漢", "\u2028", "\x85", "\x1c", "🎉"])
CELLS = st.lists(PARTS, max_size=6).map("".join)
COLUMNS = ("text", "label")
ROWS = st.lists(st.tuples(CELLS, CELLS), max_size=5)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Files in pieces of a few bytes, so that every kind of line and character is torn."""
    before, files.BLOCK = files.BLOCK, 5
    try:
        yield
    finally:
        files.BLOCK = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def both(path: Path, **more: Any) -> list[dict[str, Any]]:
    """Return the rows of a file, after checking that streaming gives the same rows, places and hash."""
    with small_blocks():
        whole = tables.read(path, known=COLUMNS, **more)
        streamed = tables.rows(path, known=COLUMNS, **more)
        assert list(streamed) == whole.rows
    data = path.read_bytes()
    assert (whole.digest.sha256, whole.digest.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    if path.suffix != ".parquet":
        assert list(tables.rows(path, known=COLUMNS, **more)) == whole.rows
        assert (streamed.digest.sha256, streamed.digest.bytes) == (whole.digest.sha256, whole.digest.bytes)
    assert streamed.form.columns in ((), whole.form.columns)
    return [row.values for row in whole.rows]


@settings(deadline=None)
@given(
    rows=ROWS,
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    kind=st.sampled_from([("a.csv", ","), ("a.tsv", "\t")]),
    encoding=st.sampled_from(["utf-8", "utf-16"]),
)
def test_csv(
    folder: Path, rows: list[tuple[str, str]], end: str, quoting: Any, kind: tuple[str, str], encoding: str
) -> None:
    if end == "\n" and any("\r" in cell for row in rows for cell in row):
        quoting = csv.QUOTE_ALL  # Python's writer leaves a \r bare where it ends lines by \n
    out = io.StringIO()
    writer = csv.writer(out, delimiter=kind[1], lineterminator=end, quoting=quoting)
    writer.writerows([COLUMNS, *rows])
    path = folder / kind[0]
    path.write_bytes(out.getvalue().encode(encoding))
    assert both(path, encoding=encoding) == [dict(zip(COLUMNS, row, strict=True)) for row in rows]


@settings(deadline=None)
@given(rows=ROWS)
def test_json_and_parquet(folder: Path, rows: list[tuple[str, str]]) -> None:
    objects = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    lines = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in objects)
    (folder / "a.jsonl").write_bytes(lines.encode())
    (folder / "a.json").write_text(json.dumps(objects, indent=1), "utf-8")
    schema = pyarrow.schema([(name, pyarrow.string()) for name in COLUMNS])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects, schema=schema), folder / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert both(folder / name) == objects, name


@settings(deadline=None)
@given(text=st.lists(PARTS, max_size=12).map("".join), delimiter=st.sampled_from([",", "\t"]))
def test_records_are_as_the_csv_module_reads_them(text: str, delimiter: str) -> None:
    def read(records: Iterator[tuple[int, list[str]]]) -> list[Any]:
        found: list[Any] = []
        try:
            found.extend(records)
        except csv.Error as error:
            found.append(str(error))
        except UserError as error:
            found.append(error.message.partition("sv: ")[2])
        return found

    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    theirs = read((reader.line_num, fields) for fields in reader if fields)
    assert read(delimited.records(iter([text]), "a", {",": "csv", "\t": "tsv"}[delimiter])) == theirs


def test_long_fields_and_the_limit_of_the_process(tmp_path: Path) -> None:
    """Catches the csv module's limit, which belongs to the host, changed while a file is read, and obeyed."""
    long = 'x, "y"\r\n' * 30_000
    out = io.StringIO()
    csv.writer(out).writerows([COLUMNS, ("a", "b"), (long, "c"), ("d", long), ("e", "f")])
    (tmp_path / "a.csv").write_bytes(out.getvalue().encode())
    before, seen = csv.field_size_limit(), set()
    rows = []
    for row in tables.rows(tmp_path / "a.csv", header=True):
        seen.add(csv.field_size_limit())
        rows.append(tuple(row.values.values()))
    assert rows == [("a", "b"), (long, "c"), ("d", long), ("e", "f")]
    assert seen == {before} and csv.field_size_limit() == before
    (tmp_path / "b.csv").write_text(f'text,label\n"{long[:3]}{"z" * 200_000}\n')
    with pytest.raises(UserError, match=r"b\.csv:2 is not valid csv: unexpected end of data"):
        list(tables.rows(tmp_path / "b.csv", header=True))


def test_two_files_at_once_in_threads(tmp_path: Path) -> None:
    """Catches a setting of the csv module that one reader takes back while another needs it."""
    (tmp_path / "a.csv").write_text("text\n" + f"{'y' * 150_000}\n" * 5)
    lengths: list[int] = []

    def read() -> None:
        lengths.extend(len(row.values["text"]) for row in tables.rows(tmp_path / "a.csv", header=True))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [150_000] * 10


@pytest.mark.parametrize(("encoding", "order"), [("utf-16", "utf-16-le"), ("utf-16-be", "utf-16-be"),
                                                 ("shift_jis", "shift_jis"), ("utf_8", "utf-8-sig")])  # fmt: skip
def test_encodings_in_pieces(tmp_path: Path, encoding: str, order: str) -> None:
    """Catches a character torn at the end of a block, and UTF-16 without a byte order mark refused."""
    (tmp_path / "a.csv").write_bytes("text,label\nかな,b\n".encode(order))
    assert both(tmp_path / "a.csv", encoding=encoding) == [{"text": "かな", "label": "b"}]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_invalid_is_counted_and_placed_in_pieces(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"aaaa\nbb\xe6\xbc\nc\xff")
    with small_blocks():
        count = Count(name="a")
        text = "".join(files.texts(path, "a", "replace", count, encoding=encoding))
        assert count.replaced == text.count("\ufffd") == {"utf-8": 2, "ascii": 3}[encoding]
        with pytest.raises(UserError, match="byte 0xe6 at offset 7, line 2"):
            list(files.texts(path, "a", "strict", count, encoding=encoding))


def test_stray_quotes_of_tsv_are_text_while_streaming_too(tmp_path: Path) -> None:
    """Catches a corpus in tsv refused for a quote that labeled data may have."""
    (tmp_path / "a.tsv").write_text('text\tlabel\n"Hi" he said\tb\nWIN "now\tc\n')
    found = tables.rows(tmp_path / "a.tsv", header=True)
    assert [row.values["text"] for row in found] == ['"Hi" he said', 'WIN "now']


def test_faults_of_rows_are_the_callers_to_judge(tmp_path: Path) -> None:
    faults: list[Fault] = []
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nno\n[1]\n{"a": 2}\n')
    (tmp_path / "a.csv").write_text("a\n1\n2,3\n4\n")
    rows = [
        row.values["a"]
        for name in ("a.jsonl", "a.csv")
        for row in tables.rows(tmp_path / name, header=True, on_fault=faults.append)
    ]
    assert rows == [1, 2, "1", "4"]
    assert [(fault.where.rpartition("/")[2], fault.kind) for fault in faults] == [
        ("a.jsonl:2", "lines that are not JSON"),
        ("a.jsonl:3", "rows that are no objects"),
        ("a.csv:3", "rows with another number of fields"),
    ]


def test_a_column_alone_of_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["a", None]}), tmp_path / "a.parquet")
    found = tables.rows(tmp_path / "a.parquet")
    assert (found.form.columns, found.form.strings) == (("n", "text"), ("text",))
    assert [row.values for row in found.select(["text"])] == [{"text": "a"}, {"text": None}]


def test_json_of_one_object(tmp_path: Path) -> None:
    """An object over several lines is a row if it has a known key; messages name rows under a key by it."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "a"}, indent=1))
    assert both(path) == [{"text": "a"}]
    path.write_text(json.dumps({"data": [{"a": 1}, 3]}, indent=1))
    with pytest.raises(UserError, match=r"a\.json: data\[1\] is a JSON int, expected an object"):
        tables.read(path, known=COLUMNS)
    path.write_text(json.dumps({"a": "b"}, indent=1))
    with pytest.raises(UserError, match="one JSON object without rows"):
        tables.read(path, known=COLUMNS)
