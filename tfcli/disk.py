"""Files and folders that appear whole or not at all, locks on folders, and errors of a full disk."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from tfcli.errors import RunError, UserError

LOCK = ".lock"
"""The file by which ``locked`` holds a folder."""
ELSEWHERE = "free some space, or choose another place; what was there before is whole"


def is_full(error: BaseException) -> bool:
    """Return whether a write failed for lack of space, which libraries in other languages only say in their message."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, FullDiskError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in codes
    text = str(error)
    return "No space left" in text or any(f"os error {code}" in text for code in codes)


class FullDiskError(RunError):
    """A write that found the disk full."""


@contextmanager
def telling_full(what: str, *, hint: str = ELSEWHERE) -> Iterator[None]:
    """Turn a write that finds the disk full into a RunError: ``the disk is full: what``."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise FullDiskError(f"the disk is full: {what}", hint=hint) from None


def mark() -> str:
    """The suffix of unfinished files of this process: machine, process, .tmp."""
    return f".{_machine()}.{os.getpid()}.tmp"


def aside(path: Path) -> Path:
    """The temporary path next to ``path`` to write to until the file is complete; no other thread uses it."""
    return path.with_name(f".{path.name}.{threading.get_ident()}{mark()}")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that is synced and becomes ``path`` when the block ends without an error.

    An existing file stays as it is when writing fails, with an OSError. A link's target is written; a device or a pipe
    is written to directly.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    path = path.resolve()
    temporary = aside(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; an existing file is unchanged if writing fails, with an OSError."""
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_folder(folder: Path, *, last: Callable[[str], bool]) -> Iterator[Path]:
    """Make a folder whose files become those of ``folder`` when the block ends without an error.

    All are synced before the first is renamed into place. Files whose name is ``last`` come last: a reader finds these
    only when everything else is there. A new folder appears in one step. When writing fails, nothing has changed.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    inside = folder.exists()  # it may be a mount point, into which nothing from outside can be renamed
    sweep(folder if inside else folder.parent)
    temporary = aside(folder / "saving" if inside else folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda path: (last(path.name), path.name))
        for path in files:
            sync(path)
            if inside and (folder / path.name).is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a directory", str(folder / path.name))
        if not inside:
            sync(temporary)
            try:
                temporary.replace(folder)
                sync(folder.parent)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # somebody else made it meanwhile
                    raise
        for path in files:
            path.replace(folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the listing of a folder, would survive a power failure."""
    if path.is_file():
        with path.open("r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # not every system lets a folder be opened
        return
    try:
        os.fsync(descriptor)
    except OSError as error:  # nor synced
        if is_full(error):
            raise
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove unfinished files in ``folder`` left by killed processes on this machine."""
    if os.name != "posix":  # elsewhere there is no harmless way to test whether a process runs
        return
    for path in folder.glob("*.tmp"):
        named = re.search(r"\.([\w-]+)\.(\d{1,9})\.tmp$", path.name)
        if not named or named[1] != _machine() or _runs(int(named[2])):
            continue
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:  # not ours, or another process was quicker
            continue


@contextmanager
def locked(folder: Path, *, busy: UserError) -> Iterator[None]:
    """Lock a folder, made if need be; raises ``busy`` where another process, or another part of this one, holds it.

    The lock of a killed process is released. A folder into which nothing was written is removed at the end.
    """
    with _take(folder, busy):
        try:
            yield
        finally:
            with suppress(OSError):  # it is a link, or was removed meanwhile
                if {path.name for path in folder.iterdir()} <= {LOCK}:
                    (folder / LOCK).unlink(missing_ok=True)
                    folder.rmdir()


def held(folder: Path) -> bool | None:
    """Return whether a process holds the folder now; None where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _take(folder: Path, busy: UserError) -> AbstractContextManager[object]:
    """Open and lock the file of a folder; do nothing where the system has no such locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl

            file = (folder / LOCK).open("w")
        except ImportError:
            return nullcontext()
        except FileNotFoundError:  # its last holder just removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                return file
        except BlockingIOError:
            file.close()
            raise busy from None
        except FileNotFoundError:
            pass
        file.close()  # a lock on a file that was removed in the meantime excludes nobody


def _machine() -> str:
    return re.sub(r"[^\w-]", "-", platform.node()) or "here"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
