"""Timing that can be trusted: warm up until steady, repeat in turn, and report a median with its interval.

Knows nothing of models or devices: what is timed, the clock and what waits for the device are passed in.
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
"""Does some work once and returns the seconds that it took."""
STEADY = 0.03
"""Warm while a call beats the fastest before it by more than this share."""
NOISY = 0.10
"""An interval wider than this share of the median is worth a warning."""
LONG = 60.0
"""Seconds after which five turns are enough, and of a turn of which three are."""


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


def watch(
    work: Callable[[], object],
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one call of ``work``; ``synchronize`` waits for the device before each reading of the clock."""
    synchronize()
    start = clock()
    work()
    synchronize()
    return clock() - start


def measure(once: Once, *, repeats: int, max_warmups: int = 20, max_warmup_seconds: float = 10.0) -> Timing:
    """``in_turn`` of one side."""
    return in_turn([once], repeats=repeats, max_warmups=max_warmups, max_warmup_seconds=max_warmup_seconds)[0]


def in_turn(
    sides: Sequence[Once],
    *,
    repeats: int,
    max_warmups: int = 20,
    max_warmup_seconds: float = 10.0,
    rest: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Warm every side up, then time one call of each in turn, ``repeats`` times, so that all meet the same weather.

    A side is warm after two calls in a row that do not beat the fastest so far by more than 3 %. Warming up also ends
    after ``max_warmups`` calls or ``max_warmup_seconds``; the first call, which may compile, does not count to these.
    ``rest`` is called before each timed call. Once all turns took a minute, five of them are enough, or three
    where a single one takes that long.
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
    """Calls until steady, and whether it became so."""
    fastest = once()
    warmups, settled, spent = 1, 0, 0.0
    while settled < 2 and warmups < most and spent < seconds:
        taken = once()
        settled = settled + 1 if taken > fastest * (1 - STEADY) else 0
        fastest = min(fastest, taken)
        warmups, spent = warmups + 1, spent + taken
    return warmups, settled > 0


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


def others_running(
    looks: int = 9, *, loadavg: Path = Path("/proc/loadavg"), pause: Callable[[], None] = lambda: time.sleep(0.02)
) -> int:
    """How many other processes want a processor now: the median of a few looks; 0 where the system does not tell."""
    found = []
    for _ in range(looks):
        try:
            found.append(int(loadavg.read_text().split()[3].partition("/")[0]) - 1)  # this process runs too
        except (OSError, ValueError, IndexError):
            return 0
        pause()
    return max(0, int(statistics.median(found)))


def contention(others: int, threads: int, processors: int | None = None) -> str | None:
    """What is wrong in words where ``others`` running processes leave too few processors for ``threads``."""
    processors = processors or os.cpu_count() or 1
    if others + threads <= processors:
        return None
    return (
        f"{others} other process{'es want' if others > 1 else ' wants'} a processor now, and {threads} of {processors} "
        "are to be measured: figures will be lower than on a quiet machine, and less certain"
    )
