"""A fresh process that loads a model, generates, and reports its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.errors import RunError

if TYPE_CHECKING:
    from tfcli.runtime import Runtime


def started(model: Path, runtime: Runtime, *, quantize: str | None, prompt: str, tokens: int) -> dict[str, Any]:
    """Start a process that generates with ``model`` and return what it measured.

    That is ``program_bytes``, resident after torch is imported (0 on a device with memory of its own),
    ``resident_bytes`` and ``peak_bytes`` at the end, and ``first_token_seconds`` since the process began. Raises
    RunError if it fails.
    """
    where = {"device": str(runtime.device), "precision": runtime.precision, "threads": runtime.threads}
    task = {**where, "model": str(model), "quantize": quantize, "prompt": prompt, "tokens": tokens}
    # -P: never import modules of the current folder, whatever their names.
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.append({root!r}); from tfcli.benchmark.fresh import main; main()"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, encoding="utf-8")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise RunError(f"a process that generates failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def generate(task: dict[str, Any]) -> dict[str, Any]:
    """Load the model, continue the prompt greedily, and measure this process's memory."""
    import time

    from tfcli.config.options import Sampling
    from tfcli.infer.engine import load
    from tfcli.runtime import process_started

    program = resident()
    engine = load(task["model"], **{key: task[key] for key in ("device", "precision", "threads", "quantize")})
    sampling = Sampling(max_tokens=task["tokens"], temperature=0.0, ignore_eos=True)
    events = engine.stream(task["prompt"], sampling)
    next(events)
    first = time.time() - process_started()
    for _ in events:
        pass
    apart = engine.runtime.device.type == "cuda"
    peak = engine.runtime.peak_memory()
    return {
        "program_bytes": 0 if apart else program,
        "resident_bytes": peak if apart else resident(),
        "peak_bytes": peak,
        "first_token_seconds": first,
    }


def resident() -> int:
    """Return the resident bytes of this process; its peak if the system does not report them."""
    from tfcli.runtime import peak_resident

    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return peak_resident()


def main() -> None:
    """Read a task from stdin and write what was measured to stdout."""
    from tfcli.runtime import keep_freed_memory

    keep_freed_memory()  # as ``tfcli`` itself does
    print(json.dumps(generate(json.load(sys.stdin))))
