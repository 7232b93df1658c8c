"""Checkpoints are whole or not there, whatever happens at whatever moment; a directory has one owner."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tfcli.errors import UserError
from tfcli.train import checkpoint
from tfcli.train.checkpoint import TrainState

OPERATIONS: list[tuple[Any, str]] = [
    (checkpoint, "save_file"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
]
"""All that a save does to the disk."""


def tensors(value: float) -> dict[str, Tensor]:
    return {"a.weight": torch.full((4, 3), value), "b": torch.tensor(value)}


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run, TrainState(step=step, tokens=7 * step), tensors(step), tensors(-step))


class Killed(BaseException):
    """Stands for the end of the process."""


class Death:
    """Lets ``after`` operations happen; the next one is cut in the middle, and nothing happens after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        for owner, name in OPERATIONS:
            monkeypatch.setattr(owner, name, self._mortal(name, getattr(owner, name)))

    def _mortal(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == -1 and name == "save_file":
                args[1].write_bytes(b"half of a file")
            if self.left < 0:
                raise Killed
            return function(*args, **kwargs)

        return call


def test_a_kill_at_any_moment_of_a_save_leaves_the_older_one_whole(tmp_path: Path) -> None:
    """Catches a marker before its files, a rename before a sync, an old checkpoint deleted before the new is whole."""
    after, kills = 0, 0
    while True:
        run = tmp_path / str(after)
        run.mkdir()
        save(run, 1)
        with pytest.MonkeyPatch.context() as patch:
            death = Death(patch, after)
            try:
                save(run, 2)
                checkpoint.prune(run, keep=1, best_step=0)
            except Killed:
                kills += 1
        whole = checkpoint.complete(run)
        assert whole, f"nothing is left after operation {after}"
        for path in whole:
            state, weights, _ = checkpoint.load(path)
            assert weights["a.weight"][0, 0] == state.step == int(path.name)
        save(run, 2)  # and the next process is not in its own way
        checkpoint.prune(run, keep=1, best_step=0)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000002"]
        if death.left >= 0:
            break
        after += 1
    assert kills == after > 10


def test_a_failed_save_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that stays full because of what the failed save left on it."""
    save(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    """Catches a field or tensor that is forgotten, and scalars that come back with another shape."""
    state = TrainState(step=3, steps=9, tokens=21, seconds=1.5, loss_sum=0.1, loss_count=4, best=2.5, best_step=2)
    got, weights, moments = checkpoint.load(checkpoint.save(tmp_path, state, tensors(0.3), tensors(0.7)))
    assert got == state
    assert all(torch.equal(weights[name], t) for name, t in tensors(0.3).items())
    assert all(torch.equal(moments[name], t) for name, t in tensors(0.7).items())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    """Catches a run that goes on from wrong numbers, or a message that does not say which file and what to do."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    data = bytearray((path / name).read_bytes())
    if damage == "missing":
        (path / name).unlink()
    elif damage == "cut":
        (path / name).write_bytes(data[:-1])
    else:
        data[-3] ^= 1
        (path / name).write_bytes(data)
    with pytest.raises(UserError, match=name) as error:
        checkpoint.load(path)
    assert "step 1" in str(error.value.hint)
    assert str(path) in error.value.message


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model.safetensors": 3}', '"x"'])
def test_a_damaged_marker_is_a_message(tmp_path: Path, content: str) -> None:
    """Catches a traceback from JSON that is not what was written."""
    path = save(tmp_path, 2)
    (path / checkpoint.MARKER).write_text(content)
    with pytest.raises(UserError, match="cannot be read") as error:
        checkpoint.load(path)
    assert "start again" in str(error.value.hint)


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """Catches a best checkpoint that is deleted, and what killed processes left that is not."""
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / ".00000009.tmp").mkdir()
    (tmp_path / "checkpoints" / "00000006").mkdir()  # renamed, not yet marked
    checkpoint.prune(tmp_path, keep=2, best_step=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000004", "00000005"]


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    """Catches state that other programs cannot read: no pickle, no NaN."""
    path = save(tmp_path, 1)
    assert json.loads((path / "state.json").read_text())["step"] == 1
    assert {p.name for p in path.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "complete.json",
    }  # fmt: skip
