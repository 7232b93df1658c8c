"""tfcli bench: how fast this machine tokenizes, trains, reads prompts and generates, with intervals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfcli.config import PretrainConfig, resolve
from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.bench.subject import Subject
    from tfcli.runtime import Runtime

PRESET = "small"


def bench(
    model: Annotated[str | None, typer.Option("--model", help="A model directory; else random weights.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", show_default=PRESET, help="Shape of random weights.")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="Blocks of random weights.")] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", show_default="all", help="tokenize, decode, prefill, train; with commas or repeated."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Text for the tokenizer; else made-up words.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, show_default="as pretrain's", help="Rows of a training step.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed calls of each suite.")] = 15,
    compare: Annotated[
        Path | None, typer.Option("--compare", help="Earlier results (--json); exit code 1 if one is slower.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, help="Share slower that --compare lets pass.")
    ] = 0.05,
    device: Annotated[str | None, typer.Option("--device", show_default="auto", help="cuda, mps or cpu.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", show_default="auto", help="fp32 or bf16.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", show_default="all cores", help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a suite.")] = False,
) -> None:
    """Measure speed and memory, with intervals.

    Each suite (tokenize, decode, prefill, train) is warmed up until two calls in a row are no faster than the fastest
    before them, then timed --repeats times; figures are medians with 95 % intervals. "Of peak" is the share of what a
    large matrix product and a large read reach here and now; a model that fits into the processor's cache can exceed
    the latter. Training is measured without torch.compile.

    Example: tfcli bench --depth 4 --suite train,decode
    """
    from tfcli.bench import report, suites
    from tfcli.runtime import Runtime

    names = suites.chosen(suite or [])
    earlier = report.read(compare) if compare else None
    runtime = Runtime.detect(device=device, precision=precision, threads=threads)
    _note(f"device: {runtime.describe()}")
    subject = _subject(model, preset, depth, file, batch_size, runtime)
    results = []
    for result in suites.run(names, subject, runtime, repeats=repeats, on_start=lambda name: _note(f"{name} ...")):
        results.append(result)
        if result.timing.noisy:
            _note(f"warning: {report.noise(result)}")
    # Last, for a large product and a large tensor would be the peak of the process's memory.
    peak = suites.ceilings(runtime) if names != ["tokenize"] else None
    machine, about = report.fingerprint(runtime), report.about(subject)
    lines = [report.to_json(result, peak, machine, about) for result in results]
    if as_json:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))
    else:
        typer.echo(report.heading(machine, about, peak))
        _table(report.HEAD, [report.row(line) for line in lines])
    if earlier is not None:
        _compare(earlier, lines, tolerance, as_json)


def _subject(
    model: str | None,
    preset: str | None,
    depth: int | None,
    file: Path | None,
    batch_size: int | None,
    runtime: Runtime,
) -> Subject:
    from tfcli.bench import subject

    if model is not None and (preset or depth):
        raise UserError("--model has a shape of its own", hint="leave --preset and --depth out")
    text = subject.read_text(file) if file else None
    if model is not None:
        return subject.from_directory(Path(model), runtime, text=text, batch_size=batch_size)
    config, _ = resolve(
        PretrainConfig, preset=preset or PRESET, flags={"model.depth": depth, "train.batch_size": batch_size}
    )
    name = f"random weights, {preset or PRESET}" + (f", depth {depth}" if depth else "")
    return subject.from_config(config, name, runtime, text=text)


def _compare(earlier: list[dict[str, Any]], lines: list[dict[str, Any]], tolerance: float, as_json: bool) -> None:
    from tfcli.bench import report

    for difference in report.differences(earlier, lines):
        _note(f"warning: not the same: {difference}")
    verdicts = report.compare(earlier, lines)
    for verdict in verdicts:
        # Results were printed already; with --json stdout stays one object a suite.
        typer.echo(f"{verdict.suite}: {verdict.ratio:.3f} times the speed: {verdict.verdict}", err=as_json)
    if any(verdict.verdict == "slower" and verdict.ratio < 1 - tolerance for verdict in verdicts):
        _note(f"slower by more than {tolerance:.0%}")
        raise typer.Exit(1)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """rich's table on a terminal, aligned columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for cells in rows:
            table.add_row(*cells)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for cells in (head, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
