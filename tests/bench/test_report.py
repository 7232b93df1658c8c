"""Results as JSON, as rows, and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tfcli.bench import report
from tfcli.bench.suites import Ceilings, Result
from tfcli.bench.timing import Timing
from tfcli.errors import UserError
from tfcli.runtime import Runtime

RESULT = Result(
    suite="decode",
    what="4 tokens",
    unit="tokens/s",
    amount=4.0,
    timing=Timing(seconds=(0.01, 0.02, 0.04), warmups=3, steady=True),
    flops_per_second=2e9,
    bytes_per_second=None,
    peak_memory=123_000_000,
)


def line(suite: str = "decode", *, low: float, high: float, **more: object) -> report.Json:
    return {"suite": suite, "value": (low + high) / 2, "low": low, "high": high, "what": "x", **more}


def test_json_has_rates_and_their_interval() -> None:
    said = report.to_json(RESULT, Ceilings(flops=8e9, bytes=1e9), {"threads": 2}, {"name": "m"})
    assert json.loads(json.dumps(said)) == said
    assert (said["value"], said["low"], said["high"]) == (200.0, 100.0, 400.0)
    assert said["median_s"] == 0.02 and said["repeats"] == 3 and said["spread"] == pytest.approx(1.5)
    assert said["flops_utilisation"] == 0.25 and said["bandwidth_utilisation"] is None


def test_what_is_not_known_is_empty_not_zero() -> None:
    said = report.to_json(RESULT, None, {}, {})
    assert said["flops_utilisation"] is None and said["ceilings"] is None
    assert report.row(said)[3:8] == ("2 G", "", "", "", "123 MB")
    assert len(report.row(said)) == len(report.HEAD)


def test_only_intervals_that_do_not_touch_make_a_difference() -> None:
    old = [line(low=90.0, high=110.0)]
    cases = [((111.0, 120.0), "faster"), ((100.0, 130.0), "same"), ((110.0, 120.0), "same"), ((70.0, 89.0), "slower")]
    for (low, high), verdict in cases:
        (said,) = report.compare(old, [line(low=low, high=high)])
        assert said.verdict == verdict and said.ratio == pytest.approx((low + high) / 200)
    assert report.compare(old, [line("train", low=1.0, high=2.0)]) == []


def test_differences_are_named_once() -> None:
    old = [line(low=1, high=2, machine={"threads": 1}), line("train", low=1, high=2, machine={"threads": 1})]
    new = [line(low=1, high=2, machine={"threads": 2}), line("train", low=1, high=2, machine={"threads": 2})]
    assert report.differences(old, new) == ["machine threads: 1 then, 2 now"]
    assert report.differences(old, old) == []
    assert report.differences([], new[:1]) == ["decode is only in the new results"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no results"),
        ("nonsense", ":1 is not a result"),
        ('\n{"suite": "x"}', ":2 is not a result"),
        ("[1]", ":1"),
    ],
)
def test_a_file_without_results_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        report.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        report.read(tmp_path / "none.json")


def test_noise_says_why() -> None:
    from dataclasses import replace

    assert "interval is 150% of the median" in report.noise(RESULT)
    unsteady = replace(RESULT, timing=Timing(seconds=(1.0,), warmups=20, steady=False))
    assert "still getting faster after 20 warm-up calls" in report.noise(unsteady)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "0.0123"), (12.345, "12.3"), (999.4, "999"), (1234.5, "1,234"), (28640, "28,640")]
)
def test_figures(value: float, text: str) -> None:
    assert report.figures(value) == text


def test_fingerprint_names_the_machine() -> None:
    said = report.fingerprint(Runtime.detect(device="cpu", precision="fp32"))
    assert said["processor"] and said["torch"] and said["precision"] == "fp32" and said["threads"] >= 1
