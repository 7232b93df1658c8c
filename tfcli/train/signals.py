"""Ctrl-C and SIGTERM: stop at once while nothing is lost, and after saving while a model is trained."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    """The signals of a run so far; calling it returns whether to save and stop."""

    asked: bool = False
    gentle: bool = False
    """True if the first signal only asks to stop; the second, or any before this is set, raises KeyboardInterrupt."""

    def __call__(self) -> bool:
        return self.asked

    def handle(self, number: int, frame: object) -> None:
        """Handle either signal."""
        again, self.asked = self.asked, True
        if again or not self.gentle:
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handle both signals inside the block; only in the main thread, which owns them.

    A signal whose handler was not set from Python is left alone, because Python could not restore that.
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
            raise KeyboardInterrupt from None  # a library in between took it for its own failure
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
