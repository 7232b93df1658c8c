"""Stop strings across token boundaries."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """A filter that passes text up to the first stop string, and never a part of one.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Append text and return what may be shown now; sets ``stopped`` where a stop string is complete."""
        if not self._stops:
            return text
        held = self._held + text
        matches = [start for stop in self._stops if (start := held.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return held[: min(matches)]
        # The longest end that begins a stop string is undecided.
        sizes = range(min(len(held), max(map(len, self._stops)) - 1), 0, -1)
        undecided = next((size for size in sizes if any(stop.startswith(held[-size:]) for stop in self._stops)), 0)
        self._held = held[len(held) - undecided :]
        return held[: len(held) - undecided]

    def flush(self) -> str:
        """Return the text that was held back, at the end."""
        held, self._held = self._held, ""
        return held
