"""Options that mean the same in every command, and helpers that declare one in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from tfcli.config.options import DataOptions, PretrainConfig
from tfcli.config.resolve import default_of
from tfcli.tasks.common.options import FinetuneData

LENGTH, MACHINE, OUTPUT, RUN, TEXT = "Length", "Machine", "Output", "Run", "Text"
ERRORS, ENCODING = default_of(DataOptions, "errors"), default_of(FinetuneData, "encoding")


def option(
    help: str, panel: str | None = None, shown: Any = None, *, name: str = "", metavar: str = "", min: int | None = None
) -> Any:
    """An option under the heading ``panel``, named after its parameter unless ``name`` is given.

    ``shown`` is the default that help shows where leaving the option out (None) means more than nothing.
    """
    default: Any = True if shown is None else str(shown)
    names = [name] if name else []
    return typer.Option(
        *names, help=help, rich_help_panel=panel, show_default=default, metavar=metavar or None, min=min
    )


def flag(name: str, help: str, panel: str | None = None) -> Any:
    """A switch, without the ``--no-`` form that typer would add."""
    return option(help, panel, name=name)


def sets(help: str, panel: str | None = None) -> Any:
    """The --set of a command."""
    return option(help, panel, name="--set", metavar="KEY=VALUE")


def argument(metavar: str, help: str, shown: str | bool = True) -> Any:
    """A positional argument."""
    return typer.Argument(metavar=metavar, help=help, show_default=shown)


Device: TypeAlias = Annotated[str | None, option("cuda, mps or cpu.", MACHINE, "the best available")]
Precision: TypeAlias = Annotated[str | None, option("fp32 or bf16.", MACHINE, "bf16 where native")]
Threads: TypeAlias = Annotated[int | None, option("CPU threads.", MACHINE, "all cores")]
Quantize: TypeAlias = Annotated[str | None, option("Weights in int8 or int4.", MACHINE, "as stored")]

TextKey: TypeAlias = Annotated[str | None, option("Field with the text.", TEXT, "text, content or the only one")]
Errors: TypeAlias = Annotated[str | None, option("Invalid UTF-8: strict or replace.", TEXT, ERRORS)]
Encoding: TypeAlias = Annotated[str | None, option("Encoding of text files, e.g. latin-1.", TEXT, ENCODING)]
Strict: TypeAlias = Annotated[bool, flag("--strict", "Fail on unusable rows instead of skipping them.", TEXT)]

Out: TypeAlias = Annotated[Path | None, option("Directory of the run.", RUN, "runs/NAME")]
Resume: TypeAlias = Annotated[bool, flag("--resume", "Continue a stopped run exactly where it left off.", RUN)]
Config: TypeAlias = Annotated[Path | None, option("Read settings from a TOML file.", RUN)]
Seed: TypeAlias = Annotated[int | None, option("Seed of all randomness.", RUN, default_of(PretrainConfig, "seed"))]
CheckpointEvery: TypeAlias = Annotated[int | None, option("Steps between checkpoints.", RUN, "about a minute")]
ResultAsJson: TypeAlias = Annotated[bool, flag("--json", "Print the result as a JSON object.", RUN)]
Steps: TypeAlias = Annotated[int | None, option("Optimizer steps.", LENGTH)]

AnyModel: TypeAlias = Annotated[str, argument("MODEL", "Model directory, .gguf file or llama2.c checkpoint.")]
Force: TypeAlias = Annotated[bool, flag("--force", "Overwrite existing files.", OUTPUT)]
AsJson: TypeAlias = Annotated[bool, flag("--json", "Print one JSON object.", OUTPUT)]
