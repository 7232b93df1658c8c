"""Compiling ``native.cpp`` for this machine: once, in seconds, into the user's own cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "src" / "native.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-pthread")


class NoLibraryError(Exception):
    """The reason why there is no library, in words."""


def load() -> ctypes.CDLL:
    """Load the library, compiling it where the cache has none. Raises NoLibraryError with the reason."""
    compiler, reason = find_compiler(), ""
    for threads in ("-fopenmp", ""):  # without OpenMP, the library has a thread pool of its own
        try:
            return ctypes.CDLL(str(compiled(compiler, threads)))
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines()
            reason = f"{compiler} failed: {lines[0] if lines else 'no output'}"
        except OSError as error:
            reason = str(error)
    raise NoLibraryError(reason)


def find_compiler() -> str:
    """Return the path of the C++ compiler, $CXX or the system's. Raises NoLibraryError where there is none."""
    named = os.environ.get("CXX") or "c++"
    path = next(filter(None, map(shutil.which, (named, "g++", "clang++"))), None)
    if path is None:
        raise NoLibraryError("there is no C++ compiler on this machine")
    return path


def compiled(compiler: str, threads: str) -> Path:
    """Return the library for this source, compiler and processor, from the user's cache or compiled now.

    ``threads`` is the flag for OpenMP, or "" for threads of its own. Raises CalledProcessError and OSError.
    """
    folder = _cache_folder()
    path = folder / f"native-{_fingerprint(compiler, threads)}.so"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            build(compiler, Path(aside), *threads.split()).replace(path)
    return path


def build(compiler: str, folder: Path, *flags: str) -> Path:
    """Compile the library into a folder with FLAGS and ``flags``. Raises CalledProcessError."""
    compiled, linked = folder / "native.o", folder / "native.so"
    # OpenMP is a flag of the compiler and not of the linker: its functions are those that PyTorch has loaded.
    for arguments in ((*FLAGS, *flags, "-c", SOURCE, "-o", compiled), ("-shared", compiled, "-o", linked)):
        subprocess.run([compiler, *map(str, arguments)], check=True, capture_output=True, text=True)
    return linked


def _cache_folder() -> Path:
    """Return the user's own cache, which nobody else can write to; a code file is loaded from nowhere else."""
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or default) / "tfcli"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written to by others; it should be yours alone")
    return folder


def _fingerprint(compiler: str, threads: str) -> str:
    status = Path(compiler).resolve().stat()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            processor = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = ""
    identity = f"{compiler} {status.st_size} {status.st_mtime}"
    parts = (SOURCE.read_text(encoding="utf-8"), *FLAGS, threads, identity, sys.platform, processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
