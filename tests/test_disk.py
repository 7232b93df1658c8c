"""Files and folders that are whole or not there, and locks that only the living hold."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tfcli import disk
from tfcli.errors import RunError, UserError


def locked(folder: Path) -> AbstractContextManager[None]:
    return disk.locked(folder, busy=UserError("another process"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches run.json or a marker that is empty after a full disk, and a temporary file left behind."""
    path = tmp_path / "run.json"
    disk.write(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        disk.write(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_and_a_device_are_written_through(tmp_path: Path) -> None:
    """Catches a link that is replaced by a file, and /dev/null replaced by anything."""
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    disk.write(link, b"text")
    assert link.is_symlink() and real.read_bytes() == b"text"
    disk.write(Path("/dev/null"), b"text")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_filled_whole_or_not_at_all(tmp_path: Path, there: bool) -> None:
    """Catches a model of which half is new, and what a failed save leaves behind."""
    folder = tmp_path / "model"
    if there:
        folder.mkdir()
        (folder / "weights").write_text("old")
        (folder / "notes").write_text("mine")
    with pytest.raises(ZeroDivisionError), disk.whole_folder(folder, last=lambda name: name == "weights") as made:
        (made / "weights").write_text("new")
        raise ZeroDivisionError
    assert {path.name for path in tmp_path.rglob("*")} == ({"model", "weights", "notes"} if there else set())
    assert not there or (folder / "weights").read_text() == "old"
    with disk.whole_folder(folder, last=lambda name: name == "weights") as made:
        (made / "weights").write_text("new")
        (made / "config").write_text("new")
    assert (folder / "weights").read_text() == (folder / "config").read_text() == "new"
    assert {path.name for path in folder.iterdir()} == {"weights", "config"} | ({"notes"} if there else set())


def test_a_folder_in_the_place_of_a_file_changes_nothing(tmp_path: Path) -> None:
    """Catches files that are replaced before the one that cannot be."""
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError), disk.whole_folder(tmp_path, last=lambda name: False) as made:
        (made / "a").write_text("new")
        (made / "b").write_text("new")
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("there", [False, True])
def test_two_threads_may_write_one_place(tmp_path: Path, there: bool) -> None:
    """Catches temporary names that two threads share, and a folder that appears while it is written."""
    if there:
        (tmp_path / "model").mkdir()
    written = threading.Barrier(2)
    failures: list[BaseException] = []

    def write(text: str) -> None:
        try:
            with disk.whole_folder(tmp_path / "model", last=lambda name: False) as made:
                (made / "weights").write_text(text)
                written.wait()
            with disk.whole_file(tmp_path / "file") as file:
                file.write(text.encode())
                written.wait()
        except BaseException as error:
            failures.append(error)
            written.abort()

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (tmp_path / "model" / "weights").read_text() in ("one", "two")
    assert (tmp_path / "file").read_text() in ("one", "two")
    assert {path.name for path in tmp_path.rglob("*")} == {"model", "weights", "file"}


def test_a_link_to_an_empty_folder_can_be_locked(tmp_path: Path) -> None:
    """Catches the error of what happened inside hidden by that of the clean-up."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "link"):
        raise ZeroDivisionError


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    """/dev/stdout of a pipeline leads to no path of a file system."""
    read, write = os.pipe()
    disk.write(Path(f"/proc/self/fd/{write}"), b"text")
    os.close(write)
    with os.fdopen(read, "rb") as file:
        assert file.read() == b"text"


def test_a_full_disk_is_told_by_number_or_by_words() -> None:
    """safetensors raises its own errors, which have no errno."""
    assert disk.is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert disk.is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert disk.is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not disk.is_full(OSError(errno.EACCES, "os error 28 is not what this is"))
    with pytest.raises(RunError, match="the disk is full: it was not written"), disk.telling_full("it was not written"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RunError) as caught, disk.telling_full("it was not written"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert disk.is_full(caught.value), "who knows more may say more"
    with pytest.raises(PermissionError), disk.telling_full("it was not written"):
        raise PermissionError(errno.EACCES, "Permission denied")


def hold(run: Path, pipe: Connection) -> None:
    """Lock the directory in another process, report it, and wait."""
    with locked(run):
        pipe.send("held")
        pipe.recv()


def test_one_process_a_directory(tmp_path: Path) -> None:
    """Catches two runs that overwrite each other; the lock of a process that was killed; and that being refused must
    not take the directory away from who holds it."""
    run = tmp_path / "runs" / "a"
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(run, there))
    process.start()
    assert here.recv() == "held"
    with pytest.raises(UserError, match="another process"), locked(run):
        pass
    assert (run / ".lock").exists()
    assert disk.held(run)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not disk.held(run)
    with locked(run):
        (run / "something").touch()
    assert (run / "something").exists()
    here.close()
    there.close()


def test_a_directory_in_which_nothing_was_written_goes(tmp_path: Path) -> None:
    """Catches empty run directories left by runs that failed at once."""
    with locked(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()


def test_the_lock_of_a_removed_directory_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two holders: one opens the file, its owner removes it, and the other locks what is no longer there."""
    run = tmp_path / "a"
    run.mkdir()
    import fcntl

    flock, calls = fcntl.flock, []

    def slow(file: Any, how: int) -> None:
        if not calls:
            shutil.rmtree(run)
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with locked(run):
        assert (run / ".lock").exists()
        assert disk.held(run)
    assert len(calls) > 1
