"""The text of a file of labelled data, in whatever encoding it is."""

from pathlib import Path

import pytest

from tfcli.errors import UserError
from tfcli.tasks.report import Report


def test_encodings(tmp_path: Path) -> None:
    """Catches bytes that are read as another text, a byte order mark that stays, and what is replaced in silence."""
    path = tmp_path / "data.txt"
    for encoding in ("cp1252", "utf-16", "utf-8-sig"):
        path.write_bytes("Zoë €".encode(encoding))
        assert Report().text(path, encoding="utf-8" if encoding == "utf-8-sig" else encoding) == "Zoë €"
    with pytest.raises(UserError, match="unknown encoding"):
        Report().text(path, encoding="utf-99")
    path.write_bytes(b"a\xff\xfeb \xef\xbf\xbd")
    report = Report()
    assert report.text(path, errors="replace") == "a\ufffd\ufffdb \ufffd"
    assert report.notes == {"invalid bytes that became U+FFFD": 2}
    with pytest.raises(UserError, match="is not ASCII: byte 0xff at offset 1, line 1"):
        Report().text(path, encoding="ascii")
