"""Bootstrap confidence intervals of scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

SEED = 0
"""Seed of the draws: the same in every run, so that runs compare."""
DRAWS, AT_ONCE = 1000, 50
"""Resamples of a bootstrap, and how many are summed at once."""


def interval(
    columns: npt.NDArray[np.float64], value: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> list[float]:
    """Return the 95 % percentile bootstrap interval (Efron 1979) of a score over examples; deterministic.

    ``columns`` (N, K) hold K numbers of each example; ``value`` gives the scores (draws,) of sums (draws, K).
    """
    draw, size = np.random.default_rng(SEED), len(columns)
    scores: list[npt.NDArray[np.float64]] = []
    for _ in range(DRAWS // AT_ONCE):
        times = [np.bincount(draw.integers(0, size, size), minlength=size) for _ in range(AT_ONCE)]
        scores.append(value(np.stack(times) @ columns))
    low, high = np.percentile(np.concatenate(scores), [2.5, 97.5])
    return [float(low), float(high)]
