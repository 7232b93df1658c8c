"""Windows over the ids of one text, cut at other places in every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Seeded = tuple[npt.NDArray[Any], tuple[int, ...]]
"""Ids of a window, and its seed."""


def starts(
    indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64], *, tokens: int, size: int, step: int
) -> npt.NDArray[np.int64]:
    """Return the starts of the windows at ``indices`` (of ``size`` in an epoch), ``step`` ids apart.

    Each epoch has an offset of its own, by the golden ratio.
    """
    room = tokens - size * step  # so that the last token has its turn
    offsets = (epochs * 0.6180339887498949 % 1.0 * room).astype(np.int64)
    return offsets + indices * step


def seeded(
    ids: npt.NDArray[Any],
    indices: npt.NDArray[np.int64],
    epochs: npt.NDArray[np.int64],
    *,
    size: int,
    step: int,
    seed: int,
) -> list[Seeded]:
    """Return the windows at ``indices``, each with a seed that depends on ``seed``, the epoch and the window alone."""
    first = starts(indices, epochs, tokens=len(ids), size=size, step=step)
    return [
        (ids[start : start + step], (seed % 2**64, 1 + int(epoch), int(index)))
        for start, epoch, index in zip(first, epochs, indices, strict=True)
    ]
