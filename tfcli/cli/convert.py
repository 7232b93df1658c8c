"""tfcli convert: a model in another format."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from tfcli.cli import options
from tfcli.cli.options import OUTPUT, argument, option
from tfcli.cli.output import note, show_json

INPUT = "Input"
TO, TO_SHOWN = "gguf, or hf: a Hugging Face directory.", "gguf if OUT ends in .gguf, else hf"
TYPE, TYPE_SHOWN = "f32, f16 or bf16; for gguf also q8_0 or q4_1.", "f16 for gguf, f32 for hf"
MERGE = "LoRA adapters in PEFT format to merge into MODEL."
TOKENIZER, TOKENIZER_SHOWN = "Tokenizer of a llama2.c checkpoint.", "tokN.bin or tokenizer.bin beside it"


def convert(
    model: options.AnyModel,
    out: Annotated[str, argument("OUT", "A file ending in .gguf, or a directory.")],
    to: Annotated[str | None, option(TO, OUTPUT, TO_SHOWN)] = None,
    type: Annotated[str | None, option(TYPE, OUTPUT, TYPE_SHOWN)] = None,
    merge: Annotated[str | None, option(MERGE, INPUT, metavar="ADAPTER")] = None,
    tokenizer: Annotated[str | None, option(TOKENIZER, INPUT, TOKENIZER_SHOWN)] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Convert a model to a GGUF file for llama.cpp, or to a Hugging Face directory for everything else.

    The tokenizer is converted with it. Before the result is moved into place it is reloaded and its logits are
    verified. Quantized weights of a GGUF file are dequantized. With --merge the adapters are merged into the weights,
    and the logits are verified against those of base and adapters apart.

    Example: tfcli convert runs/first first.gguf --type q8_0
    """
    from tfcli.formats.convert import convert as write

    result = write(model, out, to=to, type=type, tokenizer=tokenizer, merge=merge, force=force, on_note=note)
    if as_json:
        show_json(dataclasses.asdict(result) | {"path": str(result.path)})
        return
    print(f"{result.path}: {result.type}, {result.bytes / 1e6:,.1f} MB")
    if result.merge_delta is not None:
        print(f"max |delta| of logits: {result.merge_delta:.2g} by merging, of base and adapters apart")
    print(
        f"max |delta| of logits: {result.logit_delta:.2g} when reloaded, "
        f"{result.logit_change:.2g} from {model} (largest logit {result.largest_logit:.3g})"
    )
