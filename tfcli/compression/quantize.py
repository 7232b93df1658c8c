"""A model in 8 or 4 bits, saved for other engines: a directory with ``model.gguf`` and the tokenizer's files.

GGUF is read by llama.cpp, ollama, LM Studio and transformers, and its blocks Q8_0 and Q4_1 hold a ``QuantMatrix`` bit
by bit: what is measured here is what runs there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tfcli.config.options import DataOptions
from tfcli.errors import UserError
from tfcli.formats import convert
from tfcli.formats.gguf import families as gguf_families
from tfcli.formats.gguf import save as gguf_save
from tfcli.formats.gguf.vocab_writer import differences
from tfcli.formats.hf import card
from tfcli.formats.open import Opened, open_path
from tfcli.infer.score import Scores, evaluate
from tfcli.model import cost
from tfcli.model.quant.matrix import BITS
from tfcli.model.quant.quantize import Quantization, refuse_twice, weight_bytes
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.text.corpus.encoding import Encoded, encode
from tfcli.text.read import sources
from tfcli.text.tokenizers.codec import Codec
from tfcli.train import notebook

MODEL = "model.gguf"
BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""Files that are copied: transformers reads its settings and the tokenizer from them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """The written model compared with its source."""

    path: Path
    quantize: str
    disk_before: int
    """Bytes of the weight files."""
    disk_after: int
    memory_before: int
    """Bytes of the weights in memory by default."""
    memory_after: int
    plain: int
    """Matrices that stay in 16 bits because their rows are not whole groups of 32."""
    logit_delta: float
    """The largest difference between the logits of the reloaded file and those of the model in memory."""
    before: Scores | None
    after: Scores | None


def compress(
    source: str | Path,
    out: str | Path,
    *,
    quantize: str,
    text: str | Path | Sequence[str | Path] = (),
    options: DataOptions | None = None,
    force: bool = False,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Compressed:
    """Quantize the matrices of the model at ``source`` to 8 or 4 bits and write it to the directory ``out``.

    ``quantize`` is "int8" or "int4"; embedding and head are always quantized to 8 bits. ``text`` (files, directories,
    globs or "-", read as ``options`` say) is scored before and after. Before the file is moved into place it is
    reloaded and its logits are verified; ``force`` overwrites. ``on_note`` is told the device and the current step.
    ``device``, ``precision`` and ``threads`` as in ``load``. Raises UserError for an encoder or a task head (GGUF files
    hold text decoders), for a model that is already quantized, and if ``out`` exists; RunError if the logits differ.

    Example:
        >>> import tfcli
        >>> result = tfcli.compress("runs/first", "runs/first-int8", quantize="int8", text="corpus.txt")
        >>> result.disk_after < result.disk_before
        True
        >>> abs(result.after.perplexity / result.before.perplexity - 1) < 0.1
        True
    """
    source, out, on_note = Path(source), Path(out), on_note or notebook.notes()
    Quantization.of(quantize)
    opened = open_path(source)
    config = opened.config
    gguf_families.written(config, name=str(source))
    if opened.head is not None:
        hint = "predict and evaluate take --quantize and quantize it while loading"
        raise convert.no_place_for_head(source, hint=hint)
    _check_place(opened, source, out, force)
    runtime = Runtime.detect(device=device, precision=precision, threads=threads)
    on_note(f"device: {runtime.describe()}")
    specs = [str(spec) for spec in ([text] if isinstance(text, str | Path) else text)]
    before = after = None
    with runtime.active(), tempfile.TemporaryDirectory(prefix="tfcli-") as spool:
        inputs = sources.find(specs, spool=Path(spool), on_note=on_note) if specs else []
        model, codec = None, None
        if inputs:
            model, codec = opened.load(runtime=runtime)
            refuse_twice(model, str(source))
            encoded = encode(sources.read(inputs, options or DataOptions()), codec, begin=True)
            if not encoded.bytes:
                raise UserError("there is no text to score", hint="name a file with text by --text")
            on_note(f"scoring {len(encoded.ids)} tokens with {source}")
            before = _scores(model, codec, runtime, encoded)
        del model, codec
        on_note(f"quantizing {source} to {BITS[quantize]} bits")
        with convert.written(out, directory=True) as aside:
            delta = _write(opened, source, aside, quantize, runtime, on_note)
            compressed = open_path(aside)
            model, codec = compressed.load(runtime=runtime)
            if inputs:
                on_note(f"scoring {len(encoded.ids)} tokens with the written model")
                after = _scores(model, codec, runtime, encoded)
            disk = compressed.stored_bytes
    return Compressed(
        path=out,
        quantize=quantize,
        disk_before=opened.stored_bytes,
        disk_after=disk,
        memory_before=cost.weight_bytes(config, "fp32" if runtime.dtype == torch.float32 else "bf16"),
        memory_after=weight_bytes(model),
        plain=sum(parameter.dim() == 2 for parameter in model.parameters()),
        logit_delta=delta,
        before=before,
        after=after,
    )


def _check_place(model: Opened, source: Path, out: Path, force: bool) -> None:
    convert.check_place(model, source, out, directory=True, force=force)
    others = [path.name for path in (*out.glob("*.safetensors"), *out.glob("*.gguf")) if path.name != MODEL]
    if others:
        raise UserError(f"{out} holds another model ({others[0]})", hint="choose another directory")


def _write(
    opened: Opened, source: Path, aside: Path, quantize: str, runtime: Runtime, on_note: Callable[[str], None]
) -> float:
    """Write the directory; return the largest difference between its logits and those of the model in memory."""
    model, codec = opened.load(runtime=runtime, dtype=torch.float32, quantize=quantize, whole_groups=True)
    convert.round_numbers(model, torch.float16, torch.float32, str(source))
    inexact = differences(codec)
    for difference in inexact:
        on_note(f"llama.cpp will tokenize some texts differently: {difference}")
    expected = convert.probe(model)
    gguf_save.save(aside / MODEL, model, codec, name=source.resolve().stem)
    for name in BESIDE if source.is_dir() else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, aside / name)
    readme = card.of_gguf(
        source.resolve().stem, MODEL, bits=BITS[quantize], transformers=(aside / "config.json").is_file()
    )
    (aside / "README.md").write_text(readme, encoding="utf-8", newline="\n")
    del model
    on_note("verifying the file")
    again = convert.read_again(aside, expected, codec, runtime, exact=not inexact)
    return float((again - expected).abs().max())


def _scores(model: Transformer, codec: Codec, runtime: Runtime, text: Encoded) -> Scores:
    return evaluate(model, text.ids, text_bytes=text.bytes, codec=codec, runtime=runtime).checked()
