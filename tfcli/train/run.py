"""What runs of pretrain and of finetune have in common: a directory that is held, begun, resumed and written to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tfcli.runtime import Runtime
from tfcli.train import checkpoint, record
from tfcli.train.checkpoint import TrainState
from tfcli.train.events import Listener, Note
from tfcli.train.metrics import Metrics
from tfcli.train.optim import Optimizers
from tfcli.train.signals import Stop


@dataclass(kw_only=True)
class Run:
    """One call's fixed things."""

    directory: Path
    specs: list[str]
    sources: dict[str, str]
    runtime: Runtime
    tell: Listener
    clock: Callable[[], float]
    """Seconds since the process began."""
    stop: Stop
    """Says whether to stop now."""
    before: record.Record | None = None
    """Of the run that it resumes."""

    def note(self, line: str) -> None:
        """Tell a line for people."""
        self.tell(Note(text=line))

    def begin(self, about: record.Record, data_report: dict[str, Any]) -> None:
        """Write what makes the directory a run, run.json first, so that it is never taken for anything else."""
        if self.before is None:
            record.clear(self.directory)
            record.write(self.directory, record.RUN_FILE, about)
        if not (self.directory / record.DATA_FILE).exists():
            record.write(self.directory, record.DATA_FILE, data_report)

    def restore(self, fill: Callable[[Mapping[str, Tensor], Path], None], optimizers: Optimizers) -> TrainState | None:
        """Counters of the newest whole checkpoint, its weights given to ``fill``; None where there is none yet."""
        whole = checkpoint.complete(self.directory) if self.before else []
        if not whole:
            return None
        state, weights, moments = checkpoint.load(whole[-1])
        fill(weights, whole[-1])
        optimizers.restore(moments)
        return state

    @contextmanager
    def gently(self, state: TrainState, *, tensorboard: bool) -> Iterator[Metrics]:
        """metrics.jsonl, to be written on from ``state``; from here on a signal stops the run gently."""
        self.stop.gentle = True
        with closing(
            Metrics(self.directory, keep_bytes=state.metrics_bytes, step=state.step, tensorboard=tensorboard)
        ) as metrics:
            yield metrics


@contextmanager
def holding(directory: Path, *own: Path) -> Iterator[None]:
    """The directory held for one run, which a full disk ends with a word on how to go on.

    Leaves no folder behind that was made for a run which then wrote nothing, nor one of ``own`` that is empty.
    """
    made = [*own, *(folder for folder in directory.parents if not folder.exists())]
    try:
        with record.full_disk(directory), checkpoint.locked(directory):
            yield
    finally:
        for folder in made:
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()
