"""The runs that there are, and which of them is meant where none is named. Imports no torch."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from tfcli.errors import UserError
from tfcli.formats.hf.stored import ADAPTER, CONFIG

RUNS = Path("runs")
"""Where runs go whose place is not named."""
RUN_FILE, DATA_FILE = "run.json", "data.json"
"""What makes a directory a run, and its data report."""
MARKER = "complete.json"
"""The file that a checkpoint is whole with."""


def find_model(given: str | None, *, generates: bool = False) -> Path:
    """The model to use: ``given``, else $TFCLI_MODEL, else the run under ``runs/`` that finished last.

    ``generates``: of these runs, one whose model writes text. Raises UserError where there is none. A command says on
    stderr which it is, where it was not given.
    """
    if given is not None:
        return Path(given)
    if os.environ.get("TFCLI_MODEL"):
        return Path(os.environ["TFCLI_MODEL"])
    finished: list[tuple[float | str, Path]] = []
    for path in RUNS.glob(f"*/{RUN_FILE}"):
        if not any(path.parent.glob("*model.safetensors")):  # of adapters another name than of a whole model
            continue
        with suppress(OSError, ValueError, AttributeError):
            if generates and not _generates(path.parent):
                continue
            stamp = json.loads(path.read_bytes()).get("finished")
            if isinstance(stamp, int | float | str) and stamp:
                finished.append((stamp, path.parent))
    if not finished:
        raise UserError(
            "no model was named, and no run under runs/ has finished",
            hint="name one with --model or $TFCLI_MODEL, or make one: tfcli pretrain corpus.txt",
        )
    return max(finished, key=lambda entry: (isinstance(entry[0], str), entry[0]))[1]


def _generates(directory: Path) -> bool:
    """Whether a run's model writes text, by the class that it is for; adapters, by PEFT's name of their task."""
    config = directory / CONFIG
    if not config.is_file():
        return "LM" in str(json.loads((directory / ADAPTER).read_bytes()).get("task_type"))
    made_for = json.loads(config.read_bytes()).get("architectures") or ()
    return any(str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in made_for)
