"""Options that mean the same in every command, declared once."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

MACHINE, TEXT = "Machine", "Text"

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
TextKey: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--text-key", help="Field with the text.", show_default="text, content or the only one", rich_help_panel=TEXT
    ),
]
Errors: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--errors", help="Invalid UTF-8: strict or replace.", show_default="strict", rich_help_panel=TEXT
    ),
]  # fmt: skip
Encoding: TypeAlias = Annotated[
    str | None,
    typer.Option("--encoding", help="Of text files, as latin-1.", show_default="utf-8", rich_help_panel=TEXT),
]
Strict: TypeAlias = Annotated[
    bool,
    typer.Option("--strict", help="Rows that cannot be used are an error, not counted.", rich_help_panel=TEXT),
]
