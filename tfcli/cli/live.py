"""Progress of a run on stderr: a live screen on a terminal, plain lines everywhere else."""

from __future__ import annotations

import itertools
import sys
import unicodedata
from collections import deque
from typing import TYPE_CHECKING

from tfcli.cli.output import Ticker, note

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from tfcli.train.events import Evaluated, Event, Progress

BLOCKS = "▁▂▃▄▅▆▇█"


class PlainView:
    """Progress as a line at most every ten seconds, and every note, evaluation and sample."""

    def __init__(self) -> None:
        self._ticker = Ticker()

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        """Print what is due."""
        from tfcli.train.events import Evaluated, Note, Preparing, Progress, Sampled

        match event:
            case Note():
                note(event.text)
            case Preparing() if self._ticker.due():
                note(f"{event.stage}: {event.done / 1e6:,.1f} of {event.total / 1e6:,.1f} MB")
            case Progress() if self._ticker.due():
                note(_progress(event))
            case Evaluated():
                mark = " (best)" if event.best else ""
                note(f"step {event.step:,}: validation {event.value:.4f} {event.name}{mark}")
            case Sampled():
                note(f"sample: {' '.join(harmless(event.text).split())[:160]}")


class LiveView:
    """Progress, loss curve, speed, time left, memory, validation score and the latest sample, redrawn in place.

    The last frame stays on the screen. ``console`` is for tests.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._ended = False
        self._progress: Progress | None = None
        self._stage = ""
        self._losses: deque[float] = deque(maxlen=2000)
        self._scores: list[tuple[int, float]] = []
        self._score: Evaluated | None = None
        self._sample = ""
        self._live: Live | None = None

    def __enter__(self) -> LiveView:
        from rich.console import Console
        from rich.live import Live

        console = self._console or Console(stderr=True, highlight=False)
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._live is not None
        self._ended = True
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Record one event; the screen refreshes by itself."""
        from tfcli.train.events import Evaluated, Note, Preparing, Progress, Sampled

        assert self._live is not None
        match event:
            case Note():
                self._live.console.print(harmless(event.text), markup=False)
            case Preparing():
                share = event.done / max(1, event.total)
                self._stage = f"{event.stage} {event.done / 1e6:,.1f} of {event.total / 1e6:,.1f} MB ({share:.0%})"
            case Progress():
                self._progress = event
                self._stage = ""
                self._losses.append(event.train_loss)
            case Evaluated():
                self._score = event
                self._scores.append((event.step, event.value))
            case Sampled():
                self._sample = harmless(event.text)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self._progress is None:
            return Group() if self._ended else Text(self._stage or "starting", style="dim")
        p = self._progress
        assert self._live is not None
        width = min(100, self._live.console.width)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True, min_width=10)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=p.steps or 1, completed=p.step if p.steps else 0, width=max(1, width - 13))
        grid.add_row("progress", bar)
        grid.add_row("step", f"{p.step:,} of {p.steps:,}" if p.steps else f"{p.step:,} (measuring the speed)")
        left = f", {clock(p.seconds_left)} left" if p.seconds_left and not self._ended else ""
        grid.add_row("time", f"{clock(p.seconds)}{left}")
        grid.add_row("speed", f"{p.tokens_per_second:,.0f} tokens/s, peak memory {p.memory / 1e6:,.0f} MB")
        loss = f"{p.train_loss:.3f}  "
        grid.add_row("train loss", loss + spark(self._losses, width - 13 - len(loss)))
        if self._score is not None:
            pick = max if self._score.higher_is_better else min
            best_step, best = pick(self._scores, key=lambda pair: pair[1])
            score = f"{self._score.value:.4f} {self._score.name}; best {best:.4f} at step {best_step:,}"
            grid.add_row("validation", score)
        parts: list[RenderableType] = [grid]
        room = min(7, self._live.console.height - grid.row_count - 4)
        if self._sample and room > 0:
            text = Text(self._sample.strip("\n"), style="italic")
            parts.append(Panel(text, title="sample", title_align="left", width=width, height=room + 2))
        return Group(*parts)


def view() -> PlainView | LiveView:
    """Return the live screen if stderr is a terminal, else plain lines."""
    return LiveView() if sys.stderr.isatty() else PlainView()


def spark(values: deque[float] | list[float], width: int) -> str:
    """Draw a curve of at most ``width`` characters, the oldest value first."""
    if not values or width < 1:
        return ""
    items, count = list(values), min(width, len(values))
    edges = [at * len(items) // count for at in range(count + 1)]
    bins = [items[start:end] for start, end in itertools.pairwise(edges)]
    means = [sum(b) / len(b) for b in bins]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def harmless(text: str) -> str:
    """Replace control characters: generated text must not move the cursor or change colors."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def clock(seconds: float) -> str:
    """Format seconds as 1:23:45 or 2:05."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _progress(p: Progress) -> str:
    of = f" of {p.steps:,}" if p.steps else ""
    left = "" if p.seconds_left is None else f", {clock(p.seconds_left)} left"
    return f"step {p.step:,}{of}: loss {p.train_loss:.3f}, {p.tokens_per_second:,.0f} tokens/s{left}"
