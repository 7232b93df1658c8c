"""Ranges of settings, beside their fields: ``steps: Annotated[int | None, AT_LEAST_1] = None``."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any

from tfcli.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The numbers for which ``holds`` is true; ``hint`` says which they are."""

    hint: str
    holds: Callable[[float], bool]


AT_LEAST_0 = Range("it must be at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1 = Range("it must be at least 1", lambda x: 1 <= x < math.inf)
ABOVE_0 = Range("it must be more than 0", lambda x: 0 < x < math.inf)
BELOW_1 = Range("it must be at least 0 and below 1", lambda x: 0 <= x < 1)
INSIDE_0_1 = Range("it must be between 0 and 1", lambda x: 0 < x < 1)
SHARE_OF_RUN = Range("it is a share of the run, from 0 to 1", lambda x: 0 <= x <= 1)
SEED = Range("it must fit into 64 bits", lambda x: -(2**63) <= x < 2**63)


def check(config: Any, prefix: str = "") -> None:
    """Raise UserError for the first setting of ``config``, a dataclass of dataclasses, that is out of its range."""
    for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{name}.")
        elif typing.get_origin(kind) is typing.Annotated and value is not None:
            for limit in kind.__metadata__:
                if not limit.holds(value):
                    raise UserError(f"{prefix}{name} is {value}", hint=limit.hint)
