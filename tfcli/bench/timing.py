"""Timing that can be trusted: warm up until steady, repeat, and report a median with its interval.

Knows nothing of models or devices: the work, the clock and what waits for the device are passed in.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

STEADY = 0.03
"""Warm while a call beats the fastest before it by more than this share."""
NOISY = 0.10
"""An interval wider than this share of the median is worth a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of each repeat of some work, in order, and how it was warmed up."""

    seconds: tuple[float, ...]
    warmups: int
    """Calls before the first repeat."""
    steady: bool
    """Whether warming up ended because calls stopped getting faster, not because it took too long."""

    @property
    def median(self) -> float:
        """The middle repeat, in seconds; unlike the mean, one hiccup does not move it."""
        return statistics.median(self.seconds)

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds between which the median lies with 95 % confidence; see ``median_interval``."""
        return median_interval(self.seconds)

    @property
    def spread(self) -> float:
        """Width of the interval as a share of the median."""
        low, high = self.interval
        return (high - low) / self.median if self.median else 0.0

    @property
    def noisy(self) -> bool:
        """Whether the spread is too wide to tell small differences."""
        return self.spread > NOISY or not self.steady


def measure(
    work: Callable[[], object],
    *,
    repeats: int,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    max_warmups: int = 20,
    max_warmup_seconds: float = 20.0,
) -> Timing:
    """Time ``repeats`` calls of ``work``, after warm-up calls until two in a row are no faster than what was.

    "No faster" is not beating the fastest so far by more than 3 %. Warming up also ends after ``max_warmups`` calls or
    ``max_warmup_seconds``. ``synchronize`` waits for the device and is called before each reading of the clock.
    """

    def once() -> float:
        synchronize()
        start = clock()
        work()
        synchronize()
        return clock() - start

    fastest = spent = once()
    warmups, settled = 1, 0
    while settled < 2 and warmups < max_warmups and spent < max_warmup_seconds:
        taken = once()
        settled = settled + 1 if taken > fastest * (1 - STEADY) else 0
        fastest = min(fastest, taken)
        warmups, spent = warmups + 1, spent + taken
    return Timing(seconds=tuple(once() for _ in range(repeats)), warmups=warmups, steady=settled >= 2)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The narrowest pair of order statistics around the median that holds it with ``confidence``.

    Assumes nothing of the distribution: a value is below the median with probability 1/2, so that the number of them
    below it is binomial (Conover 1999, 3.2). Fewer than six values cannot reach 95 %: then it is their whole range.
    Raises ValueError without values.
    """
    ordered, n = sorted(values), len(values)
    if not n:
        raise ValueError("no values")
    # Leaving out k values at each end loses the median with probability 2 P(Binomial(n, 1/2) <= k).
    k, below = 0, 2 * 0.5**n
    while below + 2 * math.comb(n, k + 1) * 0.5**n <= 1 - confidence:
        k += 1
        below += 2 * math.comb(n, k) * 0.5**n
    return ordered[k], ordered[n - 1 - k]
