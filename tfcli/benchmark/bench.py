"""One bench: what is measured, on which machine, beside which other engines."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfcli.benchmark import peers, report, subject, suites
from tfcli.benchmark.peers import Peer
from tfcli.benchmark.subject import Subject
from tfcli.benchmark.timing import contention, others_running
from tfcli.config.options import PretrainConfig
from tfcli.config.resolve import resolve
from tfcli.errors import UserError
from tfcli.formats.open import Opened, open_path
from tfcli.runtime import Machine, Runtime
from tfcli.train import notebook

Json = dict[str, Any]
PRESET = "small"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What is measured, and how often."""

    suites: Sequence[str] = ()
    """tokenize, load, memory, decode, prefill, batch, train; (): all, with ``against`` those of the peers."""
    preset: str | None = None
    """Shape of random weights, where no model is given; None: ``PRESET``."""
    depth: int | None = None
    """Blocks of random weights."""
    batch_size: int | None = None
    """Rows of a training step; None: as pretraining's."""
    file: str | Path | None = None
    """Text for tokenizer and prompts; None: made-up words."""
    repeats: int = 15
    """Timed calls of each suite; slow ones get fewer."""
    against: Sequence[str] = ()
    """llama.cpp, transformers (also -bf16, -fp32): the same work by another engine, in turn."""
    against_python: Path | None = None
    """Python of the environment that has it; None: this one."""

    @property
    def peers(self) -> list[str]:
        """The other engines. Raises UserError for an unknown one."""
        return peers.chosen(self.against)

    @property
    def chosen(self) -> list[str]:
        """The suites, in our order. Raises UserError for an unknown one."""
        return suites.chosen(self.suites, default=peers.SUITES if self.peers else ("all",))


def bench(
    model: str | Path | Opened | None = None,
    options: BenchOptions | None = None,
    *,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[Json]:
    """Measure speed and memory of a model, or of random weights of a known shape: an object for each suite.

    Each has "suite", "value" in its "unit", the bounds "low" and "high" of its 95 % interval, and beside them what
    ``tfcli bench --json`` writes. Suites are warmed up, then timed ``options.repeats`` times. ``on_note`` is told the
    device, what is running and what is not to be trusted. ``device``, ``precision``, ``threads`` and ``quantize`` as in
    ``load``. Raises UserError for an unknown suite, peer or preset, RunError for a peer that fails.

    Example:
        >>> import tfcli
        >>> options = tfcli.BenchOptions(suites=["tokenize"], file="corpus.txt", repeats=2)
        >>> [result] = tfcli.bench("runs/first", options)
        >>> result["suite"], result["unit"], result["low"] <= result["value"] <= result["high"]
        ('tokenize', 'MB/s', True)
    """
    asked, note = options or BenchOptions(), on_note or notebook.notes()
    chosen, names = asked.chosen, asked.peers
    found = model if model is None or isinstance(model, Opened) else open_path(model)
    peers.check(names, found)
    machine = Machine(device=device, precision=precision, threads=threads, quantize=quantize)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runtime = _runtime(machine, note)
        stack.enter_context(runtime.active())
        made = _subject(found, asked, machine.quantize, runtime, folder)
        opened = [_open(stack, name, made, runtime, asked.against_python, note) for name in names]
        return _measure(chosen, made, runtime, asked.repeats, opened, note)


def _runtime(machine: Machine, note: Callable[[str], None]) -> Runtime:
    """Where it runs; says so, and what else runs there."""
    runtime = machine.runtime()
    note(f"device: {runtime.describe()}")
    if warning := contention(others_running(), runtime.threads):
        note(f"warning: {warning}")
    return runtime


def _subject(
    model: Opened | None, asked: BenchOptions, quantize: str | None, runtime: Runtime, folder: Path
) -> Subject:
    """The model that was opened, or random weights of the shape that is asked for."""
    if model is not None and (asked.preset or asked.depth):
        raise UserError("--model has a shape of its own", hint="leave --preset and --depth out")
    text = subject.read_text(Path(asked.file)) if asked.file else None
    if model is not None:
        return subject.from_model(model, runtime, text=text, batch_size=asked.batch_size, quantize=quantize)
    preset = asked.preset or PRESET
    flags = {"model.depth": asked.depth, "train.batch_size": asked.batch_size}
    config, _ = resolve(PretrainConfig, preset=preset, flags=flags)
    name = f"random weights, {preset}" + (f", depth {asked.depth}" if asked.depth else "")
    return subject.from_config(config, name, runtime, folder=folder / "model", text=text, quantize=quantize)


def _open(
    stack: contextlib.ExitStack,
    name: str,
    made: Subject,
    runtime: Runtime,
    python: Path | None,
    note: Callable[[str], None],
) -> Peer:
    """A peer with the model loaded, and the prompt that the suites have."""
    note(f"{name} ...")
    prompt, new = suites.lengths(made.config)
    task = peers.Task(
        model=made.path,
        prompt=made.ids(made.prompt(prompt)),
        tokens=new,
        threads=runtime.threads,
        device=str(runtime.device),
        precision=runtime.precision,
    )
    return stack.enter_context(peers.opened(name, task, python=python))


def _measure(
    names: list[str], made: Subject, runtime: Runtime, repeats: int, opened: Sequence[Peer], note: Callable[[str], None]
) -> list[Json]:
    """A line for each suite; says which is running, and what is not to be trusted."""
    results = []
    for result in suites.run(
        names, made, runtime, repeats=repeats, peers=opened, on_start=lambda name: note(f"{name} ...")
    ):
        results.append(result)
        note(f"{result.suite}: {report.in_short(result)}")
        sides = [(result.suite, result.timing), *((f"{result.suite}, {o.name},", o.timing) for o in result.against)]
        for name, timing in sides:
            if warning := report.noise(name, timing):
                note(f"warning: {warning}")
    # Last, for a large product and a large tensor would be the peak of the process's memory.
    peak = suites.ceilings(runtime) if any(result.flops_per_second for result in results) else None
    machine, about = report.fingerprint(runtime), report.about(made)
    return [report.to_json(result, peak, machine, about) for result in results]
