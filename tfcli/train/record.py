"""The record of a run, run.json: its directory, what it was started with, and what may change on resuming."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch

from tfcli import disk
from tfcli.config.model import from_stored
from tfcli.config.resolve import from_dict
from tfcli.errors import RunError, TfcliError, UserError
from tfcli.formats.hf import directory as hf
from tfcli.runtime import Runtime
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.read import hf_data
from tfcli.train import checkpoint, metrics
from tfcli.train.plan import Plan
from tfcli.train.runs import DATA_FILE as DATA_FILE
from tfcli.train.runs import RUN_FILE as RUN_FILE
from tfcli.train.runs import RUNS

Record = dict[str, Any]
C = TypeVar("C", bound=object)
KINDS = {"config": dict, "plan": dict, "corpus": list, "machine": dict, "tokenizer_hash": str, "checksums": dict}
"""The entries that a record must have to be resumed, and their types."""


def describe(runtime: Runtime) -> dict[str, Any]:
    """The entries of run.json on what a run computes on and with."""
    machine = {
        "device": str(runtime.device),
        "precision": runtime.precision,
        "threads": runtime.threads,
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
    }
    versions = {"tfcli": version("tfcli"), "torch": torch.__version__, "python": platform.python_version()}
    return {"machine": machine, "versions": versions, "git_commit": git_commit()}


def runtime_of(record: Record | None, *, device: str | None, precision: str | None, threads: int | None) -> Runtime:
    """The runtime that is asked for; what is left out is as it was in the run to resume."""
    before = record["machine"] if record is not None else {}
    return Runtime.detect(
        device=device or before.get("device"),
        precision=precision or before.get("precision"),
        threads=before.get("threads") if threads is None else threads,
    )


def checksums(corpus: Corpus) -> dict[str, int]:
    """Checksums of the ids that the run trains on and is scored on."""
    return {"train": corpus.train.checksum, "val": corpus.val.checksum}


def write(directory: Path, name: str, content: Record) -> None:
    """Write run.json or data.json."""
    disk.write(directory / name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read(directory: Path) -> Record:
    """The record of a run. Raises UserError where it is damaged."""
    path = directory / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _damaged(path, f"cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise _damaged(path, "is not a JSON object")
    missing = [key for key, kind in KINDS.items() if not isinstance(record.get(key), kind)]
    if missing:
        raise _damaged(path, f"lacks {', '.join(missing)}")
    return record


def plan_of(record: Record, directory: Path) -> Plan:
    """The plan of the run. Raises UserError where it is damaged."""
    try:
        fields = dict(record["plan"])
        return Plan(**{**fields, "model": from_stored(fields["model"])})
    except (TypeError, AttributeError, KeyError, ValueError, TfcliError) as error:
        raise _damaged(directory / RUN_FILE, f"has a plan that cannot be read: {error}") from None


def unchanged(record: Record, config: C, sources: dict[str, str], directory: Path) -> C:
    """The run's own settings. Raises UserError with the differences where given settings are others."""
    try:
        before = from_dict(type(config), record["config"])
    except (TypeError, AttributeError, TfcliError) as error:
        raise _damaged(directory / RUN_FILE, f"has settings that cannot be read: {error}") from None
    given = [(key, attrgetter(key)) for key, source in sources.items() if source != "default"]
    changed = [(key, _shown(of(before)), _shown(of(config))) for key, of in given if of(before) != of(config)]
    if changed:
        lines = "; ".join(f"{key}: the run has {old}, given {new}" for key, old, new in changed)
        raise UserError(
            f"{directory} cannot be resumed with other settings: {lines}",
            hint="leave them out to continue as it was, or start a new run with another --out",
        )
    return before


def new_directory(out: str | Path | None, specs: Sequence[str]) -> Path:
    """The directory of a new run: ``out``, else the first of runs/NAME, runs/NAME-2, ... that is free.

    Raises UserError for a directory that holds more than the leftovers of a run killed at its very beginning.
    """
    if out is not None:
        directory = Path(out)
        if not str(out) or (directory.exists() and not directory.is_dir()):
            raise UserError(f"--out {str(out)!r} is not a directory", hint="it must be a new or an empty directory")
        if not is_free(directory):
            if (directory / RUN_FILE).exists():
                hint = f"continue it: {checkpoint.resume_command(directory)}; or choose another --out"
                with suppress(UserError):  # a damaged record: resuming says so
                    hint = "choose another --out" if read(directory).get("finished") else hint
                raise UserError(f"{directory} holds another run", hint=hint)
            raise UserError(f"{directory} is not empty", hint="choose another --out")
        return directory
    name = stem(specs[0]).strip("*") if specs[0] != "-" else "stdin"
    base = RUNS / (name or "run")
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 10_000))
    return next(path for path in candidates if is_free(path) and not disk.held(path))


def stem(spec: str) -> str:
    """The name of a source, for the name of a run."""
    named = hf_data.short(spec) if hf_data.is_named(spec) else Path(spec).name
    return named.split(".")[0]


def is_free(directory: Path) -> bool:
    """Return whether a new run may use the directory: it is absent, empty, or was left by a run with nothing to lose.

    Such a run was killed before its first checkpoint and before its model was first written.
    """
    if not directory.exists():
        return True
    if not directory.is_dir():
        return False
    if (directory / RUN_FILE).exists():
        return not (directory / hf.WEIGHTS).exists() and not checkpoint.complete(directory)
    return all(_is_ours(path.name) for path in directory.iterdir())


def clear(directory: Path) -> None:
    """Remove the leftovers of such a run."""
    checkpoint.clear(directory)
    metrics.clear(directory)
    for path in directory.iterdir():
        if path.name in (DATA_FILE, hf.TOKENIZER) or (_is_ours(path.name) and path.name != disk.LOCK):
            path.unlink()


def _is_ours(name: str) -> bool:
    return name == disk.LOCK or (name.startswith(f".{RUN_FILE}.") and name.endswith(".tmp"))


def resumable(out: str | Path | None, specs: Sequence[str], *, kind: str | None = None) -> Path:
    """The run to continue: ``out``, else the one under runs/ that was started last, on ``specs`` if these are given.

    Finished runs count only where there are no others.
    """
    if out is not None:
        directory = Path(out)
        if not (directory / RUN_FILE).is_file():
            raise UserError(
                f"no run to resume in {directory}", hint=f"a run has a {RUN_FILE}; leave --resume out to start one"
            )
        return directory
    wanted = [absolute(spec) for spec in specs]
    runs: list[tuple[bool, str, Path]] = []
    for path in RUNS.glob(f"*/{RUN_FILE}"):
        with suppress(UserError):  # a damaged one is meant only if --out names it
            record = read(path.parent)
            if record.get("kind") == kind and (not wanted or record["corpus"] == wanted):
                runs.append((not record.get("finished"), str(record.get("started")), path.parent))
    if not runs:
        raise UserError("no run to resume under runs/", hint="name it with --out DIR")
    return max(runs)[2]


def resumed(out: str | Path | None, specs: Sequence[str], *, kind: str | None = None) -> tuple[Path, Record]:
    """The run to continue and its record. Raises UserError for one of another command, or one that is finished."""
    directory = resumable(out, specs, kind=kind)
    before = read(directory)
    if before.get("kind") != kind:
        again = checkpoint.resume_command(directory)
        raise UserError(f"{directory} is a run of {before.get('kind') or 'pretrain'}", hint=f"continue it: {again}")
    if before.get("finished"):
        use = "predict" if kind == "finetune" else "generate --model"
        raise UserError(f"{directory} is finished", hint=f"use it: tfcli {use} {directory}")
    return directory, before


@contextmanager
def full_disk(directory: Path) -> Iterator[None]:
    """Turn a write that finds the disk full into a RunError that says what is saved and how to continue."""
    try:
        yield
    except Exception as error:
        if not disk.is_full(error):
            raise
        whole = checkpoint.complete(directory)
        saved = f"; step {int(whole[-1].name):,} is saved" if whole else ""
        begun = (directory / RUN_FILE).exists()
        how = f"then go on with: {checkpoint.resume_command(directory)}" if begun else "or choose another --out"
        message = f"the disk is full: {directory} cannot be written{saved}"
        raise RunError(message, hint=f"free some space, {how}") from None


def absolute(spec: str) -> str:
    """A source, as it can be found from another directory."""
    if hf_data.is_named(spec):
        return hf_data.absolute(spec)
    return spec if spec == "-" else str(Path(spec).absolute())


def now() -> str:
    """The time as ISO 8601, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}", hint="it is damaged or not tfcli's; start a new run with another --out")


def _shown(value: object) -> str:
    return "its own choice" if value is None else str(value)


def git_commit(checkout: Path = Path(__file__).parents[2]) -> str | None:
    """The commit of tfcli's own checkout or worktree, read without running git; None if there is none.

    It is never that of a repository around it, such as the one whose environment tfcli is installed in.
    """
    with suppress(OSError, ValueError):
        git = checkout / ".git"
        if git.is_file():  # a worktree: "gitdir: " and the path of its own part
            git = checkout / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name, common = head.removeprefix("ref: "), git / "commondir"
        shared = git / common.read_text().strip() if common.is_file() else git
        if (shared / name).is_file():
            return (shared / name).read_text().strip()
        packed = (line.split() for line in (shared / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), None)
    return None
