"""Ctrl-C and SIGTERM: at once while nothing is lost by it, after saving while a model is trained."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    """What the signals of a run have asked for so far; call it to know whether to save and stop."""

    asked: bool = False
    gentle: bool = False
    """Whether the first signal only asks; the second, or any before this is set, raises KeyboardInterrupt."""

    def __call__(self) -> bool:
        return self.asked

    def handle(self, number: int, frame: object) -> None:
        """The handler of both signals."""
        again, self.asked = self.asked, True
        if again or not self.gentle:
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Listen to both signals; outside the main thread whoever owns it owns the signals, and nothing ever asks.

    Neither does a signal whose handler was not set from Python, because Python could not put that back.
    """
    stop = Stop()
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    try:
        before = {number: signal.signal(number, stop.handle) for number in numbers}
    except ValueError:
        yield stop
        return
    try:
        yield stop
    except Exception:
        if stop.asked and not stop.gentle:
            raise KeyboardInterrupt from None  # a library in between took it for a failure of its own
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
