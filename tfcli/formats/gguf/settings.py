"""Settings in the metadata of a GGUF file, checked as they are taken, and its rotary settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfcli.config.model import RopeScaling
from tfcli.errors import UserError
from tfcli.formats.gguf.rope import llama3_scaling

ROPE_FREQS = "rope_freqs.weight"
"""Llama 3's scaling, K / 2 numbers, by which the rotary frequencies are divided."""
LARGEST = 1 << 27
"""Above every width, vocabulary and context of a real model."""


class Settings:
    """Numbers of one architecture in the metadata, each checked."""

    def __init__(self, name: str, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.name, self.architecture, self.metadata = name, architecture, metadata

    def wrong(self, key: str, expected: str) -> UserError:
        """Return the error for an invalid setting."""
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full)
        given = f"has no {full}" if value is None else f"says that {full} is {str(value)[:64]}"
        return UserError(f"{self.name} {given}, expected {expected}", hint="the file was not made for this model")

    def get(self, key: str) -> Any:
        """Return the value, None if there is none; llama.cpp allows a list with one per layer."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value[0] if isinstance(value, list) and value and all(item == value[0] for item in value) else value

    def count(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 1."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, list):
            raise self.wrong(key, "one number for all layers")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            raise self.wrong(key, f"a whole number from 1 to {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number as the decimal that was meant: 1e-05, not fp32's 9.999999747378752e-06."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, float) or not 1e-30 < value < 1e30:
            raise self.wrong(key, "a positive number")
        return float(str(np.float32(value)))


def read_rope(settings: Settings, factors: NDArray[np.float32] | None, head_width: int, theta: float) -> RopeScaling:
    """Return the scaling in settings and ``factors`` (``ROPE_FREQS``). Raises UserError for unsupported ones."""
    kind = settings.get("rope.scaling.type")
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0))
    attention = settings.number("rope.scaling.attn_factor", 1.0)
    kind = "linear" if kind is None else kind
    if kind not in ("none", "linear", "yarn"):
        raise settings.wrong("rope.scaling.type", "none, linear or yarn")
    if kind != "yarn" and attention != 1.0:
        raise settings.wrong("rope.scaling.attn_factor", "1 without yarn")
    scaled = kind != "none" and factor != 1.0
    if factors is not None:
        rule = None if scaled else llama3_scaling(factors.tolist(), head_width, theta)
        if rule is None:
            raise UserError(
                f"{settings.name} stretches its rotary positions in a way that tfcli does not support",
                hint=f"it supports Llama 3's rule; {ROPE_FREQS} holds other numbers",
            )
        return rule
    if not scaled:
        return RopeScaling()
    original = settings.count("rope.scaling.original_context_length", settings.count("context_length"))
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        attention_factor=attention * (1.0 + 0.1 * math.log(factor)),
        beta_fast=settings.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=settings.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def write_rope(scaling: RopeScaling, context: int) -> dict[str, Any]:
    """Return the settings of a scaling to ``context``; {} for Llama 3's, which is the tensor ``ROPE_FREQS``."""
    if scaling.kind not in ("linear", "yarn"):
        return {}
    settings: dict[str, Any] = {"type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind == "linear":
        settings["original_context_length"] = max(1, round(context / scaling.factor))
    else:
        settings |= {
            "original_context_length": scaling.original_context,
            "attn_factor": scaling.attention_factor / (1.0 + 0.1 * math.log(scaling.factor)),
            "yarn_beta_fast": float(scaling.beta_fast),
            "yarn_beta_slow": float(scaling.beta_slow),
        }
    return {f"rope.scaling.{key}": value for key, value in settings.items()}
