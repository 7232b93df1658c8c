"""Ranges of settings, which annotate the fields as ``Annotated`` metadata and are checked by ``resolve``."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any

from tfcli.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The finite numbers that a setting may be."""

    at_least: float = -inf
    above: float = -inf
    below: float = inf
    at_most: float = inf
    hint: str | None = None
    """Hint of the error; left out: the bounds."""

    def check(self, key: str, value: float) -> None:
        """Raise UserError for a ``value`` of the setting ``key`` that lies outside."""
        if self.at_least <= value <= self.at_most and self.above < value < self.below:
            return
        bounds = {"at least": self.at_least, "more than": self.above, "below": self.below, "at most": self.at_most}
        given = " and ".join(f"{name} {bound}" for name, bound in bounds.items() if abs(bound) < inf)
        raise UserError(f"{key} is {value}", hint=self.hint or f"it must be {given}")


Count = Annotated[int, Range(at_least=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Rate = Annotated[float, Range(at_least=0, below=1)]
"""A decay rate or a probability that must leave something over."""
Fraction = Annotated[float, Range(above=0, below=1)]
"""A part that is neither nothing nor all."""
Share = Annotated[float, Range(at_least=0, at_most=1)]
RunShare = Annotated[float, Range(at_least=0, at_most=1, hint="it is a share of the run, from 0 to 1")]
Seed = Annotated[int, Range(at_least=-(2**63), below=2**63, hint="it must fit into 64 bits")]


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise UserError for a number in ``config``, or in the dataclasses inside it, that is outside its field's range.

    ``prefix`` stands before the names of fields in messages. None is always allowed.
    """
    for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{prefix}{name}.")
        elif value is not None:
            for option in (kind, *typing.get_args(kind)):  # X, or X | None
                for limit in typing.get_args(option)[1:] if typing.get_origin(option) is Annotated else ():
                    limit.check(prefix + name, value)
