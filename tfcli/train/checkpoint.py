"""Checkpoints, written whole or not at all, and the lock that keeps two runs out of one directory."""

from __future__ import annotations

import json
import shlex
import shutil
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tfcli import disk
from tfcli.errors import UserError
from tfcli.train.runs import MARKER as MARKER

FOLDER = "checkpoints"


@dataclass(kw_only=True, slots=True)
class TrainState:
    """The state of a run besides weights and optimizer, to resume as if it had never stopped."""

    step: int = 0
    """Optimizer steps done."""
    steps: int | None = None
    """Total steps; None until the length is fixed."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Seconds since the start of the process that began the run, without interruptions."""
    loss_sum: float = 0.0
    """Summed loss since the last line of metrics."""
    loss_count: int = 0
    """Tokens since the last line of metrics."""
    best: float | None = None
    """Best validation metric so far."""
    best_step: int = 0
    """Step of the model that is kept."""
    stale: int = 0
    """Evaluations since the best metric was reached."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this step."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, once fixed."""


def save(run: Path, state: TrainState, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> Path:
    """Write ``checkpoints/STEP`` aside, sync and rename it; the marker with sizes and checksums comes last.

    A process killed at any moment leaves no directory of that name, one without a marker, or a whole one.
    """
    final = run / FOLDER / f"{state.step:08d}"
    if final.exists():
        shutil.rmtree(final)
    with disk.whole_folder(final, last=lambda name: False) as folder:
        save_file({name: t.detach().contiguous() for name, t in model.items()}, folder / "model.safetensors")
        save_file({name: t.detach().contiguous() for name, t in optimizer.items()}, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(asdict(state), indent=1))
        sums = {path.name: [path.stat().st_size, _sum(path)] for path in sorted(folder.iterdir())}
    disk.write(final / MARKER, json.dumps(sums, indent=1).encode())
    return final


def load(path: Path) -> tuple[TrainState, dict[str, Tensor], dict[str, Tensor]]:
    """Read one checkpoint. Raises UserError, naming the file, where anything is missing, truncated or damaged."""
    try:
        sums = json.loads((path / MARKER).read_text())
        for name, (size, checksum) in sums.items():
            file = path / name
            if not file.exists():
                raise _broken(path, f"{name} is missing")
            if file.stat().st_size != size:
                raise _broken(path, f"{name} has {file.stat().st_size} bytes, expected {size}")
            if _sum(file) != checksum:
                raise _broken(path, f"{name} is damaged: its checksum is wrong")
        state = TrainState(**json.loads((path / "state.json").read_text()))
        return state, load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise _broken(path, str(error)) from None


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights read at ``path`` into the trained parameters. UserError where they have other names or shapes."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    have, need = ({name: tuple(t.shape) for name, t in each.items()} for each in (weights, parameters))
    if have != need:
        name = min(name for name in have.keys() | need.keys() if have.get(name) != need.get(name))
        raise UserError(
            f"{path} does not fit the model: {name} has the shape {have.get(name)}, expected {need.get(name)}",
            hint="it, run.json or the model that the run began with was changed: start a new run with another --out",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def complete(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("[0-9]*") if (path / MARKER).is_file())


def prune(run: Path, *, keep: int, best_step: int) -> None:
    """Delete all but the best and the newest ``keep`` whole checkpoints, and the leftovers of killed processes."""
    whole = complete(run)
    kept = {*whole[-max(1, keep) :], run / FOLDER / f"{best_step:08d}"}
    for path in (run / FOLDER).iterdir():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def clear(run: Path) -> None:
    """Delete all checkpoints."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def locked(run: Path) -> AbstractContextManager[None]:
    """Lock the directory of a run, made if need be: a second run on it, also in another process, is refused."""
    busy = UserError(f"another process is training in {run}", hint="wait for it, stop it, or choose another --out")
    return disk.locked(run, busy=busy)


def resume_command(run: Path) -> str:
    """The command that resumes a run."""
    kind = None
    with suppress(OSError, ValueError, AttributeError):
        kind = json.loads((run / "run.json").read_bytes()).get("kind")
    return f"tfcli {'finetune' if kind == 'finetune' else 'pretrain'} --resume --out {shlex.quote(str(run))}"


def _broken(path: Path, why: str) -> UserError:
    others = [other.name for other in complete(path.parent.parent) if other != path]
    hint = f"delete {path} to go on from step {int(others[-1])}" if others else "start again, for it is the only one"
    return UserError(f"the checkpoint {path} cannot be read: {why}", hint=hint)


def _sum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
