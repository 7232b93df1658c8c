"""Progress in a notebook: one bar, drawn once and then updated in place."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable
from typing import Any

from tfcli.train.events import Evaluated, Event, Listener, Note, Preparing, Progress


def listener() -> Listener:
    """The default listener of a run: a progress bar in a notebook, nothing elsewhere."""
    return _Bar() if _in_notebook() else lambda event: None


def counter(what: str) -> Callable[[int, int], None]:
    """A callback for (done, total) tokens or texts: a progress bar in a notebook, nothing elsewhere."""
    if not _in_notebook():
        return lambda done, total: None
    bar = _Bar()
    return lambda done, total: bar.show(done, total, f"{done:,} of {total:,} {what}" if total else f"{done:,} {what}")


def notes() -> Callable[[str], None]:
    """A callback for notes: in a notebook it shows the last one next to a bar, elsewhere nothing."""
    if not _in_notebook():
        return lambda line: None
    bar = _Bar()
    return lambda line: bar.show(0, 0, line)


def _in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook; IPython in a terminal is not."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


class _Bar:
    """A listener that shows the progress of a run, its speed, its time left and its last score."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._score = ""
        self._note = ""
        self._handle = display(HTML(_bar(0, 1, "starting")), display_id=True)

    def __call__(self, event: Event) -> None:
        match event:
            case Note():
                self._note = event.text
                self.show(0, 1, self._note)
            case Preparing():
                self.show(event.done, event.total, f"{event.stage}: {event.done / 1e6:,.1f} MB")
            case Evaluated():
                self._score = f", {event.name} {event.value:.4f} held out"
            case Progress():
                left = "" if event.seconds_left is None else f", {event.seconds_left:,.0f} s left"
                speed = f"loss {event.train_loss:.3f}, {event.tokens_per_second:,.0f} tokens/s"
                self.show(event.step, event.steps or 0, f"step {event.step:,}: {speed}{self._score}{left}")

    def show(self, done: int, total: int, text: str) -> None:
        """Redraw with ``done`` of ``total`` (0: unknown) and a line of text."""
        self._handle.update(self._html(_bar(done, total, text)))


def _bar(done: int, total: int, text: str) -> str:
    share = f' value="{done}" max="{total}"' if total else ""  # without a value it is indeterminate
    return f"<progress{share}></progress> {html.escape(text)}"
