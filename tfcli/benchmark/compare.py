"""Results against those of an earlier time: read, compared, and what was not alike."""

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
"""Share of a figure that a surely worse one may lose."""
SAVE = "save results with: tfcli bench --json > FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One suite now against then: how many times the figure, and whether the two intervals are apart."""

    suite: str
    ratio: float
    verdict: Words
    then: str
    now: str

    @property
    def failed(self) -> bool:
        """Whether it is surely worse, by more than the tolerance: of times and sizes more is worse."""
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
    """The lines that ``--json`` wrote. Raises UserError for anything else."""
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
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}:{number} is not a result", hint=SAVE) from None
    if not lines:
        raise UserError(f"{path} holds no results", hint=SAVE)
    return lines


def compare(old: Sequence[Json], new: Sequence[Json]) -> list[Verdict]:
    """A verdict for each suite that both have. Only intervals that do not touch make a difference.

    That is a stricter rule than a test at 95 %: two medians whose intervals overlap may still differ.
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
class Judgement:
    """What became of results: against earlier ones, and by the rules that they were to keep."""

    differences: list[str]
    """What was not the same then, in words."""
    verdicts: list[Verdict]
    failed: list[str]
    """Rules that are broken, or where there are none what is surely worse, in words."""


def judge(lines: Sequence[Json], earlier: Sequence[Json] | None, gate: Sequence[Rule]) -> Judgement:
    """Compare results with ``earlier`` ones (None: there are none) and hold them to the rules of ``gate``."""
    ratios = {line["suite"]: [other["ratio"] for other in line.get("against", [])] for line in lines}
    verdicts = [] if earlier is None else compare(earlier, lines)
    if earlier is not None:
        ratios = {verdict.suite: [verdict.ratio] for verdict in verdicts}
    worse = [f"{verdict} by more than 5%" for verdict in verdicts if verdict.failed and not gate]
    return Judgement(
        differences=[] if earlier is None else differences(earlier, lines),
        verdicts=verdicts,
        failed=worse + broken(gate, lines, ratios),
    )


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
            for key in was:  # what one of them did not write yet is no difference
                if key in now and was[key] != now[key]:
                    found[f"{part} {key}: {was[key]} then, {now[key]} now"] = None
        if then.get("what") != line["what"]:
            found[f"{line['suite']}: {then.get('what')} then, {line['what']} now"] = None
    return list(found)
