"""Stop strings across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, and never a part of one.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown now; sets ``stopped`` where a stop string is complete."""
        if not self._stops:
            return text
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        cut = len(held) - self._undecided(held)
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, held: str) -> int:
        """Length of the longest end of ``held`` that a stop string begins with."""
        longest = min(len(held), max(map(len, self._stops)) - 1)
        return next(
            (size for size in range(longest, 0, -1) if any(stop.startswith(held[-size:]) for stop in self._stops)), 0
        )
