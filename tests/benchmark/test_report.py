"""Results as JSON, table rows and tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tfcli.benchmark import report
from tfcli.benchmark.case import Comparison, Result
from tfcli.benchmark.suites import Ceilings
from tfcli.benchmark.timing import Timing
from tfcli.runtime import Runtime

TIMING = Timing(seconds=(0.01, 0.02, 0.04), warmups=3, steady=True)
RESULT = Result(
    suite="decode",
    what="4 tokens",
    unit="tokens/s",
    amount=4.0,
    timing=TIMING,
    flops_per_second=2e9,
    bytes_per_second=None,
    peak_memory=123_000_000,
)
PEER = Comparison(
    name="llama.cpp",
    timing=Timing(seconds=(0.04, 0.04, 0.08), warmups=3, steady=True),
    about={"versions": {"llama.x": "1.2"}, "weights": "Q4_1", "threads": 2, "same_tokens": 3, "of_tokens": 4},
)


def test_json_has_rates_and_their_interval() -> None:
    line = report.to_json(RESULT, Ceilings(flops=8e9, bytes=1e9), {"threads": 2}, {"name": "m"})
    assert json.loads(json.dumps(line)) == line
    assert (line["value"], line["low"], line["high"]) == (200.0, 100.0, 400.0)
    assert line["median_s"] == 0.02 and line["repeats"] == 3 and line["spread"] == pytest.approx(1.5)
    assert line["flops_utilisation"] == 0.25 and line["bandwidth_utilisation"] is None
    assert line["against"] == []


def test_what_is_not_known_is_empty_not_zero() -> None:
    line = report.to_json(RESULT, None, {}, {})
    assert line["flops_utilisation"] is None and line["ceilings"] is None
    assert report.row(line)[3:8] == ("2 G", "", "", "", "123 MB")
    assert len(report.row(line)) == len(report.HEAD)


def test_times_and_sizes_are_their_own_figures() -> None:
    loading = report.to_json(replace(RESULT, unit="s", amount=None), None, {}, {})
    assert (loading["value"], loading["low"], loading["high"], loading["median_s"]) == (0.02, 0.01, 0.04, 0.02)
    size = report.to_json(replace(RESULT, unit="MB", amount=None), None, {}, {})
    assert size["value"] == 0.02 and size["median_s"] is None


def test_another_side_has_its_interval_and_the_ratio_of_the_medians() -> None:
    line = report.to_json(replace(RESULT, against=(PEER,)), None, {}, {})
    (other,) = line["against"]
    assert (other["value"], other["low"], other["high"], other["ratio"]) == (100.0, 50.0, 100.0, 2.0)
    assert other["name"] == "llama.cpp" and other["weights"] == "Q4_1" and other["repeats"] == 3
    (row,) = report.against_rows(line)
    assert row == (
        "decode", "200 tokens/s (100 to 400)", "llama.x 1.2, Q4_1, 2 threads", "100 tokens/s (50 to 100)", "2.00x",
        "3 of 4 first tokens", "4 tokens",
    )  # fmt: skip
    assert len(row) == len(report.AGAINST)
    assert report.in_short(replace(RESULT, against=(PEER,))) == "200 tokens/s; llama.cpp 100"
    assert report.remarks([line])[0].startswith("greedy texts differ where")


def test_tables() -> None:
    head, rows = ("a", "bb"), [("1", "x|y"), ("222", "")]
    assert report.markdown(head, rows).splitlines() == ["| a | bb |", "| --- | --- |", "| 1 | x\\|y |", "| 222 |  |"]


def test_remarks_say_the_forecast_and_the_kernels() -> None:
    details = {
        "forecast_bytes": 3e8, "forecast_weights_bytes": 1e8, "forecast_cache_bytes": 0, "program_bytes": 2e8,
        "resident_bytes": 3.1e8, "peak_bytes": 3.3e8, "first_token_seconds": 2.04,
    }  # fmt: skip
    lines = [
        report.to_json(replace(RESULT, suite="memory", details=details), None, {}, {}),
        report.to_json(replace(RESULT, details={"step": "a step"}), None, {}, {}),
        report.to_json(replace(RESULT, suite="prefill", details={"attention": ["math", "x"]}), None, {}, {}),
    ]
    assert report.remarks(lines) == [
        "memory: forecast 300 MB (100 MB of weights, 200 MB of Python and torch); at the end 310 MB; "
        "first token 2.0 s after the process began",
        "decode: by a step",
        "prefill: attention by PyTorch's math and x",
    ]


def test_noise_says_why() -> None:
    assert "interval is 150% of the median" in (report.noise("decode", TIMING) or "")
    unsteady = Timing(seconds=(1.0,), warmups=20, steady=False)
    assert "still getting faster after 20 warm-up calls" in (report.noise("decode", unsteady) or "")
    assert report.noise("decode", Timing(seconds=(1.0, 1.01), warmups=3, steady=True)) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "0.0123"), (12.345, "12.3"), (999.4, "999"), (1234.5, "1,234"), (28640, "28,640")]
)
def test_figures(value: float, text: str) -> None:
    assert report.figures(value) == text


def test_fingerprint_names_the_machine() -> None:
    line = report.fingerprint(Runtime.detect(device="cpu", precision="fp32"))
    assert line["processor"] and line["torch"] and line["precision"] == "fp32" and line["threads"] >= 1
