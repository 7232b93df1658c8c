"""Results of a bench as rows for people, as JSON lines, and against those of an earlier time."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tfcli.bench.subject import Subject
from tfcli.bench.suites import Ceilings, Result
from tfcli.config import to_dict
from tfcli.errors import UserError
from tfcli.model.cost import parameters

if TYPE_CHECKING:
    from tfcli.runtime import Runtime

Json = dict[str, Any]
HEAD = ("suite", "median", "95 % interval", "FLOP/s", "of peak", "bytes/s", "of peak", "peak memory", "what")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One suite now against then: how many times as fast, and whether the two intervals are apart."""

    suite: str
    ratio: float
    verdict: Literal["faster", "slower", "same"]


def fingerprint(runtime: Runtime) -> Json:
    """What decides how fast a machine is, so that figures of different machines are not compared unawares."""
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
    """The processor's name, or its architecture where the system does not tell."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def to_json(result: Result, peak: Ceilings | None, machine: Json, model: Json) -> Json:
    """A result as plain values; rates are units a second, ``low`` and ``high`` bound the median with 95 %."""
    low, high = result.interval
    return {
        "suite": result.suite,
        "value": result.value,
        "unit": result.unit,
        "low": low,
        "high": high,
        "median_s": result.timing.median,
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
        "ceilings": {"flops_per_second": peak.flops, "bytes_per_second": peak.bytes} if peak else None,
        "model": model,
        "machine": machine,
    }


def about(subject: Subject) -> Json:
    """Which model: its name, shape and number of parameters."""
    return {
        "name": subject.name,
        "parameters": parameters(subject.config).total,
        **to_dict(subject.config),
        "tokenizer_hash": subject.tokenizer.hash,
    }


def heading(machine: Json, model: Json, peak: Ceilings | None) -> str:
    """Lines above the table: machine, model, ceilings."""
    lines = [
        f"{machine['processor']}, {machine['device']}, torch {machine['torch']}",
        f"{model['name']}: {scaled(model['parameters'])} parameters, depth {model['depth']}, width {model['width']}, "
        f"context {model['context']}, vocabulary {model['vocab_size']}",
    ]
    if peak:
        lines.append(f"peaks measured here: {scaled(peak.flops)} FLOP/s, {scaled(peak.bytes, 'B')}/s")
    return "\n".join(lines) + "\n"


def noise(result: Result) -> str:
    """Why a result is not to be trusted far, in words."""
    timing = result.timing
    if not timing.steady:
        return f"{result.suite} was still getting faster after {timing.warmups} warm-up calls; its figures are too low"
    return (
        f"{result.suite} is noisy: its interval is {timing.spread:.0%} of the median; "
        "close other programs, or use more --repeats"
    )


def row(line: Json) -> tuple[str, ...]:
    """The cells under ``HEAD`` of one JSON line."""
    return (
        line["suite"],
        f"{figures(line['value'])} {line['unit']}",
        f"{figures(line['low'])} to {figures(line['high'])}",
        scaled(line["flops_per_second"]),
        _percent(line["flops_utilisation"]),
        scaled(line["bytes_per_second"], "B"),
        _percent(line["bandwidth_utilisation"]),
        scaled(line["peak_memory_bytes"], "B"),
        line["what"],
    )


def read(path: Path) -> list[Json]:
    """The lines that ``--json`` wrote. Raises UserError for anything else."""
    lines: list[Json] = []
    number = 0
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            number += 1
            if text.strip():
                line = json.loads(text)
                float(line["value"]), float(line["low"]), float(line["high"]), str(line["suite"])
                lines.append(line)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}:{number} is not a result", hint="save results with: tfcli bench --json > FILE"
        ) from None
    if not lines:
        raise UserError(f"{path} holds no results", hint="save results with: tfcli bench --json > FILE")
    return lines


def compare(old: Sequence[Json], new: Sequence[Json]) -> list[Verdict]:
    """A verdict for each suite that both have. Only intervals that do not touch make a difference.

    That is a stricter rule than a test at 95 %: two medians whose intervals overlap may still differ.
    """
    before = {line["suite"]: line for line in old}
    verdicts: list[Verdict] = []
    for line in new:
        then = before.get(line["suite"])
        if then is None:
            continue
        verdict: Literal["faster", "slower", "same"] = "same"
        if line["low"] > then["high"]:
            verdict = "faster"
        elif line["high"] < then["low"]:
            verdict = "slower"
        verdicts.append(Verdict(suite=line["suite"], ratio=line["value"] / then["value"], verdict=verdict))
    return verdicts


def differences(old: Sequence[Json], new: Sequence[Json]) -> list[str]:
    """What was not the same, in words: machine, model, setting of a suite."""
    found: dict[str, None] = {}
    before = {line["suite"]: line for line in old}
    for line in new:
        then = before.get(line["suite"])
        if then is None:
            found[f"{line['suite']} is only in the new results"] = None
            continue
        for part in ("machine", "model"):
            was, now = then.get(part) or {}, line.get(part) or {}
            for key in {**was, **now}:
                if was.get(key) != now.get(key):
                    found[f"{part} {key}: {was.get(key)} then, {now.get(key)} now"] = None
        if then.get("what") != line["what"]:
            found[f"{line['suite']}: {then.get('what')} then, {line['what']} now"] = None
    return list(found)


def figures(value: float) -> str:
    """Three significant figures, and all of a number above a thousand."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def scaled(value: float | None, unit: str = "") -> str:
    """Three figures with a prefix, as 1.25 G; empty where there is none."""
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
