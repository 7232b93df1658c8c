"""The runs under runs/, and the default model among them. Imports no torch."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from tfcli.errors import UserError
from tfcli.formats.hf.stored import ADAPTER, CONFIG

RUNS = Path("runs")
"""The default parent directory of runs."""
RUN_FILE, DATA_FILE = "run.json", "data.json"
"""The record that makes a directory a run, and its data report."""
MARKER = "complete.json"
"""The file that marks a checkpoint as whole."""


def find_model(given: str | None, *, generates: bool = False) -> Path:
    """The model to use: ``given``, else $TFCLI_MODEL, else the run under ``runs/`` that finished last.

    With ``generates`` only runs whose model generates text count. Raises UserError if there is none. A command names
    the model on stderr where it was not given.
    """
    if given is not None:
        return Path(given)
    if os.environ.get("TFCLI_MODEL"):
        return Path(os.environ["TFCLI_MODEL"])
    finished: list[tuple[float | str, Path]] = []
    for path in RUNS.glob(f"*/{RUN_FILE}"):
        if not any(path.parent.glob("*model.safetensors")):  # adapters have another name than a whole model
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
    """Return whether a run's model generates text, by its architectures; adapters, by PEFT's name of their task."""
    config = directory / CONFIG
    if not config.is_file():
        return "LM" in str(json.loads((directory / ADAPTER).read_bytes()).get("task_type"))
    made_for = json.loads(config.read_bytes()).get("architectures") or ()
    return any(str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in made_for)
