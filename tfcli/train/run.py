"""The common part of pretrain and finetune: a directory that is locked, begun, resumed, written to and finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tfcli.config.model import stored
from tfcli.config.options import PretrainConfig
from tfcli.config.resolve import to_dict
from tfcli.model.base import Model
from tfcli.runtime import Runtime
from tfcli.tasks.common.options import FinetuneConfig
from tfcli.train import checkpoint, record
from tfcli.train.checkpoint import TrainState
from tfcli.train.events import Listener, Note
from tfcli.train.metrics import Metrics, check_tensorboard
from tfcli.train.optim import Optimizers
from tfcli.train.plan import Plan
from tfcli.train.signals import Stop


@dataclass(kw_only=True)
class Run:
    """One call of pretrain or finetune."""

    directory: Path
    specs: list[str]
    config: PretrainConfig | FinetuneConfig
    sources: dict[str, str]
    runtime: Runtime
    tell: Listener
    clock: Callable[[], float]
    """Seconds since the process began."""
    stop: Stop
    """Returns whether to stop now."""
    before: record.Record | None = None
    """The record of the run that is resumed."""

    def __post_init__(self) -> None:
        if self.config.train.tensorboard:
            check_tensorboard()

    def note(self, line: str) -> None:
        """Tell a line for people."""
        self.tell(Note(text=line))

    def describe(self, planned: Plan, command: Sequence[str], *, data_hash: str, tokenizer_hash: str) -> record.Record:
        """The entries of run.json that every run has when it begins."""
        return {
            "command": list(command),
            "corpus": [record.absolute(spec) for spec in self.specs],
            "started": record.now(),
            "finished": None,
            "config": to_dict(self.config),
            "sources": self.sources,
            "plan": {**asdict(planned), "model": stored(planned.model)},
            **record.describe(self.runtime),
            "seed": self.config.seed,
            "data_hash": data_hash,
            "tokenizer_hash": tokenizer_hash,
        }

    def begin(self, about: record.Record, data_report: dict[str, Any]) -> None:
        """Write run.json and data.json, run.json first, so that the directory is never taken for anything else."""
        if self.before is None:
            record.clear(self.directory)
            record.write(self.directory, record.RUN_FILE, about)
        if not (self.directory / record.DATA_FILE).exists():
            record.write(self.directory, record.DATA_FILE, data_report)

    def restore(self, model: Model, optimizers: Optimizers) -> TrainState | None:
        """Load the newest whole checkpoint and return its counters; None if there is none yet."""
        whole = checkpoint.complete(self.directory) if self.before else []
        if not whole:
            return None
        state, weights, moments = checkpoint.load(whole[-1])
        checkpoint.fill(model, weights, whole[-1])
        optimizers.restore(moments)
        return state

    def announce(self, *lines: str, step: int) -> None:
        """Tell what will be done and where, before it is done; ``step`` is where a resumed run goes on."""
        for line in (*lines, f"{f'continuing at step {step:,}' if step else 'writing'} {self.directory}"):
            self.note(line)

    @contextmanager
    def gently(self, state: TrainState) -> Iterator[Metrics]:
        """Open metrics.jsonl to be continued from ``state``; from here on a signal stops the run after saving."""
        self.stop.gentle = True
        tensorboard = self.config.train.tensorboard
        metrics = Metrics(self.directory, keep_bytes=state.metrics_bytes, step=state.step, tensorboard=tensorboard)
        with closing(metrics):
            yield metrics

    def finish(self, about: record.Record, state: TrainState) -> None:
        """Write run.json of a run that came to its end."""
        record.write(self.directory, record.RUN_FILE, {**about, "finished": record.now(), "steps": state.step})


@contextmanager
def holding(directory: Path, *own: Path) -> Iterator[None]:
    """Lock the directory for one run; a full disk ends it with a message on how to continue.

    Removes folders that were made for a run which then wrote nothing, and those of ``own`` that are empty.
    """
    folders = [*own, *(folder for folder in directory.parents if not folder.exists())]
    try:
        with record.full_disk(directory), checkpoint.locked(directory):
            yield
    finally:
        for folder in folders:
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()
