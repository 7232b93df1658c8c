"""bench/timing.py with a clock that the work itself moves."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfcli.bench.timing import Timing, measure, median_interval


class Clock:
    """A clock that stands still but for the work, which takes the durations it was given, then the last again."""

    def __init__(self, *durations: float) -> None:
        self.now = 0.0
        self.calls = 0
        self.synchronized = 0
        self._durations = self._all(durations)

    @staticmethod
    def _all(durations: tuple[float, ...]) -> Iterator[float]:
        yield from durations
        while True:
            yield durations[-1]

    def __call__(self) -> float:
        return self.now

    def work(self) -> None:
        self.calls += 1
        self.now += next(self._durations)

    def synchronize(self) -> None:
        self.synchronized += 1


def test_warms_up_until_calls_stop_getting_faster() -> None:
    clock = Clock(10.0, 5.0, 2.0, 1.0, 1.0, 1.0, 1.5, 3.0, 2.0)
    timing = measure(clock.work, repeats=3, clock=clock)
    # 1.0 is the fastest; the next two are not faster: six warm-up calls, then what is timed.
    assert timing.warmups == 6 and timing.steady
    assert timing.seconds == (1.5, 3.0, 2.0)
    assert timing.median == 2.0
    assert clock.calls == 9


def test_one_slow_call_does_not_end_the_warm_up() -> None:
    clock = Clock(4.0, 5.0, 2.0, 2.0, 2.0, 7.0)
    timing = measure(clock.work, repeats=1, clock=clock)
    assert timing.warmups == 5 and timing.seconds == (7.0,)


def test_warm_up_is_bounded_and_says_so() -> None:
    clock = Clock(*(0.9**i for i in range(99)))
    timing = measure(clock.work, repeats=2, clock=clock, max_warmups=5)
    assert timing.warmups == 5 and not timing.steady and timing.noisy
    clock = Clock(*(100 * 0.5**i for i in range(99)))
    assert measure(clock.work, repeats=2, clock=clock, max_warmup_seconds=120).warmups == 2


def test_waits_for_the_device_around_each_call() -> None:
    clock = Clock(1.0)
    measure(clock.work, repeats=4, clock=clock, synchronize=clock.synchronize)
    assert clock.synchronized == 2 * clock.calls


@pytest.mark.parametrize(
    ("count", "left_out"),
    # Tables of the sign test: the confidence interval of a median leaves out k values at each end.
    [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (20, 5), (25, 7), (100, 39)],
)
def test_interval_is_the_sign_tests(count: int, left_out: int) -> None:
    values = [float(i) for i in range(count)]
    random.Random(0).shuffle(values)
    assert median_interval(values) == (left_out, count - 1 - left_out)


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    random_ = random.Random(1)
    hits = 0
    for _ in range(1000):
        low, high = median_interval([random_.lognormvariate(0.0, 1.0) for _ in range(15)])
        hits += low <= 1.0 <= high
    assert hits >= 930  # 96.5 % are expected of 15 values; 930 is six deviations below


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40))
def test_interval_surrounds_the_median(values: list[float]) -> None:
    low, high = median_interval(values)
    assert min(values) <= low <= statistics.median(values) <= high <= max(values)


def test_interval_needs_values() -> None:
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_noise_is_a_wide_interval() -> None:
    quiet = Timing(seconds=(1.0, 1.01, 1.02), warmups=3, steady=True)
    assert quiet.spread == pytest.approx(0.02 / 1.01) and not quiet.noisy
    assert Timing(seconds=(1.0, 1.0, 1.2), warmups=3, steady=True).noisy
