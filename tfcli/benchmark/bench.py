"""A benchmark run: suites of a model on this machine, optionally against other engines."""

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
    """The suites to run, on what, and how often."""

    suites: Sequence[str] = ()
    """tokenize, load, memory, decode, prefill, batch, train; (): all, with ``against`` those of the peers."""
    preset: str | None = None
    """Shape of random weights if no model is given; None: ``PRESET``."""
    depth: int | None = None
    """Depth of random weights."""
    batch_size: int | None = None
    """Rows of a training step; None: as in pretraining."""
    file: str | Path | None = None
    """Text for the tokenizer and prompts; None: synthetic words."""
    repeats: int = 15
    """Timed calls of each suite; slow suites get fewer."""
    against: Sequence[str] = ()
    """llama.cpp, transformers (also -bf16, -fp32): other engines timed in turn on the same work."""
    against_python: Path | None = None
    """Python of the environment that has them; None: this one."""

    @property
    def peers(self) -> list[str]:
        """The names of the other engines. Raises UserError for an unknown one."""
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
    """Measure speed and memory of a model, or of random weights of a known shape; return an object for each suite.

    Each has "suite", "value" in its "unit", the bounds "low" and "high" of its 95 % interval, and the other keys of
    ``tfcli bench --json``. Suites are warmed up, then timed ``options.repeats`` times. ``on_note`` is told the device,
    what is running and which figures are unreliable. ``device``, ``precision``, ``threads`` and ``quantize`` as in
    ``load``. Raises UserError for an unknown suite, peer or preset, RunError for a peer that fails.

    Example:
        >>> import tfcli
        >>> options = tfcli.BenchOptions(suites=["tokenize"], file="corpus.txt", repeats=2)
        >>> [result] = tfcli.bench("runs/first", options)
        >>> result["suite"], result["unit"], result["low"] <= result["value"] <= result["high"]
        ('tokenize', 'MB/s', True)
    """
    options, note = options or BenchOptions(), on_note or notebook.notes()
    chosen, names = options.chosen, options.peers
    opened = model if model is None or isinstance(model, Opened) else open_path(model)
    peers.check(names, opened)
    machine = Machine(device=device, precision=precision, threads=threads, quantize=quantize)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runtime = machine.runtime()
        note(f"device: {runtime.describe()}")
        if warning := contention(others_running(), runtime.threads):
            note(f"warning: {warning}")
        stack.enter_context(runtime.active())
        measured = _subject(opened, options, machine.quantize, runtime, folder)
        running = []
        for name in names:
            note(f"{name} ...")
            task = _task(measured, runtime)
            running.append(stack.enter_context(peers.opened(name, task, python=options.against_python)))
        return _measure(chosen, measured, runtime, options.repeats, running, note)


def _subject(
    model: Opened | None, options: BenchOptions, quantize: str | None, runtime: Runtime, folder: Path
) -> Subject:
    """Return the opened model, or random weights of the requested shape."""
    if model is not None and (options.preset or options.depth):
        raise UserError("--model has a shape of its own", hint="leave --preset and --depth out")
    text = subject.read_text(Path(options.file)) if options.file else None
    if model is not None:
        return subject.from_model(model, runtime, text=text, batch_size=options.batch_size, quantize=quantize)
    preset = options.preset or PRESET
    flags = {"model.depth": options.depth, "train.batch_size": options.batch_size}
    config, _ = resolve(PretrainConfig, preset=preset, flags=flags)
    name = f"random weights, {preset}" + (f", depth {options.depth}" if options.depth else "")
    return subject.from_config(config, name, runtime, folder=folder / "model", text=text, quantize=quantize)


def _task(measured: Subject, runtime: Runtime) -> peers.Task:
    """Return the work of the suites for a peer: the same model, prompt and number of tokens."""
    length, new = suites.lengths(measured.config)
    prompt, device, precision = measured.ids(measured.prompt(length)), str(runtime.device), runtime.precision
    threads = runtime.threads
    return peers.Task(
        model=measured.path, prompt=prompt, tokens=new, threads=threads, device=device, precision=precision
    )


def _measure(
    names: list[str],
    measured: Subject,
    runtime: Runtime,
    repeats: int,
    running: Sequence[Peer],
    note: Callable[[str], None],
) -> list[Json]:
    """Return a line for each suite; note which one is running and which figures are unreliable."""
    results = []
    for result in suites.run(
        names, measured, runtime, repeats=repeats, peers=running, on_start=lambda name: note(f"{name} ...")
    ):
        results.append(result)
        note(f"{result.suite}: {report.in_short(result)}")
        sides = [(result.suite, result.timing), *((f"{result.suite}, {o.name},", o.timing) for o in result.against)]
        for name, timing in sides:
            if warning := report.noise(name, timing):
                note(f"warning: {warning}")
    # Last, because its large product and tensor would otherwise be the peak of the process's memory.
    peak = suites.ceilings(runtime) if any(result.flops_per_second for result in results) else None
    machine, about = report.fingerprint(runtime), report.about(measured)
    return [report.to_json(result, peak, machine, about) for result in results]
