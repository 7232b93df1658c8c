"""Comparison of results with earlier ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tfcli.benchmark.compare import Json, compare, differences, read
from tfcli.errors import UserError


def line(suite: str = "decode", *, low: float, high: float, **more: object) -> Json:
    return {"suite": suite, "value": (low + high) / 2, "low": low, "high": high, "what": "x", "unit": "t/s", **more}


def test_only_intervals_that_do_not_touch_make_a_difference() -> None:
    old = [line(low=90.0, high=110.0)]
    cases = [((111.0, 120.0), "faster"), ((100.0, 130.0), "same"), ((110.0, 120.0), "same"), ((70.0, 89.0), "slower")]
    for (low, high), verdict in cases:
        (result,) = compare(old, [line(low=low, high=high)])
        assert result.verdict == verdict and result.ratio == pytest.approx((low + high) / 200)
        assert result.failed == (verdict == "slower")
    assert compare(old, [line("train", low=1.0, high=2.0)]) == []


@pytest.mark.parametrize(("unit", "less", "more"), [("s", "faster", "slower"), ("MB", "smaller", "larger")])
def test_of_times_and_sizes_more_is_worse(unit: str, less: str, more: str) -> None:
    old = [line(low=99.0, high=101.0, unit=unit)]
    (fell,) = compare(old, [line(low=80.0, high=81.0, unit=unit)])
    (rose,) = compare(old, [line(low=120.0, high=121.0, unit=unit)])
    (hardly,) = compare(old, [line(low=102.0, high=103.0, unit=unit)])
    assert (fell.verdict, fell.failed) == (less, False)
    assert (rose.verdict, rose.failed) == (more, True)
    assert (hardly.verdict, hardly.failed) == (more, False)
    assert rose.row == ("decode", f"100 {unit}", f"120 {unit}", "1.205x", more)


def test_differences_are_named_once() -> None:
    old = [line(low=1, high=2, machine={"threads": 1}), line("train", low=1, high=2, machine={"threads": 1})]
    new = [line(low=1, high=2, machine={"threads": 2}), line("train", low=1, high=2, machine={"threads": 2})]
    assert differences(old, new) == ["machine threads: 1 then, 2 now"]
    assert differences(old, old) == []
    older = [line(low=1, high=2, machine={})]
    assert differences(older, new[:1]) == [], "what an older version did not write is no difference"
    assert differences([], new[:1]) == ["decode is only in the new results"]


def test_results_of_before_this_version_are_read(tmp_path: Path) -> None:
    """Files of versions without "against", "details" or "date"."""
    path = tmp_path / "old.json"
    old = line(low=1, high=2, median_s=0.5, repeats=3, model={"depth": 1}, machine={"threads": 2})
    path.write_text("\n" + json.dumps(old) + "\n")
    assert read(path) == [old]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no results"),
        ("nonsense", ":1 is not a result"),
        ('\n{"suite": "x"}', ":2 is not a result"),
        ("[1]", ":1"),
        (json.dumps(line(low=0.0, high=0.0)), ":1"),
        (json.dumps(line(low=float("nan"), high=1.0)), ":1"),
        (json.dumps({**line(low=1.0, high=1.0), "value": "fast"}), ":1"),
        (json.dumps({**line(low=1.0, high=1.0), "unit": None}), ":1"),
        (json.dumps({**line(low=1.0, high=1.0), "machine": "mine"}), ":1"),
    ],
)
def test_a_file_without_results_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        read(path)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.json")
