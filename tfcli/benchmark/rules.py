"""Rules that fail a benchmark run, such as ``decode<0.97x`` or ``memory>450``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tfcli.errors import UserError, unknown

FORM = 'write a suite, < or >, and a number, as in "decode<0.97x" (times the compared results) or "memory>450" (MB)'


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Fails if a suite's value is below or above ``limit``: in its own unit, or as a ratio to another value."""

    suite: str
    sign: Literal["<", ">"]
    limit: float
    relative: bool

    def __str__(self) -> str:
        return f"{self.suite}{self.sign}{self.limit:g}{'x' if self.relative else ''}"

    def broken(self, value: float) -> bool:
        """Return whether ``value`` breaks the rule."""
        return value < self.limit if self.sign == "<" else value > self.limit


def parse(texts: Iterable[str], suites: Collection[str]) -> list[Rule]:
    """Parse the rules in ``texts``, which may be comma-separated.

    Raises UserError for a malformed rule and for a suite that is not in ``suites``.
    """
    rules: list[Rule] = []
    for text in (part.strip() for item in texts for part in item.split(",")):
        match = re.fullmatch(r"([\w-]+)\s*([<>])\s*(\d+(?:\.\d*)?|\.\d+)\s*(x?)", text)
        if match is None:
            raise UserError(f"--fail-if {text!r} is not a rule", hint=FORM)
        suite, sign, limit, times = match.groups()
        if suite not in suites:
            raise unknown("suite", suite, suites)
        rules.append(Rule(suite=suite, sign="<" if sign == "<" else ">", limit=float(limit), relative=bool(times)))
    return rules


def check(
    rules: Sequence[Rule], measured: Collection[str], compared: Collection[str] | None, beside: Collection[str] = ()
) -> None:
    """Raise UserError for a rule that nothing can break.

    ``measured`` are the suites of the results, ``compared`` those of the earlier ones, if there are any, and
    ``beside`` those with another side.
    """
    for rule in rules:
        if rule.suite not in measured:
            hint = f"measured: {', '.join(measured)}"
            raise UserError(f"--fail-if {rule}: {rule.suite} is not measured here", hint=hint)
        if not rule.relative:
            continue
        if compared is None and rule.suite not in beside:
            raise UserError(
                f"--fail-if {rule} is a ratio, and there is nothing to compare with",
                hint="name earlier results with --compare FILE or a peer with --against, or leave the x out",
            )
        if compared is not None and rule.suite not in compared:
            raise UserError(f"--fail-if {rule}: the earlier results have no {rule.suite}")


def broken(
    rules: Sequence[Rule], lines: Sequence[Mapping[str, Any]], ratios: Mapping[str, Sequence[float]]
) -> list[str]:
    """Describe the broken rules. ``lines`` are results, ``ratios`` those of each suite to what it is compared with."""
    messages: list[str] = []
    for rule in rules:
        line = next(line for line in lines if line["suite"] == rule.suite)
        values = ratios.get(rule.suite, ()) if rule.relative else [line["value"]]
        messages += [
            f"{rule}: {rule.suite} is {value:.4g}{' times' if rule.relative else ' ' + line['unit']}"
            for value in values
            if rule.broken(value)
        ]
    return messages
