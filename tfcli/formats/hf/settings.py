"""Values of a config.json, checked as they are taken, and its rotary settings. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tfcli.config.model import RopeScaling
from tfcli.errors import UserError

T = TypeVar("T")

MOST = 1 << 63
"""Above every size and number of a model."""


def json_object(path: Path, data: str | bytes, *, hint: str = "copy or save the model again") -> dict[str, Any]:
    """Return the object that ``data``, the content of a JSON file, holds. Raises UserError for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", hint=hint) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is a JSON {type(value).__name__}, expected an object")
    return value


def json_text(value: object) -> str:
    """Return a value as the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


class Settings:
    """A config.json over its family's defaults; each value is checked as it is read, and named where it is invalid."""

    def __init__(self, path: Path, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.path = path
        self.data = {**defaults, **data}

    def error(self, key: str, hint: str | None = None) -> UserError:
        """Return the error for an invalid setting."""
        return UserError(f"{self.path}: {key} is {self.data.get(key)!r}", hint=hint)

    def get(self, key: str) -> Any:
        """Return the value. Raises UserError where it is neither given nor has a default."""
        if key not in self.data:
            raise UserError(f"{self.path} does not say {key}", hint="copy or save the model again")
        return self.data[key]

    def whole(self, key: str) -> int:
        """Return a whole number of at least 1."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < MOST:
            raise self.error(key, "it must be a whole number of at least 1, and a size that a model can have")
        return value

    def number(self, key: str) -> float:
        """Return a finite number above 0."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
            raise self.error(key, "it must be a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "it must be true or false")
        return value

    def one_of(self, key: str, table: Mapping[str, T]) -> T:
        """Return the entry of ``table`` for the value."""
        value = self.get(key)
        if not isinstance(value, str) or value not in table:
            raise self.error(key, f"tfcli supports: {', '.join(table)}")
        return table[value]


def read_rope(settings: Settings, rope: Any, theta: float) -> tuple[float, RopeScaling]:
    """Return rope_theta (default: ``theta``) and scaling from rotary settings as transformers 4 or 5 write them."""
    if not isinstance(rope, Mapping):
        raise UserError(f"{settings.path}: the rotary settings are {rope!r}", hint="expected an object")
    inner = Settings(settings.path, rope, {"rope_theta": theta})
    for owner in (settings, inner):
        if owner.data.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise owner.error("partial_rotary_factor", "tfcli rotates whole heads only")
    return inner.number("rope_theta"), _scaling(inner, rope.get("rope_type", rope.get("type", "default")), settings)


def _scaling(rope: Settings, kind: Any, settings: Settings) -> RopeScaling:
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope.number("factor"))
    rope.data.setdefault("original_max_position_embeddings", settings.get("max_position_embeddings"))
    original = rope.whole("original_max_position_embeddings")
    if kind == "llama3":
        factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise rope.error("high_freq_factor", "it must be above low_freq_factor")
        return RopeScaling(
            kind="llama3", factor=factor, original_context=original, low_freq_factor=low, high_freq_factor=high
        )
    if kind == "yarn":
        if rope.data.get("truncate", True) is not True:
            raise rope.error("truncate", "tfcli supports only True")
        rope.data = {key: value for key, value in rope.data.items() if value is not None}
        rope.data.setdefault("factor", settings.whole("max_position_embeddings") / original)
        rope.data.setdefault("attention_factor", _magnitude(rope))
        return RopeScaling(
            kind="yarn",
            factor=rope.number("factor"),
            original_context=original,
            beta_fast=rope.number("beta_fast") if rope.data.get("beta_fast") else 32.0,
            beta_slow=rope.number("beta_slow") if rope.data.get("beta_slow") else 1.0,
            attention_factor=rope.number("attention_factor"),
        )
    raise UserError(
        f"{rope.path}: rotary positions of type {kind!r}", hint="tfcli supports: default, linear, llama3 and yarn"
    )


def _magnitude(rope: Settings) -> float:
    """Return yarn's factor of cos and sin: 0.1 ln(factor) + 1 (Peng et al. 2023, eq. 22), weighted as by DeepSeek."""

    def weighted(mscale: float) -> float:
        return max(1.0, 0.1 * mscale * math.log(rope.number("factor")) + 1.0)

    if rope.data.get("mscale") and rope.data.get("mscale_all_dim"):
        return weighted(rope.number("mscale")) / weighted(rope.number("mscale_all_dim"))
    return weighted(1.0)


def write_rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """Return the rotary settings of transformers 5; ``rope_scaling`` of transformers 4 is the same without theta."""
    if scaling.kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_context
    own = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow", "attention_factor")}
    return rope | {name: getattr(scaling, name) for name in own.get(scaling.kind, ())}
