"""The text of a file of labelled data, in whatever encoding it is."""

from pathlib import Path

import pytest

from tfcli.errors import UserError
from tfcli.tasks.common.report import Report


def test_encodings(tmp_path: Path) -> None:
    """Catches bytes that are read as another text, a byte order mark that stays, and what is replaced in silence."""
    path = tmp_path / "data.txt"
    for encoding in ("cp1252", "utf-16", "utf-8-sig"):
        path.write_bytes("Zoë €".encode(encoding))
        assert Report(encoding="utf-8" if encoding == "utf-8-sig" else encoding).text(path) == "Zoë €"
    with pytest.raises(UserError, match="unknown encoding"):
        Report(encoding="utf-99").text(path)
    path.write_bytes(b"a\xff\xfeb \xef\xbf\xbd")
    report = Report(errors="replace")
    assert report.text(path) == "a\ufffd\ufffdb \ufffd"
    assert report.notes == {"invalid bytes that became U+FFFD": 2}
    with pytest.raises(UserError, match="is not ASCII: byte 0xff at offset 1, line 1"):
        Report(encoding="ascii").text(path)


def test_a_file_that_holds_nothing_is_told_its_own_faults() -> None:
    """Catches the faults of an earlier file of the same data told of a later one."""
    report = Report()
    for line in range(1, 6):
        report.fault("rows without a tail, left out", f"a.jsonl:{line}")
    before = dict(report.faults)
    assert (
        str(report.none("rows", "b.jsonl", before=before, hint="expected rows"))
        == "b.jsonl has no rows (expected rows)"
    )
    report.fault("rows without a head, left out", "b.jsonl:7")
    report.fault("rows without a tail, left out", "b.jsonl:8")
    said = str(report.none("rows", "b.jsonl", before=before, hint="expected rows"))
    assert said == (
        "b.jsonl has no rows that can be used: 1 rows without a tail, left out; "
        "1 rows without a head, left out (b.jsonl:7) (expected rows)"
    )
    report = Report()
    for line in range(1, 6):
        report.fault("rows without a tail, left out", f"a.jsonl:{line}")
    said = str(report.none("rows", "a.jsonl", before={}, hint="expected rows"))
    assert said.startswith(
        "a.jsonl has no rows that can be used: 5 rows without a tail, left out (a.jsonl:1, a.jsonl:2, a.jsonl:3, ...)"
    )
