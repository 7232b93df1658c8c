"""tfcli bench: how fast this machine tokenizes, trains, prefills and decodes, with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfcli.cli import options
from tfcli.cli.options import OUTPUT, argument, flag, option
from tfcli.cli.output import note, show_json, show_table
from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.benchmark.rules import Rule

Json = dict[str, Any]
PRESET = "small"
MODEL, WORK, GATE = "Model and text", "Work", "Comparison"
SUITES = "tokenize, load, memory, decode, prefill, batch, train; comma-separated or repeated."
AGAINST = "llama.cpp, transformers (also -bf16, -fp32): the same work in another engine, interleaved."
FAIL_IF = 'Exit with code 1 if so: "decode<0.97x" relative to the baseline, "memory>450" in its unit; repeatable.'


def bench(
    results: Annotated[
        Path | None, argument("NEWER", "With --compare: results to compare with it, instead of running.")
    ] = None,
    model: Annotated[str | None, option("A model, as for generate; else random weights.", MODEL)] = None,
    preset: Annotated[str | None, option("Shape of random weights.", MODEL, PRESET)] = None,
    depth: Annotated[int | None, option("Blocks of random weights.", MODEL, min=1)] = None,
    file: Annotated[Path | None, option("Text for tokenizer and prompts; else made-up words.", MODEL)] = None,
    suite: Annotated[list[str] | None, option(SUITES, WORK, "all; with --against prefill,decode")] = None,
    against: Annotated[list[str] | None, option(AGAINST, WORK)] = None,
    against_python: Annotated[
        Path | None,
        typer.Option(
            envvar="TFCLI_AGAINST_PYTHON",
            show_envvar=False,
            show_default="$TFCLI_AGAINST_PYTHON, else this one",
            help="Python of the environment that has the other engine.",
            rich_help_panel=WORK,
        ),
    ] = None,
    batch_size: Annotated[int | None, option("Sequences per training step.", WORK, "as pretrain's", min=1)] = None,
    repeats: Annotated[int, option("Timed calls per suite; slow ones get fewer.", WORK, min=1)] = 15,
    compare: Annotated[
        Path | None, option("Earlier results (--json); exit with code 1 if one is significantly worse.", GATE)
    ] = None,
    fail_if: Annotated[list[str] | None, option(FAIL_IF, GATE, "worse by 5%")] = None,
    as_json: Annotated[bool, flag("--json", "Print one JSON object per suite.", OUTPUT)] = False,
    markdown: Annotated[bool, flag("--markdown", "Print tables for a README or an issue.", OUTPUT)] = False,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
    quantize: options.Quantize = None,
) -> None:
    """Measure speed and memory, with confidence intervals.

    Each suite is warmed up until two consecutive calls are no faster than the fastest before them, then timed --repeats
    times; figures are medians with 95 % intervals. The generation suites run what generate runs: decode makes 128
    tokens after a prompt of 512, if the context allows. "Of peak" is the share of what a large matrix product and a
    large read reach on this machine now; a model that fits into the processor's cache can exceed the latter. Training
    is measured without torch.compile.

    Example: tfcli bench --depth 4 --suite train,decode
    """
    from tfcli.benchmark import peers, rules, suites
    from tfcli.benchmark.bench import BenchOptions
    from tfcli.benchmark.bench import bench as measure
    from tfcli.benchmark.compare import read

    if as_json and markdown:
        raise UserError("--json and --markdown exclude each other", hint="leave one of them out")
    how = BenchOptions(
        suites=suite or (), preset=preset, depth=depth, batch_size=batch_size, file=file, repeats=repeats,
        against=against or (), against_python=against_python,
    )  # fmt: skip
    chosen, names = how.chosen, how.peers
    gate = rules.parse(fail_if or [], suites.SUITES)
    earlier = read(compare) if compare else None
    before = {str(line["suite"]) for line in earlier} if earlier is not None else None
    show = _Show(as_json=as_json, markdown=markdown)
    if results is not None:
        if earlier is None:
            raise UserError(f"{results} needs something to compare with", hint="tfcli bench --compare OLDER NEWER")
        if model or names:
            given = "--model" if model else "--against"
            raise UserError(f"two files are compared without {given}", hint=f"leave out {given} or {results}")
        lines = read(results)
        rules.check(gate, [str(line["suite"]) for line in lines], before)
        show.alone = True
    else:
        rules.check(gate, chosen, before, (*(peers.SUITES if names else ()), "batch"))
        lines = measure(
            model, how, device=device, precision=precision, threads=threads, quantize=quantize, on_note=note
        )
        show.results(lines)
    _judge(gate, lines, earlier, show)


def _judge(gate: list[Rule], lines: list[Json], earlier: list[Json] | None, show: _Show) -> None:
    """Show what changed since earlier results, and exit with code 1 if a rule is broken."""
    from tfcli.benchmark.compare import judge

    judged = judge(lines, earlier, gate)
    for difference in judged.differences:
        note(f"warning: the runs differ: {difference}")
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
        """True if verdicts are all that is shown, so that with --json they go to stdout."""

    def results(self, lines: list[Json]) -> None:
        """Print every suite and its comparisons."""
        from tfcli.benchmark import report

        if self._json:
            for line in lines:
                show_json(line)
            return
        bullet = "- " if self._markdown else ""
        for text in report.heading(lines[0]):
            typer.echo(bullet + text)
        self._table(report.HEAD, [report.row(line) for line in lines])
        if beside := [row for line in lines for row in report.against_rows(line)]:
            self._table(report.AGAINST, beside)
        if remarks := report.remarks(lines):
            typer.echo()
        for text in remarks:
            typer.echo(bullet + text)

    def verdicts(self, verdicts: Sequence[Any]) -> None:
        """Print the verdict on each suite; with --json on stderr if stdout has an object for each already."""
        from tfcli.benchmark import compare

        if not self._json:
            if verdicts:
                self._table(compare.HEAD, [verdict.row for verdict in verdicts])
            return
        for verdict in verdicts:
            if self.alone:
                show_json(dataclasses.asdict(verdict))
            else:
                note(str(verdict))

    def _table(self, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        from tfcli.benchmark import report

        typer.echo()
        if self._markdown:
            typer.echo(report.markdown(head, rows))
        else:
            show_table(head, rows)
