"""tfcli compress: a smaller model, and what it costs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from tfcli.cli import options
from tfcli.cli.options import OUTPUT, TEXT, argument, option
from tfcli.cli.output import note, show_json
from tfcli.config.options import DataOptions
from tfcli.config.resolve import resolve
from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.compression.quantize import Compressed

SCORED = "Text to score before and after: file, directory or glob; repeatable."


def compress(
    model: options.AnyModel,
    out: Annotated[str, argument("OUT", "A new directory.")],
    quantize: Annotated[str | None, option("Weights in int8 or int4.", OUTPUT)] = None,
    text: Annotated[list[str] | None, option(SCORED, TEXT, "none")] = None,
    text_key: options.TextKey = None,
    errors: options.Errors = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
) -> None:
    """Quantize a model's weights to 8 or 4 bits; embedding and head to 8.

    OUT gets model.gguf, which tfcli, llama.cpp, ollama, LM Studio and transformers read, and the tokenizer's files.
    Before it is moved into place the model is reloaded and its logits are verified. With --text, perplexity and bits
    per byte before and after are printed.

    Example: tfcli compress runs/first runs/first-int4 --quantize int4 --text held-out.txt
    """
    if quantize is None:
        raise UserError("nothing says how to compress the model", hint="choose --quantize int8 or --quantize int4")
    data, _ = resolve(DataOptions, flags={"text_key": text_key, "errors": errors})
    from tfcli.compression.quantize import compress as write

    result = write(
        model, out, quantize=quantize, text=text or (), options=data, force=force, device=device, precision=precision,
        threads=threads, on_note=note,
    )  # fmt: skip
    if as_json:
        show_json(dataclasses.asdict(result) | {"path": str(result.path)})
    else:
        _render(result)


def _render(result: Compressed) -> None:
    print(f"{'':14} {'before':>12} {'after':>12}")
    sizes = [("disk", result.disk_before, result.disk_after), ("memory", result.memory_before, result.memory_after)]
    for label, size, smaller in sizes:
        print(f"{label:14} {size / 1e6:9,.1f} MB {smaller / 1e6:9,.1f} MB  x {smaller / size:.3f}")
    if (old := result.before) is not None and (new := result.after) is not None:
        scores = [("perplexity", old.perplexity, new.perplexity)]
        scores += [("bits per byte", old.bits_per_byte, new.bits_per_byte)]
        for label, before, after in scores:
            print(f"{label:14} {before:12.4f} {after:12.4f}  {(after / before - 1):+.2%}")
    if result.plain:
        note(f"{result.plain} matrices stay in 16 bits: their rows are not a multiple of 32")
    print(result.path)
