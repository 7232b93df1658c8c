"""tfcli bench: how fast this machine tokenizes, trains, reads prompts and generates, with intervals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfcli.cli.lines import note
from tfcli.cli.options import Device, Machine, Precision, Quantize, Threads
from tfcli.config.options import PretrainConfig
from tfcli.config.resolve import resolve
from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.benchmark.peers import Peer
    from tfcli.benchmark.rules import Rule
    from tfcli.benchmark.subject import Subject
    from tfcli.formats.open import Opened
    from tfcli.runtime import Runtime

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
    from tfcli.benchmark.compare import read
    from tfcli.formats.open import open_path

    if as_json and markdown:
        raise UserError("--json and --markdown exclude each other", hint="leave one of them out")
    names = peers.chosen(against or [])
    chosen = suites.chosen(suite or [], default=peers.SUITES if names else ("all",))
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
        _judge(gate, lines, earlier, show)
        return
    rules.check(gate, chosen, before, (*(peers.SUITES if names else ()), "batch"))
    found = open_path(model) if model else None
    peers.check(names, found)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runtime = _runtime(device, precision, threads)
        subject = _subject(found, preset, depth, file, batch_size, quantize, runtime, folder)
        opened = [_open(stack, name, subject, runtime, against_python) for name in names]
        lines = _measure(chosen, subject, runtime, repeats, opened)
    show.results(lines)
    _judge(gate, lines, earlier, show)


def _runtime(device: str | None, precision: str | None, threads: int | None) -> Runtime:
    """Where it runs; says so, and what else runs there."""
    from tfcli.benchmark.timing import contention, others_running

    runtime = Machine(device, precision, threads).runtime()
    note(f"device: {runtime.describe()}")
    if warning := contention(others_running(), runtime.threads):
        note(f"warning: {warning}")
    return runtime


def _subject(
    model: Opened | None,
    preset: str | None,
    depth: int | None,
    file: Path | None,
    batch_size: int | None,
    quantize: str | None,
    runtime: Runtime,
    folder: Path,
) -> Subject:
    from tfcli.benchmark import subject

    if model is not None and (preset or depth):
        raise UserError("--model has a shape of its own", hint="leave --preset and --depth out")
    text = subject.read_text(file) if file else None
    if model is not None:
        return subject.from_model(model, runtime, text=text, batch_size=batch_size, quantize=quantize)
    config, _ = resolve(
        PretrainConfig, preset=preset or PRESET, flags={"model.depth": depth, "train.batch_size": batch_size}
    )
    name = f"random weights, {preset or PRESET}" + (f", depth {depth}" if depth else "")
    return subject.from_config(config, name, runtime, folder=folder / "model", text=text, quantize=quantize)


def _open(stack: contextlib.ExitStack, name: str, subject: Subject, runtime: Runtime, python: Path | None) -> Peer:
    """A peer with the model loaded, and the prompt that the suites have."""
    from tfcli.benchmark import peers, suites

    note(f"{name} ...")
    prompt, new = suites.lengths(subject.config)
    task = peers.Task(
        model=subject.path,
        prompt=subject.ids(subject.prompt(prompt)),
        tokens=new,
        threads=runtime.threads,
        device=str(runtime.device),
        precision=runtime.precision,
    )
    return stack.enter_context(peers.opened(name, task, python=python))


def _measure(names: list[str], subject: Subject, runtime: Runtime, repeats: int, opened: Sequence[Peer]) -> list[Json]:
    """A line for each suite; says on stderr which is running, and what is not to be trusted."""
    from tfcli.benchmark import report, suites

    made = []
    for result in suites.run(
        names, subject, runtime, repeats=repeats, peers=opened, on_start=lambda name: note(f"{name} ...")
    ):
        made.append(result)
        note(f"{result.suite}: {report.in_short(result)}")
        sides = [(result.suite, result.timing), *((f"{result.suite}, {o.name},", o.timing) for o in result.against)]
        for name, timing in sides:
            if warning := report.noise(name, timing):
                note(f"warning: {warning}")
    # Last, for a large product and a large tensor would be the peak of the process's memory.
    peak = suites.ceilings(runtime) if any(result.flops_per_second for result in made) else None
    machine, about = report.fingerprint(runtime), report.about(subject)
    return [report.to_json(result, peak, machine, about) for result in made]


def _judge(gate: list[Rule], lines: list[Json], earlier: list[Json] | None, show: _Show) -> None:
    """Show what changed since earlier results, and leave with exit code 1 where a rule is broken."""
    from tfcli.benchmark import rules
    from tfcli.benchmark.compare import compare, differences

    ratios = {line["suite"]: [other["ratio"] for other in line.get("against", [])] for line in lines}
    failed: list[str] = []
    if earlier is not None:
        for difference in differences(earlier, lines):
            note(f"warning: not the same: {difference}")
        verdicts = compare(earlier, lines)
        show.verdicts(verdicts)
        ratios = {verdict.suite: [verdict.ratio] for verdict in verdicts}
        failed = [f"{verdict} by more than 5%" for verdict in verdicts if verdict.failed and not gate]
    failed += rules.broken(gate, lines, ratios)
    for reason in failed:
        note(f"failed: {reason}")
    if failed:
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
