"""Rotary positions in GGUF files: the order of rows, and Llama 3's rule as the factors that are stored for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tfcli.config.model import RopeScaling

CLOSE = 1e-5
"""Relative difference up to which two numbers count as equal."""
SEEN = 1e-6
"""Share of a frequency that exceeds rounding to fp32."""


def rotary_halves(heads: int, head_width: int) -> NDArray[np.intp]:
    """Return the order of a llama file's rows of q or k in which they are Hugging Face's: ``rows[order]``.

    Rotary positions turn pairs of rows: (2i, 2i + 1) of a head in a llama file, (i, i + head_width / 2) in Hugging
    Face's model and in tfcli. The same holds for numbers, blocks and biases. ``heads``: for k those of the keys.
    """
    return np.arange(heads * head_width).reshape(heads, head_width // 2, 2).swapaxes(1, 2).ravel()


def rotary_pairs(heads: int, head_width: int) -> NDArray[np.intp]:
    """Return the inverse order: Hugging Face's ``rows[order]`` are those of a llama file."""
    return np.arange(heads * head_width).reshape(heads, 2, head_width // 2).swapaxes(1, 2).ravel()


def _frequencies(head_width: int, theta: float) -> NDArray[np.float64]:
    """Return the K/2 rotary frequencies before any scaling, in radians per position."""
    return theta ** -(np.arange(0, head_width, 2) / head_width)


def llama3_factors(scaling: RopeScaling, head_width: int, theta: float) -> NDArray[np.float64]:
    """Return the divisors of the K/2 frequencies by Llama 3's rule."""
    turns = scaling.original_context * _frequencies(head_width, theta) / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (share + (1 - share) / scaling.factor)


def llama3_scaling(factors: Sequence[float], head_width: int, theta: float) -> RopeScaling | None:
    """Return parameters of Llama 3's rule that give these head_width / 2 factors, None where none do.

    Only ratios of the three lengths count: ``low_freq_factor`` is taken to be 1, as it is in every published model.
    """
    divided = np.asarray(factors, np.float64)
    if np.allclose(divided, divided[0], rtol=CLOSE):
        one = abs(divided[0] - 1) < CLOSE
        return RopeScaling() if one else RopeScaling(kind="linear", factor=float(np.float32(divided[0])))
    factor, kept = float(np.float32(divided.max())), _frequencies(head_width, theta)
    share = (1 / divided - 1 / factor) / (1 - 1 / factor)  # of the frequency as it was
    for low, high in _ends(kept, share):
        context = max(1, round(2 * math.pi / low))
        turns = [context * end / (2 * math.pi) for end in (low, high)]
        for digits in (5, 15):  # 1.0, not 1.0000001: the decimals that were meant
            low, high = (round(turn, digits) for turn in turns)
            scaling = RopeScaling(
                kind="llama3", factor=factor, original_context=context, low_freq_factor=low, high_freq_factor=high
            )
            if np.allclose(llama3_factors(scaling, head_width, theta), divided, rtol=CLOSE):
                return scaling
    return None


def stretch(scaling: RopeScaling, head_width: int, theta: float) -> tuple[float, ...]:
    """Return what a scaling does, in numbers that are equal for equivalent scalings."""
    if scaling.kind == "yarn" and (scaling.factor, scaling.attention_factor) != (1.0, 1.0):
        own = (scaling.factor, scaling.original_context, scaling.attention_factor)
        return (*map(float, own), scaling.beta_fast, scaling.beta_slow)
    if scaling.kind == "llama3":
        return tuple(llama3_factors(scaling, head_width, theta).tolist())
    return (float(scaling.factor) if scaling.kind == "linear" else 1.0,) * (head_width // 2)


def _ends(kept: NDArray[np.float64], share: NDArray[np.float64]) -> Iterator[tuple[float, float]]:
    """Yield frequencies at which a share of 0 and of 1 is kept; between them the share is linear in the frequency."""
    between = np.flatnonzero((share > SEEN) & (share < 1 - SEEN))
    last, first = kept[share <= SEEN].max(initial=0.0), kept[share >= 1 - SEEN].min(initial=math.inf)
    ends = []
    if len(between) > 1:
        slope, at_zero = np.polyfit(kept[between], share[between], 1)
        ends.append((-at_zero / slope, (1 - at_zero) / slope))
    elif len(between) == 1:
        at, part = kept[between[0]], share[between[0]]
        ends.append((at / (1 + 3 * part), 4 * at / (1 + 3 * part)))  # as published
        width = min((at - last) / part, (first - at) / (1 - part))
        ends.append((at - part * width, at + (1 - part) * width))
    else:
        ends.append((last, first))
    return ((float(low), float(high)) for low, high in ends if 0 < low < high < math.inf)
