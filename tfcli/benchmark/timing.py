"""Reliable timing: warm up until steady, repeat in turn, and report a median with its interval.

Knows nothing of models or devices: the work, the clock and the wait for the device are passed in.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Once = Callable[[], float]
"""Does some work once and returns the seconds it took."""
STEADY = 0.03
"""Not warm yet while a call is faster than all before it by more than this share."""
NOISY = 0.10
"""An interval wider than this share of the median gives a warning."""
LONG = 60.0
"""Seconds after which five turns are enough, or three if a single call takes that long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of each repeat of some work, in order, and how it was warmed up."""

    seconds: tuple[float, ...]
    warmups: int
    """Calls before the first repeat."""
    steady: bool
    """True if warming up ended because calls stopped getting faster, False if it took too long."""

    @property
    def median(self) -> float:
        """The median in seconds; unlike the mean, it is robust to outliers."""
        return statistics.median(self.seconds)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the median, in seconds; see ``median_interval``."""
        return median_interval(self.seconds)

    @property
    def spread(self) -> float:
        """The width of the interval as a share of the median."""
        low, high = self.interval
        return (high - low) / self.median if self.median else 0.0

    @property
    def noisy(self) -> bool:
        """True if the spread is too wide to detect small differences."""
        return self.spread > NOISY or not self.steady


def watch(
    work: Callable[[], object],
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds of one call of ``work``; ``synchronize`` waits for the device before each clock reading."""
    synchronize()
    start = clock()
    work()
    synchronize()
    return clock() - start


def measure(once: Once, *, repeats: int, max_warmups: int = 20, max_warmup_seconds: float = 10.0) -> Timing:
    """Time one side; see ``in_turn``."""
    return in_turn([once], repeats=repeats, max_warmups=max_warmups, max_warmup_seconds=max_warmup_seconds)[0]


def in_turn(
    sides: Sequence[Once],
    *,
    repeats: int,
    max_warmups: int = 20,
    max_warmup_seconds: float = 10.0,
    rest: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Warm up every side, then time one call of each in turn, ``repeats`` times, so that all see the same conditions.

    A side is warm after two calls in a row that are not more than 3 % faster than all before. Warming up also ends
    after ``max_warmups`` calls or ``max_warmup_seconds``; the first call, which may compile, does not count. ``rest``
    is called before each timed call. After a minute in total, five turns are enough, or three if a single call takes
    that long.
    """
    warmed = [_warm(side, max_warmups, max_warmup_seconds) for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    spent = longest = 0.0
    for turn in range(repeats):
        if spent > LONG and turn >= (3 if longest > LONG else 5):
            break
        for side, taken in zip(sides, seconds, strict=True):
            rest()
            taken.append(side())
            spent, longest = spent + taken[-1], max(longest, taken[-1])
    return [
        Timing(seconds=tuple(taken), warmups=warmups, steady=steady)
        for taken, (warmups, steady) in zip(seconds, warmed, strict=True)
    ]


def _warm(once: Once, most: int, seconds: float) -> tuple[int, bool]:
    """Return the number of warm-up calls and whether the times became steady."""
    fastest = once()
    warmups, settled, spent = 1, 0, 0.0
    while settled < 2 and warmups < most and spent < seconds:
        taken = once()
        settled = settled + 1 if taken > fastest * (1 - STEADY) else 0
        fastest = min(fastest, taken)
        warmups, spent = warmups + 1, spent + taken
    return warmups, settled > 0


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the narrowest pair of order statistics that contains the median with ``confidence``.

    It is distribution-free: a value is below the median with probability 1/2, so the number of values below it is
    binomial (Conover 1999, 3.2). Fewer than six values cannot reach 95 %; the interval is then their whole range.
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


def others_running(
    looks: int = 9, *, loadavg: Path = Path("/proc/loadavg"), pause: Callable[[], None] = lambda: time.sleep(0.02)
) -> int:
    """Count other runnable processes: the median of a few samples; 0 if the system does not report them."""
    counts = []
    for _ in range(looks):
        try:
            counts.append(int(loadavg.read_text().split()[3].partition("/")[0]) - 1)  # less this process
        except (OSError, ValueError, IndexError):
            return 0
        pause()
    return max(0, int(statistics.median(counts)))


def contention(others: int, threads: int, processors: int | None = None) -> str | None:
    """Return a warning if ``others`` running processes leave too few processors for ``threads``, else None."""
    processors = processors or os.cpu_count() or 1
    if others + threads <= processors:
        return None
    return (
        f"{others} other process{'es want' if others > 1 else ' wants'} a processor now, and {threads} of {processors} "
        "are to be measured: figures will be lower than on a quiet machine, and less certain"
    )
