"""Other engines on the same weights, prompt and threads, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tfcli.benchmark import peer_process as program
from tfcli.errors import RunError, UserError, unknown
from tfcli.formats.open import Opened

Json = dict[str, Any]
SUITES = ("decode", "prefill")
"""The suites that peers are timed in."""
PACKAGES: Mapping[str, str] = MappingProxyType({"llama.cpp": "llama-cpp-python", "transformers": "transformers"})
NAMES: Mapping[str, tuple[str, str | None]] = MappingProxyType(
    {
        "llama.cpp": ("llama.cpp", None),
        "transformers": ("transformers", None),
        "transformers-bf16": ("transformers", "bf16"),
        "transformers-fp32": ("transformers", "fp32"),
    }
)
"""{name: (peer, its precision if that is not ours)}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The work of both sides: continue ``prompt`` (ids) greedily by ``tokens`` tokens."""

    model: Path
    prompt: Sequence[int]
    tokens: int
    threads: int
    device: str
    precision: str


@dataclass(kw_only=True, slots=True)
class Peer:
    """A running peer. ``about`` holds its ``versions``, type of ``weights`` and ``threads``, as it reports them."""

    name: str
    about: Json
    process: subprocess.Popen[str]
    errors: Any
    ids: list[int] = field(default_factory=list)
    """The longest continuation of the prompt so far."""

    def run(self, tokens: int) -> tuple[float, float]:
        """Continue the prompt by ``tokens`` tokens; return the seconds to the first and of the rest."""
        reply = self.ask({"do": "run", "tokens": tokens})
        self.ids = max(self.ids, reply["ids"], key=len)
        return reply["first"], reply["rest"]

    def ask(self, request: Json) -> Json:
        """Send a request and return the reply. Raises RunError, with its last line, if the process ends instead."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        try:
            reply: Json = json.loads(line)
        except ValueError:
            if line:  # it runs on, but does not speak the protocol
                self.process.kill()
            code = self.process.wait()
            self.errors.seek(0)
            lines = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            last = lines[-1] if lines else f"it ended with exit code {code} and said nothing"
            raise RunError(f"{self.name} failed: {last}", hint="try another --model, or leave --against out") from None
        return reply


def chosen(names: Iterable[str]) -> list[str]:
    """Return the peers in ``names``, which may be comma-separated. Raises UserError for an unknown one."""
    listed = [name.strip() for item in names for name in item.split(",") if name.strip()]
    for name in listed:
        if name not in NAMES:
            raise unknown("peer", name, NAMES)
    return list(dict.fromkeys(listed))


def check(names: Iterable[str], model: Opened | None) -> None:
    """Raise UserError for a peer that cannot read ``model`` (None: random weights)."""
    for name in names:
        if NAMES[name][0] == "llama.cpp" and (model is None or model.kind != "gguf"):
            given = f"{model.path} is not one" if model else "random weights are none"
        elif model and model.kind == "llama2.c":
            given = f"{name} does not read {model.path}"
        else:
            continue
        make = f"tfcli convert {model.path if model else 'MODEL'} model.gguf --to gguf"
        reads = "llama.cpp reads GGUF files, and " if NAMES[name][0] == "llama.cpp" else ""
        raise UserError(f"{reads}{given}", hint=f"make a GGUF file and bench that: {make}")


@contextlib.contextmanager
def opened(
    name: str, task: Task, *, python: Path | None = None, script: Path = Path(program.__file__)
) -> Iterator[Peer]:
    """Start a peer that loads the model, in the interpreter ``python`` or, if it is not installed there, in this one.

    Raises UserError if neither has it, and RunError for a peer that fails.
    """
    kind, precision = NAMES[name]
    request = {"do": "prepare", "peer": kind, **asdict(task), "model": str(task.model)}
    request["precision"] = precision or task.precision
    about: Json = {}
    for interpreter in [str(python), sys.executable] if python else [sys.executable]:
        with _started(name, interpreter, script) as peer:
            about = peer.ask(request)
            if "missing" not in about:
                peer.about = about
                yield peer
                return
    tried = f"neither {python} nor this Python has" if python else "this Python does not have"
    raise UserError(
        f"--against {name}: {tried} the module {about['missing']}",
        hint=f"pip install {PACKAGES[kind]}, or name an interpreter that has it: --against-python PATH",
    )


@contextlib.contextmanager
def _started(name: str, interpreter: str, script: Path) -> Iterator[Peer]:
    # Its stderr goes to a file: a pipe that nobody reads would fill up and block it.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            process = subprocess.Popen(
                [interpreter, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        except OSError as error:
            raise UserError(
                f"--against-python {interpreter} cannot be run: {error.strerror}",
                hint="name a Python interpreter, such as other/.venv/bin/python",
            ) from None
        try:
            yield Peer(name=name, about={}, process=process, errors=errors)
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # unread input
                process.communicate()
            process.wait()
