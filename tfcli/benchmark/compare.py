"""Comparison of results with earlier ones, and of what else differed between the two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tfcli.benchmark.report import figures
from tfcli.benchmark.rules import Rule, broken
from tfcli.errors import UserError

Json = dict[str, Any]
Words = Literal["faster", "slower", "smaller", "larger", "same"]
HEAD = ("suite", "then", "now", "ratio", "verdict")
TOLERANCE = 0.05
"""The share by which a figure may be significantly worse without failing."""
SAVE = "save results with: tfcli bench --json > FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One suite now against then: the ratio of the figures, and whether the two intervals are disjoint."""

    suite: str
    ratio: float
    verdict: Words
    then: str
    now: str

    @property
    def failed(self) -> bool:
        """True if it is significantly worse, by more than the tolerance."""
        if self.verdict == "slower":
            return not 1 - TOLERANCE <= self.ratio <= 1 + TOLERANCE
        return self.verdict == "larger" and self.ratio > 1 + TOLERANCE

    @property
    def row(self) -> tuple[str, ...]:
        """The cells under ``HEAD``."""
        return self.suite, self.then, self.now, f"{self.ratio:.3f}x", self.verdict

    def __str__(self) -> str:
        return f"{self.suite}: {self.ratio:.3f} times {self.then}: {self.verdict}"


def read(path: Path) -> list[Json]:
    """Read the lines that ``--json`` wrote. Raises UserError for anything else."""
    lines: list[Json] = []
    number = 0
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            number += 1
            if text.strip():
                line = json.loads(text)
                if not min(line["value"], line["low"], line["high"]) > 0:
                    raise ValueError("not a figure")
                if not all(isinstance(line[key], str) for key in ("suite", "unit", "what")):
                    raise ValueError("not named")
                dict(line.get("machine") or {}), dict(line.get("model") or {})
                lines.append(line)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}:{number} is not a result", hint=SAVE) from None
    if not lines:
        raise UserError(f"{path} holds no results", hint=SAVE)
    return lines


def compare(old: Sequence[Json], new: Sequence[Json]) -> list[Verdict]:
    """Return a verdict for each suite that both have. Only disjoint intervals count as a difference.

    That is stricter than a test at 95 %: two medians whose intervals overlap may still differ.
    """
    before = {line["suite"]: line for line in old}
    return [_verdict(before[line["suite"]], line) for line in new if line["suite"] in before]


def _verdict(then: Json, now: Json) -> Verdict:
    unit: str = now["unit"]
    verdict: Words = "same"
    if now["low"] > then["high"]:
        verdict = "faster" if unit.endswith("/s") else "slower" if unit == "s" else "larger"
    elif now["high"] < then["low"]:
        verdict = "slower" if unit.endswith("/s") else "faster" if unit == "s" else "smaller"
    return Verdict(
        suite=now["suite"],
        ratio=now["value"] / then["value"],
        verdict=verdict,
        then=f"{figures(then['value'])} {then['unit']}",
        now=f"{figures(now['value'])} {unit}",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgment:
    """The outcome of a comparison with earlier results and of the rules of a gate."""

    differences: list[str]
    """Other differences, in words."""
    verdicts: list[Verdict]
    failed: list[str]
    """Broken rules or, if there are no rules, suites that are significantly worse, in words."""


def judge(lines: Sequence[Json], earlier: Sequence[Json] | None, gate: Sequence[Rule]) -> Judgment:
    """Compare results with ``earlier`` ones, if there are any, and check them against the rules of ``gate``."""
    ratios = {line["suite"]: [other["ratio"] for other in line.get("against", [])] for line in lines}
    verdicts = [] if earlier is None else compare(earlier, lines)
    if earlier is not None:
        ratios = {verdict.suite: [verdict.ratio] for verdict in verdicts}
    worse = [f"{verdict} by more than 5%" for verdict in verdicts if verdict.failed and not gate]
    return Judgment(
        differences=[] if earlier is None else differences(earlier, lines),
        verdicts=verdicts,
        failed=worse + broken(gate, lines, ratios),
    )


def differences(old: Sequence[Json], new: Sequence[Json]) -> list[str]:
    """Describe what else differed: machine, model, setting of a suite."""
    messages: dict[str, None] = {}
    before = {line["suite"]: line for line in old}
    for line in new:
        then = before.get(line["suite"])
        if then is None:
            messages[f"{line['suite']} is only in the new results"] = None
            continue
        for part in ("machine", "model"):
            was, now = then.get(part) or {}, line.get(part) or {}
            for key in was:  # a key that one of them does not have is no difference
                if key in now and was[key] != now[key]:
                    messages[f"{part} {key}: {was[key]} then, {now[key]} now"] = None
        if then.get("what") != line["what"]:
            messages[f"{line['suite']}: {then.get('what')} then, {line['what']} now"] = None
    return list(messages)
