"""tfcli compress: a smaller model, and what it costs."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tfcli.cli import options
from tfcli.cli.lines import note
from tfcli.cli.options import OUTPUT, TEXT
from tfcli.config.options import DataOptions
from tfcli.config.resolve import resolve
from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.compression.quantize import Compressed


def compress(
    model: options.AnyModel,
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new directory.")],
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", help="Weights in int8 or int4.", show_default=False, rich_help_panel=OUTPUT),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Text to score before and after: file, directory or glob; repeatable.",
            show_default="none",
            rich_help_panel=TEXT,
        ),
    ] = None,
    text_key: options.TextKey = None,
    errors: options.Errors = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
) -> None:
    """Make a model smaller: its weights in 8 or 4 bits; embedding and head in 8.

    OUT is a directory with model.gguf, which tfcli, llama.cpp, ollama, LM Studio and transformers read, and the
    tokenizer's files. It is read again and its logits compared before it is left in place. With --text, perplexity and
    bits per byte before and after are printed.

    Example: tfcli compress runs/first runs/first-int4 --quantize int4 --text held-out.txt
    """  # fmt: skip
    if quantize is None:
        raise UserError("nothing says how to make it smaller", hint="choose --quantize int8 or --quantize int4")
    data, _ = resolve(DataOptions, flags={"text_key": text_key, "errors": errors})
    from tfcli.compression.quantize import compress as write

    made = write(
        model,
        out,
        quantize=quantize,
        text=text or (),
        options=data,
        force=force,
        device=device,
        precision=precision,
        threads=threads,
        on_note=note,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(made) | {"path": str(made.path)}, ensure_ascii=False))
    else:
        _render(made)


def _render(made: Compressed) -> None:
    print(f"{'':14} {'before':>12} {'after':>12}")
    for label, before, after in (
        ("disk", made.disk_before, made.disk_after),
        ("memory", made.memory_before, made.memory_after),
    ):
        print(f"{label:14} {before / 1e6:9,.1f} MB {after / 1e6:9,.1f} MB  x {after / before:.3f}")
    if made.before is not None and made.after is not None:
        for label, name in (("perplexity", "perplexity"), ("bits per byte", "bits_per_byte")):
            was, now = getattr(made.before, name), getattr(made.after, name)
            print(f"{label:14} {was:12.4f} {now:12.4f}  {(now / was - 1):+.2%}")
    if made.plain:
        print(f"{made.plain} matrices stay in 16 bits: their rows are not whole groups of 32", file=sys.stderr)
    print(made.path)
