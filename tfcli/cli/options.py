"""Options that mean the same in every command, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from tfcli.config.options import DataOptions, PretrainConfig
from tfcli.config.resolve import default_of
from tfcli.tasks.common.options import FinetuneData

LENGTH, MACHINE, OUTPUT, RUN, TEXT = "Length", "Machine", "Output", "Run", "Text"


def sets(help: str, panel: str | None) -> Any:
    """--set, which takes other settings in each command."""
    return typer.Option("--set", metavar="KEY=VALUE", help=help, rich_help_panel=panel)


def text_key(panel: str | None) -> Any:
    """--text-key, in a panel or in none."""
    return typer.Option(
        "--text-key", help="Field with the text.", show_default="text, content or the only one", rich_help_panel=panel
    )


def errors(panel: str | None) -> Any:
    """--errors, in a panel or in none."""
    return typer.Option(
        "--errors",
        help="Invalid UTF-8: strict or replace.",
        show_default=default_of(DataOptions, "errors"),
        rich_help_panel=panel,
    )


Device: TypeAlias = Annotated[
    str | None,
    typer.Option("--device", help="cuda, mps or cpu.", show_default="the best there is", rich_help_panel=MACHINE),
]
Precision: TypeAlias = Annotated[
    str | None,
    typer.Option("--precision", help="fp32 or bf16.", show_default="bf16 where native", rich_help_panel=MACHINE),
]
Threads: TypeAlias = Annotated[
    int | None, typer.Option("--threads", help="CPU threads.", show_default="all cores", rich_help_panel=MACHINE)
]
Quantize: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--quantize", help="Weights in int8 or int4.", show_default="as they are stored", rich_help_panel=MACHINE
    ),
]
TextKey: TypeAlias = Annotated[str | None, text_key(TEXT)]
Errors: TypeAlias = Annotated[str | None, errors(TEXT)]
Encoding: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--encoding",
        help="Of text files, as latin-1.",
        show_default=default_of(FinetuneData, "encoding"),
        rich_help_panel=TEXT,
    ),
]
Strict: TypeAlias = Annotated[
    bool,
    typer.Option("--strict", help="Rows that cannot be used are an error, not counted.", rich_help_panel=TEXT),
]

Out: TypeAlias = Annotated[
    Path | None, typer.Option("--out", help="Directory of the run.", show_default="runs/NAME", rich_help_panel=RUN)
]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Continue a stopped run exactly where it was.", rich_help_panel=RUN)
]
Config: TypeAlias = Annotated[
    Path | None, typer.Option("--config", help="Settings from a TOML file.", rich_help_panel=RUN)
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Of all that is random.",
        show_default=str(default_of(PretrainConfig, "seed")),
        rich_help_panel=RUN,
    ),
]
CheckpointEvery: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-every", help="Steps between checkpoints.", show_default="about a minute", rich_help_panel=RUN
    ),
]
ResultAsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="The result as a JSON object.", rich_help_panel=RUN)
]
Steps: TypeAlias = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.", rich_help_panel=LENGTH)]

AnyModel: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model directory, .gguf file, or a checkpoint of llama2.c.")
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Overwrite what is there.", rich_help_panel=OUTPUT)]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="One JSON object.", rich_help_panel=OUTPUT)]
