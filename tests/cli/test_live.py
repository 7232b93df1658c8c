"""How a run looks: on a terminal, and where there is none."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from tfcli.cli import output
from tfcli.cli.live import LiveView, PlainView, clock, harmless, spark, view
from tfcli.train.events import Evaluated, Event, Note, Preparing, Progress, Sampled, Saved


def progress(step: int, steps: int | None = 400, left: float | None = 65.0) -> Progress:
    return Progress(
        step=step,
        steps=steps,
        seconds=125.0,
        seconds_left=left,
        train_loss=6.0 - step / 100,
        lr=0.01,
        tokens_per_second=12_345.0,
        memory=300_000_000,
    )


RUN: list[Event] = [
    Note(text="device: cpu [bold]not markup[/bold]"),
    Preparing(stage="encode", done=2_000_000, total=5_000_000),
    *[progress(step) for step in range(10, 401, 10)],
    Evaluated(step=100, name="bits per byte", value=2.2863, best=True),
    Evaluated(step=400, name="bits per byte", value=2.7987, best=False),
    Sampled(step=400, text="廢難，莫身。\x1b[31mred\x07\n庭。"),
    Saved(step=400),
]


def shown(events: list[Event], width: int, height: int) -> str:
    """Return what stays on a terminal of that size, without escape sequences."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    screen = LiveView(console)
    with screen as listen:
        for event in events:
            listen(event)
        console.file.truncate(0)
        console.file.seek(0)
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "")


@pytest.mark.parametrize(("width", "height"), [(100, 30), (60, 20), (40, 12), (20, 6)])
def test_the_last_picture(width: int, height: int) -> None:
    """Catches a crash or wrapped lines on a small terminal, a score missing, and "0:00 left" at the end."""
    text = shown(RUN, width, height)
    assert "400 of 4" in text
    assert "left" not in text
    lines = text.strip("\n").splitlines()
    assert len(lines) <= height
    from rich.cells import cell_len

    assert max(map(cell_len, lines)) <= width
    assert ("庭。" in text) == (height >= 12), "the sample goes first where there is no room"
    if width >= 60:
        assert "12,345 tokens/s, peak memory 300 MB" in text
        assert "2.7987 bits per byte; best 2.2863 at step 100" in text
        assert "█" in text and "▁" in text


def test_before_training() -> None:
    """Catches "starting" left on the screen above an error message."""
    assert shown([], 80, 24).strip() == ""
    assert shown([Preparing(stage="scan", done=1, total=2)], 80, 24).strip() == ""


def test_stages_and_unsettled_lengths() -> None:
    """Catches a division by nothing while the length or a total is not known."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    with LiveView(console) as listen:
        listen(Preparing(stage="encode", done=2_000_000, total=5_000_000))
        console.print(listen._render())
        listen(Preparing(stage="scan", done=0, total=0))
        console.print(listen._render())
        listen(progress(3, None, None))
        console.print(listen._render())
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "encode 2.0 of 5.0 MB (40%)" in text
    assert "3 (measuring the speed)" in text


def test_notes_stay_above(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches notes that are drawn over, or read as markup."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    with LiveView(console) as listen:
        for event in RUN:
            listen(event)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "[bold]not markup[/bold]" in text
    assert text.index("not markup") < text.rindex("400 of 400")


def test_a_sample_cannot_steer_the_terminal() -> None:
    """Catches escape sequences that a byte-level model makes up."""
    assert harmless("a\x1b[31mb\x07\tc\nd　é") == "a\ufffd[31mb\ufffd\tc\nd　é"
    assert "\x1b[31m" not in shown(RUN, 100, 30)


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a log flooded with progress, anything on stdout, and an evaluation that is held back."""
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    with PlainView() as listen:
        for event in RUN:
            now[0] += 1.0
            listen(event)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert sum(" tokens/s" in line for line in lines) == 4, "in 40 seconds"
    assert lines[0].startswith("device:")
    assert not any(line.startswith("encode") for line in lines), "it took less than ten seconds"
    assert sum(line.startswith("step") and "of 400: loss" in line for line in lines) == 4
    assert "step 100: validation 2.2863 bits per byte (best)" in lines
    assert "step 400: validation 2.7987 bits per byte" in lines
    assert "\x1b" not in err
    assert "莫身" in lines[-1]


def test_tables_are_aligned_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    head, rows = ("a", "bb"), [("1", "x|y"), ("222", "")]
    output.show_table(head, rows)
    assert capsys.readouterr().out.splitlines() == ["a    bb", "1    x|y", "222"]
    output.show_table(head, rows, numbers=True)
    assert capsys.readouterr().out.splitlines() == ["a     bb", "1    x|y", "222"]


def test_which_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a live screen written into a file."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(view(), PlainView)


def test_sparks() -> None:
    """Catches a curve that is too wide, upside down, or divides by zero."""
    assert spark([3.0, 2.0, 1.0], 10) == "█▄▁" or spark([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert len(spark([float(i) for i in range(2000)], 30)) == 30
    assert spark([1.0, 1.0], 5) == "▁▁"
    assert spark([], 5) == spark([1.0], 0) == spark([1.0], -3) == ""


def test_clock() -> None:
    """Catches 60 seconds shown as 0:60."""
    assert [clock(s) for s in (0, 59.6, 125, 3600, 86_399)] == ["0:00", "1:00", "2:05", "1:00:00", "23:59:59"]
