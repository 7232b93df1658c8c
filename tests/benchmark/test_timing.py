"""Timing with a clock that only the work advances."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfcli.benchmark.timing import Once, Timing, contention, in_turn, measure, median_interval, others_running, watch


class Clock:
    """A clock advanced only by the work, which takes the given durations and then repeats the last one."""

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

    def once(self) -> float:
        return watch(self.work, clock=self, synchronize=self.synchronize)


def test_warms_up_until_calls_stop_getting_faster() -> None:
    clock = Clock(10.0, 5.0, 2.0, 1.0, 1.0, 1.0, 1.5, 3.0, 2.0)
    timing = measure(clock.once, repeats=3)
    # 1.0 is the fastest; the next two are not faster: six warm-up calls, then what is timed.
    assert timing.warmups == 6 and timing.steady
    assert timing.seconds == (1.5, 3.0, 2.0)
    assert timing.median == 2.0
    assert clock.calls == 9


def test_one_slow_call_does_not_end_the_warm_up() -> None:
    clock = Clock(4.0, 5.0, 2.0, 2.0, 2.0, 7.0)
    timing = measure(clock.once, repeats=1)
    assert timing.warmups == 5 and timing.seconds == (7.0,)


def test_warm_up_is_bounded_and_says_so() -> None:
    clock = Clock(*(0.9**i for i in range(99)))
    timing = measure(clock.once, repeats=2, max_warmups=5)
    assert timing.warmups == 5 and not timing.steady and timing.noisy
    clock = Clock(*(100 * 0.5**i for i in range(99)))
    assert measure(clock.once, repeats=2, max_warmup_seconds=60).warmups == 3  # 100 (not counted), 50, 25


def test_a_first_call_that_compiles_does_not_use_up_the_warm_up() -> None:
    clock = Clock(60.0, 2.0, 1.0)
    timing = measure(clock.once, repeats=2)
    assert timing.steady and timing.seconds == (1.0, 1.0)


def test_a_long_call_is_warm_after_two() -> None:
    """Catches twenty warm-up calls of half a minute, and a warning for nothing."""
    clock = Clock(30.0)
    timing = measure(clock.once, repeats=2)
    assert timing.warmups == 2 and timing.steady


@pytest.mark.parametrize(
    ("seconds", "repeats", "turns"), [(1.0, 15, 15), (13.0, 15, 5), (13.0, 4, 4), (61.0, 15, 3), (61.0, 2, 2)]
)
def test_long_turns_are_fewer(seconds: float, repeats: int, turns: int) -> None:
    """Five turns if they take a minute together, three if each does."""
    assert len(measure(Clock(seconds).once, repeats=repeats).seconds) == turns


def test_sides_take_turns_after_each_is_warm() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> Once:
        def once() -> float:
            order.append(name)
            return seconds

        return once

    ours, theirs = in_turn([side("a", 1.0), side("b", 2.0)], repeats=3, rest=lambda: order.append("rest"))
    assert order == ["a"] * 3 + ["b"] * 3 + ["rest", "a", "rest", "b"] * 3
    assert ours.seconds == (1.0,) * 3 and theirs.seconds == (2.0,) * 3


def test_waits_for_the_device_around_each_call() -> None:
    clock = Clock(1.0)
    measure(clock.once, repeats=4)
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


def test_other_processes_are_those_beside_this_one(tmp_path: Path) -> None:
    loadavg = tmp_path / "loadavg"
    loadavg.write_text("0.5 0.4 0.3 4/321 777\n")
    looks: list[None] = []
    assert others_running(5, loadavg=loadavg, pause=lambda: looks.append(None)) == 3 and len(looks) == 5
    loadavg.write_text("0.5 0.4 0.3 1/321 777\n")
    assert others_running(loadavg=loadavg, pause=lambda: None) == 0
    assert others_running(loadavg=tmp_path / "none", pause=lambda: None) == 0


def test_contention_is_too_few_processors_for_all() -> None:
    assert contention(0, 2, processors=2) is None and contention(6, 2, processors=8) is None
    assert "1 other process wants" in (contention(1, 2, processors=2) or "")
    assert "7 other processes want" in (contention(7, 2, processors=8) or "")
