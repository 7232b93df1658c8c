"""Benchmark results as table rows and as JSON lines."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tfcli.benchmark.case import Comparison, Result
from tfcli.benchmark.subject import Subject
from tfcli.benchmark.suites import Ceilings
from tfcli.benchmark.timing import Timing
from tfcli.config.model import stored
from tfcli.model.cost import parameters

if TYPE_CHECKING:
    from tfcli.runtime import Runtime

Json = dict[str, Any]
KINDS: Mapping[str, str] = MappingProxyType({"tokens": "first tokens", "texts": "texts"})
"""Results that may be the same on both sides: {key in JSON: words}."""
FORECAST: Mapping[str, str] = MappingProxyType(
    {
        "forecast_weights_bytes": "weights",
        "forecast_cache_bytes": "keys and values",
        "program_bytes": "Python and torch",
    }
)
"""The parts of the forecast of a process's memory."""
HEAD = ("suite", "median", "95 % interval", "FLOP/s", "of peak", "bytes/s", "of peak", "peak memory", "what")
AGAINST = ("suite", "tfcli", "compared with", "its figure", "ratio", "same", "what")


def fingerprint(runtime: Runtime) -> Json:
    """Describe the machine, so that figures of different machines are not compared unawares."""
    import torch

    return {
        "processor": processor(),
        "device": runtime.describe(),
        "precision": runtime.precision,
        "threads": runtime.threads,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def processor() -> str:
    """Return the processor's name, or its architecture if the system does not report one."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def to_json(result: Result, peak: Ceilings | None, machine: Json, model: Json) -> Json:
    """Return a result as plain values; ``low`` and ``high`` bound its 95 % interval."""
    low, high = result.interval
    return {
        "suite": result.suite,
        "value": result.value,
        "unit": result.unit,
        "low": low,
        "high": high,
        "median_s": result.timing.median if result.amount is not None or result.unit == "s" else None,
        "repeats": len(result.timing.seconds),
        "warmups": result.timing.warmups,
        "steady": result.timing.steady,
        "spread": result.timing.spread,
        "what": result.what,
        "flops_per_second": result.flops_per_second,
        "flops_utilisation": _share(result.flops_per_second, peak.flops if peak else None),
        "bytes_per_second": result.bytes_per_second,
        "bandwidth_utilisation": _share(result.bytes_per_second, peak.bytes if peak else None),
        "peak_memory_bytes": result.peak_memory,
        "details": dict(result.details),
        "against": [_beside(result, other) for other in result.against],
        "ceilings": {"flops_per_second": peak.flops, "bytes_per_second": peak.bytes} if peak else None,
        "model": model,
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "version": version("tfcli"),
    }


def _beside(result: Result, other: Comparison) -> Json:
    """Return another side as plain values; ``ratio`` is our figure divided by its figure."""
    value, low, high = result.figures(other.timing)
    return {
        "name": other.name,
        "value": value,
        "low": low,
        "high": high,
        "median_s": other.timing.median,
        "repeats": len(other.timing.seconds),
        "ratio": result.value / value,
        **other.about,
    }


def about(subject: Subject) -> Json:
    """Describe the model: its name, shape, number of parameters and their bytes."""
    return {
        "name": subject.name,
        "parameters": parameters(subject.config).total,
        "weight_bytes": subject.weight_bytes,
        "quantize": subject.quantize,
        **stored(subject.config),
        "tokenizer_hash": subject.engine.tokenizer.hash,
    }


def heading(line: Json) -> list[str]:
    """Return the lines above the table: machine, model, peaks, date and version."""
    machine, model, peak = line["machine"], line["model"], line["ceilings"]
    lines = [
        f"{line['date']}, tfcli {line['version']}: {machine['processor']}, {machine['device']}, "
        f"torch {machine['torch']}",
        f"{model['name']}: {scaled(model['parameters'])} parameters in {scaled(model['weight_bytes'], 'B')}"
        f"{' as ' + model['quantize'] if model['quantize'] else ''}, "
        f"depth {model['depth']}, width {model['width']}, context {model['context']}, vocabulary {model['vocab_size']}",
    ]
    if peak:
        flops, bandwidth = scaled(peak["flops_per_second"]), scaled(peak["bytes_per_second"], "B")
        lines.append(f"peaks measured here: {flops} FLOP/s, {bandwidth}/s")
    return lines


def remarks(lines: Sequence[Json]) -> list[str]:
    """Return the lines below the table: the details of the suites."""
    notes: list[str] = []
    for line in lines:
        suite, details = line["suite"], line["details"]
        if "step" in details:
            notes.append(f"{suite}: by {details['step']}")
        if details.get("attention"):
            notes.append(f"{suite}: attention by PyTorch's {' and '.join(details['attention'])}")
        if "forecast_bytes" in details:
            parts = ", ".join(
                f"{scaled(details[key], 'B')} of {what}" for key, what in FORECAST.items() if details[key]
            )
            notes.append(
                f"{suite}: forecast {scaled(details['forecast_bytes'], 'B')} ({parts}); at the end "
                f"{scaled(details['resident_bytes'], 'B')}; first token {details['first_token_seconds']:.1f} s after "
                "the process began"
            )
    others = [other for line in lines for other in line["against"]]
    if any(other[f"same_{key}"] < other[f"of_{key}"] for other in others for key in KINDS if f"same_{key}" in other):
        notes.append("greedy texts differ where two tokens are almost equally likely and rounding decides")
    return notes


def in_short(result: Result) -> str:
    """Return a suite's figure and those of the other sides."""
    others = [f"{other.name} {figures(result.figures(other.timing)[0])}" for other in result.against]
    return "; ".join([f"{figures(result.value)} {result.unit}", *others])


def noise(suite: str, timing: Timing) -> str | None:
    """Return why a figure is unreliable, None if it is reliable."""
    if not timing.steady:
        return f"{suite} was still getting faster after {timing.warmups} warm-up calls; its figures are too low"
    if not timing.noisy:
        return None
    hint = "close other programs, or use more --repeats"
    return f"{suite} is noisy: its interval is {timing.spread:.0%} of the median; {hint}"


def row(line: Json) -> tuple[str, ...]:
    """Return the cells under ``HEAD`` of one JSON line."""
    return (
        line["suite"],
        f"{figures(line['value'])} {line['unit']}",
        _interval(line),
        scaled(line["flops_per_second"]),
        _percent(line["flops_utilisation"]),
        scaled(line["bytes_per_second"], "B"),
        _percent(line["bandwidth_utilisation"]),
        scaled(line["peak_memory_bytes"], "B"),
        line["what"],
    )


def against_rows(line: Json) -> list[tuple[str, ...]]:
    """Return the cells under ``AGAINST`` of one JSON line, a row for each other side."""
    return [
        (
            line["suite"],
            f"{figures(line['value'])} {line['unit']} ({_interval(line)})",
            _named(other),
            f"{figures(other['value'])} {line['unit']} ({_interval(other)})",
            f"{other['ratio']:.2f}x",
            _same(other),
            line["what"],
        )
        for other in line["against"]
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def _named(other: Json) -> str:
    """Return the name of another side with its versions, weights and threads, if it has them."""
    parts = [f"{name} {version}" for name, version in other.get("versions", {}).items()] or [other["name"]]
    if "weights" in other:
        parts.append(str(other["weights"]))
    if "threads" in other:
        parts.append(f"{other['threads']} thread{'s' if other['threads'] != 1 else ''}")
    return ", ".join(parts)


def _same(other: Json) -> str:
    for key, what in KINDS.items():
        if f"same_{key}" in other:
            return f"{other[f'same_{key}']} of {other[f'of_{key}']} {what}"
    return ""


def _interval(figure: Json) -> str:
    return f"{figures(figure['low'])} to {figures(figure['high'])}"


def figures(value: float) -> str:
    """Format three significant figures, all digits above a thousand."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def scaled(value: float | None, unit: str = "") -> str:
    """Format three figures with a prefix, such as 1.25 G; "" for none."""
    if not value:
        return ""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def _share(value: float | None, peak: float | None) -> float | None:
    return value / peak if value and peak else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
