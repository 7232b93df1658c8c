"""tfcli: from a text file to a small, fast language model on the machine you have.

Each command of the command line is one of these functions. Importing tfcli is fast: torch is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "BenchOptions", "DataOptions", "Engine", "EvaluateOptions", "Evaluation", "Generation", "Machine", "RunError",
    "Sampling", "TaskModel", "Tokenizer", "TokenizerOptions", "UserError", "bench", "compress", "convert",
    "evaluate", "finetune", "inspect", "load", "predict", "pretrain",
]  # fmt: skip

if TYPE_CHECKING:
    from tfcli.apply.evaluate import EvaluateOptions, evaluate
    from tfcli.apply.predict import TaskModel, predict
    from tfcli.benchmark.bench import BenchOptions, bench
    from tfcli.compression.quantize import compress
    from tfcli.config.options import DataOptions, Sampling, TokenizerOptions
    from tfcli.errors import RunError, UserError
    from tfcli.formats.convert import convert
    from tfcli.infer.engine import Engine, Generation, load
    from tfcli.inspection.describe import inspect
    from tfcli.runtime import Machine
    from tfcli.tasks.task import Evaluation
    from tfcli.text.corpus.tokenizer import Tokenizer
    from tfcli.train.finetune import finetune
    from tfcli.train.pretrain import pretrain

_MODULES = {
    "tfcli.apply.evaluate": ("EvaluateOptions", "evaluate"),
    "tfcli.apply.predict": ("TaskModel", "predict"),
    "tfcli.benchmark.bench": ("BenchOptions", "bench"),
    "tfcli.compression.quantize": ("compress",),
    "tfcli.config.options": ("DataOptions", "Sampling", "TokenizerOptions"),
    "tfcli.errors": ("RunError", "UserError"),
    "tfcli.formats.convert": ("convert",),
    "tfcli.infer.engine": ("Engine", "Generation", "load"),
    "tfcli.inspection.describe": ("inspect",),
    "tfcli.runtime": ("Machine",),
    "tfcli.tasks.task": ("Evaluation",),
    "tfcli.text.corpus.tokenizer": ("Tokenizer",),
    "tfcli.train.finetune": ("finetune",),
    "tfcli.train.pretrain": ("pretrain",),
}


def __dir__() -> list[str]:
    """The public names, imported or not yet."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
