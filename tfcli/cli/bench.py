"""tfcli bench: how fast this machine tokenizes, trains, reads prompts and generates, with intervals."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfcli.cli.lines import note
from tfcli.cli.options import Device, Precision, Quantize, Threads
from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.benchmark.rules import Rule

Json = dict[str, Any]
PRESET = "small"
MODEL, WORK, GATE, OUTPUT = "Model and text", "Work", "Comparison", "Output"


def bench(
    results: Annotated[
        Path | None,
        typer.Argument(metavar="NEWER", help="With --compare: newer results to compare, instead of running."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model, as for generate; else random weights.", rich_help_panel=MODEL),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", show_default=PRESET, help="Shape of random weights.", rich_help_panel=MODEL),
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Blocks of random weights.", rich_help_panel=MODEL)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Text for tokenizer and prompts; else made-up words.", rich_help_panel=MODEL),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            show_default="all; with --against prefill,decode",
            help="tokenize, load, memory, decode, prefill, batch, train; with commas or repeated.",
            rich_help_panel=WORK,
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="llama.cpp, transformers (also -bf16, -fp32): the same work by another engine, in turn.",
            rich_help_panel=WORK,
        ),
    ] = None,
    against_python: Annotated[
        Path | None,
        typer.Option(
            "--against-python",
            envvar="TFCLI_AGAINST_PYTHON",
            show_envvar=False,
            show_default="$TFCLI_AGAINST_PYTHON, else this one",
            help="Python of the environment that has it.",
            rich_help_panel=WORK,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, show_default="as pretrain's", help="Rows of a training step.", rich_help_panel=WORK
        ),
    ] = None,
    repeats: Annotated[
        int,
        typer.Option("--repeats", min=1, help="Timed calls of each suite; slow ones get fewer.", rich_help_panel=WORK),
    ] = 15,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare", help="Earlier results (--json); exit code 1 if one is surely worse.", rich_help_panel=GATE
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            show_default="worse by 5%",
            help='Exit code 1 if so: "decode<0.97x" of what is compared, "memory>450" in its unit; repeatable.',
            rich_help_panel=GATE,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a suite.", rich_help_panel=OUTPUT)] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Tables for a README or an issue.", rich_help_panel=OUTPUT)
    ] = False,
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    quantize: Quantize = None,
) -> None:
    """Measure speed and memory, with intervals.

    Each suite is warmed up until two calls in a row are no faster than the fastest before them, then timed --repeats
    times; figures are medians with 95 % intervals. Suites of generating do what generate does: decode makes 128 tokens
    after a prompt of 512, if the context has room. "Of peak" is the share of what a large matrix product and a large
    read reach here and now; a model that fits into the processor's cache can exceed the latter. Training is measured
    without torch.compile.

    Example: tfcli bench --depth 4 --suite train,decode
    """
    from tfcli.benchmark import peers, rules, suites
    from tfcli.benchmark.bench import BenchOptions
    from tfcli.benchmark.bench import bench as measure
    from tfcli.benchmark.compare import read

    if as_json and markdown:
        raise UserError("--json and --markdown exclude each other", hint="leave one of them out")
    options = BenchOptions(
        suites=suite or (),
        preset=preset,
        depth=depth,
        batch_size=batch_size,
        file=file,
        repeats=repeats,
        against=against or (),
        against_python=against_python,
    )
    chosen, names = options.chosen, options.peers
    gate = rules.parse(fail_if or [], suites.SUITES)
    earlier = read(compare) if compare else None
    before = {str(line["suite"]) for line in earlier} if earlier is not None else None
    show = _Show(as_json=as_json, markdown=markdown)
    if results is not None:
        if earlier is None:
            raise UserError(f"{results} has nothing to be compared with", hint="tfcli bench --compare OLDER NEWER")
        if model or names:
            option = "--model" if model else "--against"
            raise UserError(f"two files are compared without {option}", hint=f"leave {option} or {results} out")
        lines = read(results)
        rules.check(gate, [str(line["suite"]) for line in lines], before)
        show.alone = True
    else:
        rules.check(gate, chosen, before, (*(peers.SUITES if names else ()), "batch"))
        lines = measure(
            model, options, device=device, precision=precision, threads=threads, quantize=quantize, on_note=note
        )
        show.results(lines)
    _judge(gate, lines, earlier, show)


def _judge(gate: list[Rule], lines: list[Json], earlier: list[Json] | None, show: _Show) -> None:
    """Show what changed since earlier results, and leave with exit code 1 where a rule is broken."""
    from tfcli.benchmark.compare import judge

    judged = judge(lines, earlier, gate)
    for difference in judged.differences:
        note(f"warning: not the same: {difference}")
    show.verdicts(judged.verdicts)
    for reason in judged.failed:
        note(f"failed: {reason}")
    if judged.failed:
        raise typer.Exit(1)


class _Show:
    """Results on stdout: rich's tables on a terminal, aligned columns elsewhere, markdown, or JSON lines."""

    def __init__(self, *, as_json: bool, markdown: bool) -> None:
        self._json, self._markdown = as_json, markdown
        self.alone = False
        """Whether verdicts are all that is shown, so that with --json they are what stdout gets."""

    def results(self, lines: list[Json]) -> None:
        """Every suite, and where there is one what was timed beside it."""
        from tfcli.benchmark import report

        if self._json:
            for line in lines:
                print(json.dumps(line, ensure_ascii=False))
            return
        for said in report.heading(lines[0]):
            typer.echo(f"- {said}" if self._markdown else said)
        self.table(report.HEAD, [report.row(line) for line in lines])
        if beside := [row for line in lines for row in report.against_rows(line)]:
            self.table(report.AGAINST, beside)
        if remarks := report.remarks(lines):
            typer.echo()
        for said in remarks:
            typer.echo(f"- {said}" if self._markdown else said)

    def verdicts(self, verdicts: Sequence[Any]) -> None:
        """What became of each suite; with --json on stderr, where stdout has an object for each already."""
        from tfcli.benchmark import compare

        if self._json:
            for verdict in verdicts:
                if self.alone:
                    print(json.dumps(dataclasses.asdict(verdict), ensure_ascii=False))
                else:
                    note(str(verdict))
        elif verdicts:
            self.table(compare.HEAD, [verdict.row for verdict in verdicts])

    def table(self, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        """One table, after an empty line."""
        from tfcli.benchmark import report

        typer.echo()
        if self._markdown:
            typer.echo(report.markdown(head, rows))
        elif sys.stdout.isatty():
            from rich.console import Console
            from rich.table import Table

            table = Table(*head)
            for cells in rows:
                table.add_row(*cells)
            Console().print(table)
        else:
            typer.echo(report.plain(head, rows))
