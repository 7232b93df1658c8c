"""A unit of work, timed alternately with other ways to do it, and the resulting figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from tfcli.benchmark.peers import SUITES, Peer
from tfcli.benchmark.timing import Once, Timing, in_turn, watch

if TYPE_CHECKING:
    from tfcli.runtime import Runtime

REST = 0.2
"""Seconds before each turn of two processes, so that the threads of the last one fall asleep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Another way to do a case's work, timed in turn with it."""

    name: str
    once: Once
    about: Callable[[], Mapping[str, Any]]
    """Returns what it is and whether it gave the same result; called after all timing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Work ready to be timed, and how much one call of it does."""

    start: Callable[[], Callable[[], object]]
    """Untimed preparation of a call; returns the work to time."""
    amount: float | None
    """Units done by one call; None if the figure is the seconds themselves."""
    unit: str
    what: str
    """The setting in words."""
    flops: float | None = None
    bytes: float | None = None
    """Bytes that must move through memory, if that is the limit."""
    ids: Sequence[int] = ()
    """The tokens that it generates, to compare peers with."""
    beside: tuple[Side, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A figure that is not a time; each call of ``read`` measures it again and returns it with its details."""

    read: Callable[[], tuple[float, Mapping[str, Any]]]
    unit: str
    what: str
    repeats: int
    """Calls that are enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The times of another side and its description of itself."""

    name: str
    timing: Timing
    about: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One suite's figure: the rate of ``amount`` per call or, if that is None, the median of the repeats."""

    suite: str
    what: str
    unit: str
    amount: float | None
    timing: Timing
    """The repeats in seconds; for a ``Reading``, in its own unit."""
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    peak_memory: int = 0
    against: tuple[Comparison, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def figures(self, timing: Timing) -> tuple[float, float, float]:
        """Return the median of a side's times and the bounds of its 95 % interval, in ``unit``."""
        low, high = timing.interval
        if self.amount is None:
            return timing.median, low, high
        return self.amount / timing.median, self.amount / high, self.amount / low

    @property
    def value(self) -> float:
        """The median, in ``unit``."""
        return self.figures(self.timing)[0]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the median, in ``unit``."""
        return self.figures(self.timing)[1:]


def timed(suite: str, case: Case, runtime: Runtime, *, repeats: int, peers: Sequence[Peer] = ()) -> Result:
    """Time a case, its other sides and the peers that run the suite, in turn.

    Peak memory is the device's or, if it has none of its own, the process's so far.
    """
    seconds = stopwatch(runtime)
    theirs = [_side(suite, case.ids, peer) for peer in peers if suite in SUITES]
    sides = [*case.beside, *theirs]
    timing, *others = in_turn(
        [lambda: seconds(case.start()), *(side.once for side in sides)],
        repeats=repeats,
        rest=(lambda: time.sleep(REST)) if theirs else (lambda: None),
    )
    return Result(
        suite=suite,
        what=case.what,
        unit=case.unit,
        amount=case.amount,
        timing=timing,
        flops_per_second=case.flops / timing.median if case.flops else None,
        bytes_per_second=case.bytes / timing.median if case.bytes else None,
        peak_memory=runtime.peak_memory(),
        against=tuple(
            Comparison(name=side.name, timing=their_timing, about=side.about())
            for side, their_timing in zip(sides, others, strict=True)
        ),
        details=case.details,
    )


def taken(suite: str, reading: Reading, *, repeats: int) -> Result:
    """Repeat a reading; the details, which include ``peak_bytes``, are those of the last repeat."""
    values, details = zip(*(reading.read() for _ in range(min(repeats, reading.repeats))), strict=True)
    return Result(
        suite=suite,
        what=reading.what,
        unit=reading.unit,
        amount=None,
        timing=Timing(seconds=values, warmups=0, steady=True),
        peak_memory=max(each["peak_bytes"] for each in details),
        details=details[-1],
    )


def stopwatch(runtime: Runtime) -> Callable[[Callable[[], object]], float]:
    """Return the function that times a call on the runtime's device: by CUDA events, elsewhere by the clock."""
    import torch

    if runtime.device.type != "cuda":
        return lambda work: watch(work, synchronize=runtime.synchronize)

    def by_events(work: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        runtime.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    return by_events


def _side(suite: str, ours: Sequence[int], peer: Peer) -> Side:
    """Return a peer that continues the prompt as far as we do, and how many of its first tokens are the same."""

    def once() -> float:
        first, rest = peer.run(len(ours))
        return first if suite == "prefill" else rest

    def about() -> Mapping[str, Any]:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, peer.ids, strict=False)))
        return {**peer.about, "same_tokens": same, "of_tokens": len(ours)}

    return Side(name=peer.name, once=once, about=about)
