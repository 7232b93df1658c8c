"""Splits by group, encodings, and bootstrap intervals."""

from pathlib import Path

import numpy as np
import pytest

from tfcli.errors import UserError
from tfcli.tasks.labelled import check, content_hash, interval, split, texts
from tfcli.tasks.report import Report


def test_groups_stay_together_and_the_part_is_about_right() -> None:
    groups = [f"article {index // 10}" for index in range(200)]
    train, held = split(groups, 0.1)
    assert sorted(train + held) == list(range(200))
    assert len(held) == 20
    assert not {groups[index] for index in train} & {groups[index] for index in held}
    assert split(groups, 0.1) == (train, held), "the same every time"
    train, held = split(["big"] * 90 + ["small"] * 10, 0.001)
    assert train
    assert held
    with pytest.raises(UserError, match="nothing that could be held out"):
        split(["one"] * 5, 0.1)


def test_encodings(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes("Zoë €".encode("cp1252"))
    assert "".join(texts(path, "data", Report(), encoding="cp1252")) == "Zoë €"
    path.write_bytes("Zoë".encode("utf-16"))
    assert "".join(texts(path, "data", Report(), encoding="utf-16")) == "Zoë"
    with pytest.raises(UserError, match="unknown encoding"):
        list(texts(path, "data", Report(), encoding="utf-99"))
    path.write_bytes(b"a\xff\xfeb")
    report = Report()
    assert "".join(texts(path, "data", report, errors="replace")) == "a\ufffd\ufffdb"
    assert report.notes == {"invalid bytes that became U+FFFD": 2}
    with pytest.raises(UserError, match="is not ascii"):
        list(texts(path, "data", Report(), encoding="ascii"))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    path.write_text("a O\n")
    check([str(path)])
    with pytest.raises(UserError, match=r"did you mean .*train\.conll"):
        check([str(tmp_path / "trian.conll")])
    with pytest.raises(UserError, match="is a directory"):
        check([str(tmp_path)])
    before = content_hash([path])
    path.write_text("b O\n")
    assert content_hash([path]) != before


def test_an_interval_holds_the_score_and_narrows() -> None:
    """Against the normal interval of a mean, 1.96 standard errors."""
    values = np.random.default_rng(1).normal(3.0, 2.0, (400, 1))
    columns = np.concatenate([values, np.ones_like(values)], axis=1)
    low, high = interval(columns, lambda sums: sums[:, 0] / sums[:, 1])
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.04)
    assert high == pytest.approx(values.mean() + error, abs=0.04)
