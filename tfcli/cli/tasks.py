"""Which task a model was finetuned for, and the model that answers it: for predict and evaluate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.formats.heads import Loaded
    from tfcli.runtime import Runtime
    from tfcli.tasks.fill import FillPredictor
    from tfcli.tasks.task import Predictor


def task_of(model: str) -> str | None:
    """The task that a model directory was finetuned for; None for a model of none, or for what is no directory."""
    path = Path(model)
    if not (path / "config.json").is_file():
        return None
    from tfcli.formats.head_names import kind_of
    from tfcli.formats.stored import read_data
    from tfcli.tasks.applications import APPLICATIONS, KINDS

    about = read_data(path)
    ours = about.get("tfcli")
    name = ours.get("task") if isinstance(ours, dict) else None
    name = name or KINDS.get(kind_of(about) or "")
    return name if isinstance(name, str) and name in APPLICATIONS else None


def load(
    model: str, name: str, device: str | None, precision: str | None, threads: int | None, quantize: str | None
) -> Predictor:
    """The finetuned model in a directory, ready to answer. Raises UserError as ``formats.heads.load`` does."""
    from tfcli.tasks.applications import application

    loaded, runtime = _loaded(model, device, precision, threads, quantize)
    return application(name).predictor(loaded.model, loaded.codec, loaded.about, runtime)


def filler(
    model: str, device: str | None, precision: str | None, threads: int | None, quantize: str | None
) -> FillPredictor:
    """The masked-language model in a directory, ready to fill in; UserError for a model that does not."""
    from tfcli.tasks.fill import FillPredictor

    loaded, _ = _loaded(model, device, precision, threads, quantize)
    return FillPredictor(loaded.model, loaded.codec)


def _loaded(
    model: str, device: str | None, precision: str | None, threads: int | None, quantize: str | None
) -> tuple[Loaded, Runtime]:
    if quantize is not None:
        raise UserError("--quantize does not go with a finetuned model's head", hint="leave it out, or --task embed")
    from tfcli.formats import heads
    from tfcli.runtime import Runtime

    runtime = Runtime.detect(device=device, precision=precision, threads=threads)
    print(f"device: {runtime.describe()}", file=sys.stderr)
    loaded = heads.load(model, runtime=runtime)
    loaded.model.requires_grad_(False)
    return loaded, runtime
