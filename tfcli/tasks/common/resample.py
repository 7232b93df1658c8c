"""What is drawn of labelled examples: the part that is held out, and resamples that say how sure a score is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tfcli.tasks.common.report import Report

Item = TypeVar("Item")
SEED = 0
"""What is drawn does not change with the seed of a run, so that runs compare."""
DRAWS, AT_ONCE = 1000, 50
"""Resamples of a bootstrap, and how many of them are summed together."""


def split(groups: Sequence[Hashable], fraction: float, report: Report | None = None) -> tuple[list[int], list[int]]:
    """Indices of the training and the held-out part of examples, those of one group on the same side.

    Whole groups are drawn at random until the held-out part is closest to ``fraction`` of the examples. Raises
    UserError where there is but one group, with what the ``report`` of the data says.
    """
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    names = list(sizes)
    if len(names) < 2:
        said = "the data has nothing that could be held out"
        raise (report or Report()).too_few(said, hint="give more of it, or a file with --val")
    want = fraction * len(groups)
    chosen: set[Hashable] = set()
    held = 0
    for place in np.random.default_rng(SEED).permutation(len(names)):
        group = names[place]
        if not chosen or (len(chosen) < len(names) - 1 and abs(held + sizes[group] - want) < abs(held - want)):
            chosen.add(group)
            held += sizes[group]
    return (
        [index for index, group in enumerate(groups) if group not in chosen],
        [index for index, group in enumerate(groups) if group in chosen],
    )


def halves(
    items: Sequence[Item], groups: Sequence[Hashable], fraction: float, report: Report
) -> tuple[list[Item], list[Item]]:
    """The training and the held-out part of ``items``; ``groups`` (one each) and the others as for ``split``."""
    train, held_out = split(groups, fraction, report)
    return [items[index] for index in train], [items[index] for index in held_out]


def interval(
    columns: npt.NDArray[np.float64], value: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> list[float]:
    """The 95 % percentile bootstrap interval (Efron 1979) of a score over examples, the same one every time.

    ``columns`` (N, K) hold K numbers of each example; ``value`` gives the scores (draws,) of sums (draws, K).
    """
    draw, size = np.random.default_rng(SEED), len(columns)
    found: list[npt.NDArray[np.float64]] = []
    for _ in range(DRAWS // AT_ONCE):
        times = [np.bincount(draw.integers(0, size, size), minlength=size) for _ in range(AT_ONCE)]
        found.append(value(np.stack(times) @ columns))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return [float(low), float(high)]
