"""tfcli convert: a model in another format."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from tfcli.cli.lines import note
from tfcli.cli.options import OUTPUT, AnyModel, AsJson, Force


def convert(
    model: AnyModel,
    out: Annotated[str, typer.Argument(metavar="OUT", help="A file ending in .gguf, or a directory.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="gguf, or hf: a Hugging Face directory.",
            show_default="gguf where OUT ends in .gguf, else hf",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="f32, f16 or bf16; for gguf also q8_0 or q4_1.",
            show_default="f16 for gguf, f32 for hf",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(
            "--merge",
            metavar="ADAPTER",
            help="LoRA adapters in PEFT's format, to be merged into MODEL.",
            rich_help_panel="Input",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="Tokenizer of a llama2.c checkpoint.",
            show_default="tokN.bin or tokenizer.bin beside it",
            rich_help_panel="Input",
        ),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in another format: a GGUF file for llama.cpp, or a Hugging Face directory for everything else.

    The tokenizer goes with it. What was written is read again and its logits compared before it is left in place.
    Quantized weights of a GGUF file become plain numbers. With --merge the model is written as its adapters change it,
    and its logits are compared with those of the two apart.

    Example: tfcli convert runs/first first.gguf --type q8_0
    """  # fmt: skip
    from tfcli.formats.convert import convert as write

    made = write(
        model,
        out,
        to=to,
        type=type,
        tokenizer=tokenizer,
        merge=merge,
        force=force,
        on_note=note,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(made) | {"path": str(made.path)}, ensure_ascii=False))
        return
    print(f"{made.path}: {made.type}, {made.bytes / 1e6:,.1f} MB")
    if made.merge_delta is not None:
        print(f"max |delta| of logits: {made.merge_delta:.2g} by merging, of base and adapters apart")
    print(
        f"max |delta| of logits: {made.logit_delta:.2g} when read again, "
        f"{made.logit_change:.2g} from {model} (largest logit {made.largest_logit:.3g})"
    )
