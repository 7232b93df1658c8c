"""metrics.jsonl: one object a line, flushed, cut back to the checkpoint when a run is resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

NAME = "metrics.jsonl"


class Metrics:
    """Appends lines to ``metrics.jsonl``; with ``tensorboard`` also writes its events under ``tensorboard/``."""

    def __init__(self, run: Path, *, keep_bytes: int = 0, tensorboard: bool = False) -> None:
        self._file: IO[bytes] = (run / NAME).open("ab")
        self._file.truncate(keep_bytes)
        self._file.seek(0, os.SEEK_END)
        self._board = _board(run / "tensorboard") if tensorboard else None

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return self._file.tell()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers of TensorBoard are filed under their own names by its "step"."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Make sure that the lines survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path) -> Any:
    from tfcli.errors import UserError

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs the package tensorboard", hint='install it with: pip install "tfcli[tensorboard]"'
        ) from None
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call]


def read(run: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line cut short by a kill is left out."""
    path = run / NAME
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
