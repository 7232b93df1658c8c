"""metrics.jsonl: one object a line, flushed, truncated to the checkpoint when a run is resumed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from tfcli.errors import UserError

NAME, BOARD = "metrics.jsonl", "tensorboard"


class Metrics:
    """Append to ``metrics.jsonl``; with ``tensorboard`` also to event files under ``tensorboard/``.

    Lines after the first ``keep_bytes`` and events after ``step`` are dropped: their steps are taken again.
    """

    def __init__(self, run: Path, *, keep_bytes: int = 0, step: int = 0, tensorboard: bool = False) -> None:
        self._board = _writer()(str(run / BOARD), purge_step=step + 1) if tensorboard else None
        self._file: IO[bytes] = (run / NAME).open("ab")
        self._file.truncate(min(keep_bytes, self._file.seek(0, os.SEEK_END)))
        self._file.seek(0, os.SEEK_END)

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return self._file.tell()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; TensorBoard gets each of its numbers at its "step"."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Make sure that the lines survive a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def check_tensorboard() -> None:
    """Raise UserError where the package tensorboard is not installed."""
    _writer()


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs the package tensorboard", hint='install it with: pip install "tfcli[tensorboard]"'
        ) from None
    return SummaryWriter


def clear(run: Path) -> None:
    """Delete the metrics of a run and its TensorBoard events."""
    (run / NAME).unlink(missing_ok=True)
    shutil.rmtree(run / BOARD, ignore_errors=True)


def read(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without a last line that was truncated by a kill."""
    path = run / NAME
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
