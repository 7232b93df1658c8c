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
    """Why there is no library, in words."""


def load() -> ctypes.CDLL:
    """The library, made where it was never made before. Raises NoLibraryError with the reason."""
    compiler, reason = find_compiler(), ""
    for threads in ("-fopenmp", ""):  # without, the library has threads of its own
        try:
            return ctypes.CDLL(str(_compiled(compiler, threads)))
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines()
            reason = f"{compiler} failed: {said[0] if said else 'without a word'}"
        except OSError as error:
            reason = str(error)
    raise NoLibraryError(reason)


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX or the system's. Raises NoLibraryError where there is none."""
    named = os.environ.get("CXX") or "c++"
    found = next(filter(None, map(shutil.which, (named, "g++", "clang++"))), None)
    if found is None:
        raise NoLibraryError("there is no C++ compiler on this machine")
    return found


def _compiled(compiler: str, threads: str) -> Path:
    """The shared library for this source, compiler and processor, from the user's cache or made now."""
    folder = _cache_folder()
    path = folder / f"native-{_fingerprint(compiler, threads)}.so"
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        build(compiler, Path(aside), *threads.split()).replace(path)
    return path


def build(compiler: str, folder: Path, *flags: str) -> Path:
    """The shared library in a folder, compiled with FLAGS and these. Raises CalledProcessError."""
    compiled, linked = folder / "native.o", folder / "native.so"
    # OpenMP is asked for when compiling and not when linking: its functions are those that PyTorch has loaded.
    for arguments in ((*FLAGS, *flags, "-c", SOURCE, "-o", compiled), ("-shared", compiled, "-o", linked)):
        subprocess.run([compiler, *map(str, arguments)], check=True, capture_output=True, text=True)
    return linked


def _cache_folder() -> Path:
    """The user's own cache, which nobody else can write to; a code file is loaded from nowhere else."""
    base = os.environ.get("XDG_CACHE_HOME") or (
        Path.home() / "Library" / "Caches" if sys.platform == "darwin" else Path.home() / ".cache"
    )
    folder = Path(base) / "tfcli"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written to by others; it should be yours alone")
    return folder


def _fingerprint(compiler: str, threads: str) -> str:
    about = Path(compiler).resolve().stat()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            processor = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = ""
    parts = (
        SOURCE.read_text(encoding="utf-8"),
        *FLAGS,
        threads,
        f"{compiler} {about.st_size} {about.st_mtime}",
        sys.platform,
        processor,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
