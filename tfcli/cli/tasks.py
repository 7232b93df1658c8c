"""Which task a model was finetuned for, and the model that answers it: for predict and evaluate."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tfcli.cli.lines import note
from tfcli.cli.options import Machine

if TYPE_CHECKING:
    from tfcli.formats.hf.heads import Loaded
    from tfcli.formats.open import Opened
    from tfcli.objectives.fill import FillPredictor
    from tfcli.runtime import Runtime
    from tfcli.tasks.task import Predictor


def task_of(model: Opened) -> str | None:
    """The task that a model was finetuned for; None for none and for files.

    Raises UserError where there is nothing.
    """
    from tfcli.tasks.applications import APPLICATIONS, of_head

    ours = model.hf_config.get("tfcli")
    name = ours.get("task") if isinstance(ours, dict) else None
    name = name or of_head(model.head)
    return name if isinstance(name, str) and name in APPLICATIONS else None


def load(
    model: Opened, name: str, device: str | None, precision: str | None, threads: int | None, quantize: str | None
) -> Predictor:
    """The finetuned model, ready to answer. Raises UserError as ``Opened.load_whole`` does."""
    from tfcli.tasks.applications import application

    loaded, runtime = _loaded(model, Machine(device, precision, threads, quantize))
    return application(name).predictor(loaded.model, loaded.codec, loaded.hf_config, runtime)


def filler(
    model: Opened, device: str | None, precision: str | None, threads: int | None, quantize: str | None
) -> FillPredictor:
    """The masked-language model in a directory, ready to fill in; UserError for a model that does not."""
    from tfcli.objectives.fill import FillPredictor

    loaded, _ = _loaded(model, Machine(device, precision, threads, quantize))
    return FillPredictor(loaded.model, loaded.codec)


def _loaded(model: Opened, machine: Machine) -> tuple[Loaded, Runtime]:
    from tfcli.model.quant.quantize import Quantization, quantize_model

    runtime = machine.runtime()
    print(f"device: {runtime.describe()}", file=sys.stderr)
    loaded = model.load_whole(runtime=runtime, on_note=note)
    if machine.quantize is not None:
        quantize_model(loaded.model, Quantization.of(machine.quantize), name=str(model.path))
    loaded.model.requires_grad_(False)
    return loaded, runtime
