"""Device, precision and threads, as one explicit value that ``Runtime.detect`` makes. Nothing runs at import."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tfcli.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "fp32", "bf16")
MOST_THREADS = 4_096
"""OpenMP ends the process if it has no memory for all the threads that it is asked for."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """The torch device, dtype of activations and products, and CPU threads of a computation."""

    device: torch.device
    dtype: torch.dtype
    threads: int

    @classmethod
    def detect(cls, *, device: str | None = None, precision: str | None = None, threads: int | None = None) -> Runtime:
        """Choose cuda, then mps, then cpu, and bf16 where the processor multiplies it natively.

        ``threads`` defaults to torch's count in the calling thread; ``active`` applies it. Raises UserError for a
        device that is not there, with the reason.
        """
        import torch

        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise UserError(f"--threads is {threads}", hint=f"it must be from 1 to {MOST_THREADS:,}")
        chosen = _device(device or "auto")
        dtype = _dtype(precision or "auto", chosen)
        return cls(device=chosen, dtype=dtype, threads=threads or torch.get_num_threads())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with ``threads`` CPU threads in the calling thread alone, whose own count is restored afterwards."""
        import torch

        before, openmp = torch.get_num_threads(), _openmp()
        if openmp is None:
            torch.set_num_threads(self.threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)
            return
        library, process = openmp
        # PyTorch's own products are wrong where OpenMP gives fewer threads than they were divided for, and in a child
        # process they wait for ever for threads that only its parent has.
        threads = min(self.threads if process == os.getpid() else 1, library.omp_get_thread_limit())
        dynamic = library.omp_get_dynamic()
        if before == threads and not dynamic:
            yield
            return
        # Not torch.set_num_threads: it also sets the count that threads starting in the meantime would begin with.
        set_mkl = getattr(library, "MKL_Set_Num_Threads_Local", lambda count: 0)
        library.omp_set_dynamic(0)
        library.omp_set_num_threads(threads)
        mkl_before = set_mkl(threads)  # 0: MKL follows OpenMP
        try:
            yield
        finally:
            library.omp_set_dynamic(dynamic)
            library.omp_set_num_threads(before)
            set_mkl(mkl_before)

    def stepped(self, items: Iterator[T]) -> Iterator[T]:
        """Compute each item while this is ``active``; between items the consumer has its own count of threads."""
        while True:
            with self.active():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    @property
    def precision(self) -> str:
        """The dtype's short name: fp32 or bf16."""
        import torch

        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]

    def describe(self) -> str:
        """A phrase for people, such as ``cpu, 2 threads, bf16`` or ``cuda (NVIDIA H100), bf16``."""
        import torch

        if self.device.type == "cuda":
            return f"cuda ({torch.cuda.get_device_name(self.device)}), {self.precision}"
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.device.type == "cpu" else ""
        return f"{self.device.type}{threads}, {self.precision}"

    def synchronize(self) -> None:
        """Wait until the device has finished its work, so that timings are right."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> int:
        """Peak bytes so far: of a device with its own memory, else of the process's resident set."""
        import torch

        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return peak_resident()


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The device, precision and threads that are asked for; None: the best available."""

    device: str | None = None
    """auto, cuda, mps or cpu."""
    precision: str | None = None
    """auto, fp32 or bf16."""
    threads: int | None = None
    """CPU threads."""
    quantize: str | None = None
    """int8 or int4: quantize the weights."""

    def runtime(self) -> Runtime:
        """The runtime that is asked for. Raises UserError for a device that is not there."""
        return Runtime.detect(device=self.device, precision=self.precision, threads=self.threads)


def peak_resident() -> int:
    """Peak resident set of this process in bytes; 0 where the system does not report it."""
    try:
        # Not getrusage, which on Linux starts from the peak of the process that started this one.
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def keep_freed_memory() -> None:
    """Make glibc's malloc keep the memory that torch frees, in the whole process. Has no effect elsewhere.

    A training step allocates the same large tensors again and again. By default each one is a new mmap whose pages
    fault again, which takes up to half the time of a product with a large result.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4  # <malloc.h>: M_TRIM_THRESHOLD, M_MMAP_MAX
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


@functools.cache
def _openmp() -> tuple[ctypes.CDLL, int] | None:
    """The library with torch's OpenMP and MKL, and the process that has their threads; None without it (Windows)."""
    import torch

    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            library.omp_set_num_threads  # noqa: B018
        except (OSError, AttributeError):
            continue
        os.register_at_fork(after_in_child=functools.partial(library.omp_set_num_threads, 1))
        return library, os.getpid()
    return None


def cpu_threads() -> int:
    """Processors that this process may use; does not import torch."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _device(name: str) -> torch.device:
    import torch

    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise unknown("device", name, DEVICES)
    if kind == "auto":
        kind = name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        reason = (
            "this PyTorch is built without CUDA"
            if torch.version.cuda is None
            else "PyTorch sees no CUDA device (driver missing or none installed)"
        )
        raise UserError(f"--device {name}: {reason}", hint="leave --device out to use what is there, or --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: no Apple GPU here", hint="leave --device out to use what is there")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device", hint="for example cuda:0") from None
    if kind == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: only {torch.cuda.device_count()} CUDA device(s) here")
    return chosen


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    import torch

    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision == "auto":
        return torch.bfloat16 if _native_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _native_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 in hardware; emulated bf16 is slower than fp32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
                flags = next(line for line in file if line.startswith(("flags", "Features")))
        except (OSError, StopIteration):
            return False
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))
    return False


def process_started() -> float:
    """The start of this process as of ``time.time()``; now, where the system does not report it."""
    try:
        with open("/proc/self/stat") as file:  # noqa: PTH123
            ticks = float(file.read().rpartition(")")[2].split()[19])  # proc(5): field 22, starttime
        with open("/proc/uptime") as file:  # noqa: PTH123
            uptime = float(file.read().split()[0])
        return time.time() - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
