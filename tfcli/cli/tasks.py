"""Which task a model was finetuned for, and the model that answers it: for predict and evaluate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tfcli.cli.lines import note
from tfcli.cli.options import Machine

if TYPE_CHECKING:
    from tfcli.formats.hf.heads import Loaded
    from tfcli.objectives.fill import FillPredictor
    from tfcli.runtime import Runtime
    from tfcli.tasks.task import Predictor


def task_of(model: str) -> str | None:
    """The task that a model directory, or one of adapters, was finetuned for; None for none and for files.

    Raises UserError where there is nothing.
    """
    if not Path(model).is_dir():
        if not Path(model).exists():
            from tfcli.formats.open import read_config

            read_config(model)  # which says so
        return None
    from tfcli.formats.open import about_of
    from tfcli.tasks.applications import APPLICATIONS, of_head

    about, kind = about_of(model)
    ours = about.get("tfcli")
    name = ours.get("task") if isinstance(ours, dict) else None
    name = name or of_head(kind)
    return name if isinstance(name, str) and name in APPLICATIONS else None


def fills_in(model: str) -> bool:
    """Whether a model directory has the head of a masked-language model, and no task of its own."""
    if not Path(model).is_dir():
        return False
    from tfcli.formats.open import about_of

    return about_of(model)[1] == "masked"


def load(
    model: str, name: str, device: str | None, precision: str | None, threads: int | None, quantize: str | None
) -> Predictor:
    """The finetuned model in a directory, ready to answer. Raises UserError as ``formats.models.load_whole`` does."""
    from tfcli.tasks.applications import application

    loaded, runtime = _loaded(model, Machine(device, precision, threads, quantize))
    return application(name).predictor(loaded.model, loaded.codec, loaded.about, runtime)


def filler(
    model: str, device: str | None, precision: str | None, threads: int | None, quantize: str | None
) -> FillPredictor:
    """The masked-language model in a directory, ready to fill in; UserError for a model that does not."""
    from tfcli.objectives.fill import FillPredictor

    loaded, _ = _loaded(model, Machine(device, precision, threads, quantize))
    return FillPredictor(loaded.model, loaded.codec)


def _loaded(model: str, machine: Machine) -> tuple[Loaded, Runtime]:
    from tfcli.formats import open as models
    from tfcli.model.quant.quantize import Quantization, quantize_model

    runtime = machine.runtime()
    print(f"device: {runtime.describe()}", file=sys.stderr)
    loaded = models.load_whole(model, runtime=runtime, on_note=note)
    if machine.quantize is not None:
        quantize_model(loaded.model, Quantization.of(machine.quantize), name=model)
    loaded.model.requires_grad_(False)
    return loaded, runtime
