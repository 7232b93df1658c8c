"""Conversion of models: written aside, loaded again, and moved into place only if the logits are the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tfcli import disk
from tfcli.errors import RunError, UserError, unknown
from tfcli.formats.gguf import families as gguf_families
from tfcli.formats.gguf import save as gguf_save
from tfcli.formats.gguf.vocab_writer import differences
from tfcli.formats.hf import adapters
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf.families import registry as families
from tfcli.formats.hf.heads import Loaded, of_task
from tfcli.formats.hf.tokenizer_json import tokenizer_json
from tfcli.formats.open import Opened, open_path
from tfcli.model import heads, lora
from tfcli.model.heads import MaskedHead
from tfcli.model.quant.quantize import Quantization, dequantize_model, quantize_model
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer, Roles
from tfcli.text.tokenizers.sentencepiece import Tokenizer

FORMATS = ("gguf", "hf")
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
QUANTIZED = {"q8_0": "int8", "q4_1": "int4"}
DEFAULTS = {"gguf": "f16", "hf": "f32"}
PROBE_TOKENS = 64
PROBE_TEXTS = (
    "Once upon a time, there was a king.",
    "  def f(x):\n\treturn x ** 2  # 12345",
    "Füße, 从前, café \U0001f600\n\n!",
)
CLOSE = 1e-4
"""Largest difference, as a share of the largest logit, between a model that was written and loaded again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """The result of a conversion."""

    path: Path
    format: str
    type: str
    bytes: int
    """Size of the weights."""
    logit_delta: float
    """The largest difference of its logits on a probe to those of the model in memory."""
    logit_change: float
    """The largest difference of its logits to those of the source: the cost of ``type``."""
    largest_logit: float
    merge_delta: float | None = None
    """The largest difference of the logits by merging adapters; None without adapters."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    type: str | None = None,
    tokenizer: str | Path | None = None,
    merge: str | Path | None = None,
    force: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> Converted:
    """Write the model at ``source`` in another format: a GGUF file or a Hugging Face directory ``out``.

    ``to`` is "gguf" or "hf" (default: "gguf" where ``out`` ends in .gguf); ``type`` of the matrices f32, f16, bf16 and
    for GGUF also q8_0 and q4_1 (default: ``DEFAULTS``); q4_1 keeps embedding and head in q8_0. ``tokenizer`` goes with
    a llama2.c checkpoint; ``merge`` is a directory of adapters in PEFT's format, which are merged into the weights.
    ``force`` overwrites. Raises UserError for a model that the format does not support, RunError where the written
    model does not give the same logits; then nothing is left.

    Example:
        >>> import tfcli
        >>> converted = tfcli.convert("runs/first", "first.gguf", type="q8_0")
        >>> converted.format, converted.type, converted.logit_delta < 0.001
        ('gguf', 'q8_0', True)
        >>> tfcli.convert("first.gguf", "runs/again").format
        'hf'
    """
    source, out = Path(source), Path(out)
    to = to or ("gguf" if out.suffix == ".gguf" else "hf")
    type = check(to, type)
    opened = open_path(source)
    if to == "hf":
        families.written(opened.config)
    else:
        gguf_families.written(opened.config, name=str(source))
        if out.suffix != ".gguf":
            raise UserError(f"{out} does not end in .gguf", hint=f"name a file: {out.with_suffix('.gguf')}")
    check_place(opened, source, out, directory=to == "hf", force=force)
    runtime = Runtime.detect(device="cpu", precision="fp32")
    loaded = opened.load_whole(runtime=runtime, tokenizer=tokenizer, on_note=on_note)
    merge_delta = None
    if merge is not None:
        loaded, merge_delta = merged(loaded, Path(merge), on_note)
    model, codec = loaded.model, loaded.codec
    head = heads.of(model)
    if head is not None and not head.labels and on_note:
        on_note(f"{source}: its pooler is not written, as it has no head that uses it")
    if to == "gguf" and head is not None and head.labels and not isinstance(head, MaskedHead):
        raise no_place_for_head(merge or source, hint="write --to hf")
    inexact = differences(codec) if to == "gguf" else []
    for difference in inexact:
        if on_note:
            on_note(f"llama.cpp will tokenize some texts differently: {difference}")
    before = probe(model)
    as_stored(model, to, type, str(source))
    expected = probe(model)
    with written(out, directory=to == "hf") as aside:
        if to == "gguf":
            plain = type.upper() if type in PLAIN else "F16"
            gguf_save.save(aside, model, codec, type=plain, name=source.resolve().stem)
        else:
            hf.save(aside, model, portable(codec), dtype=PLAIN[type], about=of_task(loaded.hf_config))
        del model
        after = read_again(aside, expected, codec, runtime, exact=not inexact)
        size = open_path(aside).stored_bytes
    return Converted(
        path=out,
        format=to,
        type=type,
        bytes=size,
        logit_delta=float((after - expected).abs().max()),
        logit_change=float((after - before).abs().max()),
        largest_logit=float(before.abs().max()),
        merge_delta=merge_delta,
    )


def merged(base: Loaded, directory: Path, on_note: Callable[[str], None] | None = None) -> tuple[Loaded, float]:
    """Merge the adapters of a directory into a model, in place, with the head and the task that are stored with them.

    Returns also the largest difference of the logits by merging. Raises UserError as ``adapters.load``, RunError where
    the logits are not the same.
    """
    loaded = adapters.put_on(base, directory, on_note=on_note)
    model = loaded.model
    apart = probe(model)
    lora.merge(model)
    dequantize_model(model, torch.float32)  # those without an adapter: all can be quantized again
    difference, largest = float((probe(model) - apart).abs().max()), float(apart.abs().max())
    if not difference <= CLOSE * max(1.0, largest):
        raise RunError(
            f"merging changes the logits by up to {difference:.3g}, of {largest:.3g}",
            hint="the adapters are too large for these weights",
        )
    return loaded, difference


def no_place_for_head(name: str | Path, *, hint: str) -> UserError:
    """Return the error for a model with a task head that is to become a GGUF file."""
    return UserError(f"{name} has a task head, which a GGUF file cannot hold", hint=hint)


def check(to: str, type: str | None) -> str:
    """Return the type to store. Raises UserError for an unknown format or type and for a pair that does not exist."""
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    if type is None:
        return DEFAULTS[to]
    if type not in (*PLAIN, *QUANTIZED):
        raise unknown("type", type, (*PLAIN, *QUANTIZED))
    if to == "hf" and type in QUANTIZED:
        raise UserError(f"a Hugging Face directory cannot hold {type}", hint="choose f32, f16 or bf16, or: --to gguf")
    return type


def check_place(model: Opened, source: Path, out: Path, *, directory: bool, force: bool) -> None:
    """Raise UserError where ``out`` cannot be written: it exists, or is the model, at ``source``, that is read."""
    if not out.exists():
        return
    if out.is_dir() != directory:
        raise UserError(f"{out} is {'a directory' if out.is_dir() else 'a file'}", hint="choose another name")
    if out.resolve() in (source.resolve(), model.path.resolve()):
        raise UserError(f"{out} is the model that is read", hint="choose another place")
    if not force and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists already", hint="choose another place, or overwrite it: --force")


def as_stored(model: Transformer, to: str, type: str, name: str) -> None:
    """Convert the numbers of a model to those that a file of ``type`` will hold, in place."""
    if type in QUANTIZED:
        quantize_model(model, Quantization.of(QUANTIZED[type], whole_groups=True), name=name)
    else:
        dequantize_model(model, torch.float32)
    matrices = PLAIN.get(type, torch.float16)
    round_numbers(model, matrices, torch.float32 if to == "gguf" else matrices, name)


@torch.no_grad()
def round_numbers(model: Transformer, matrices: torch.dtype, others: torch.dtype, name: str = "the model") -> None:
    """Round what is not quantized, in place. Raises UserError for numbers that are too large."""
    for parameter in model.parameters():
        rounded = parameter.data.to(matrices if parameter.dim() == 2 else others)
        if not torch.isfinite(rounded).all() and torch.isfinite(parameter).all():
            raise UserError(f"{name} holds numbers that are too large for {rounded.dtype}", hint="choose bf16 or f32")
        parameter.data = rounded


@torch.no_grad()
def probe(model: Transformer) -> Tensor:
    """Return fp32 logits (T, V) of tokens from all of the vocabulary; of an encoder hidden states, or its head's.

    Raises RunError where they are not finite.
    """
    V, T = model.config.vocab_size, min(model.config.context, PROBE_TOKENS)
    ids = (torch.arange(T, device=model.device) * 7919 + 1) % V
    memory = model.encode(ids[None], dtype=torch.float32) if model.config.encoder_depth else None
    hidden = model(ids[None], dtype=torch.float32, memory=memory)
    head = heads.of(model)
    if head is not None and head.labels:
        logits = head(hidden, torch.ones_like(ids[None], dtype=torch.bool))[0].cpu()
    else:
        logits = (model.logits(hidden) if model.config.architecture.causal else hidden)[0].cpu()
    if not torch.isfinite(logits).all():
        raise RunError("the model's logits are not finite", hint="its weights are damaged, or its training diverged")
    return logits


def read_again(path: Path, expected: Tensor, codec: Codec, runtime: Runtime, *, exact: bool) -> Tensor:
    """Load what was written and return its logits, after comparing them, and if ``exact`` the tokenizer's ids.

    Raises RunError where they are not the same.
    """
    loaded = open_path(path).load_whole(runtime=runtime, dtype=torch.float32)
    logits, again = probe(loaded.model), loaded.codec
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    if not difference <= CLOSE * max(1.0, largest):
        raise RunError(
            f"the written model gives other logits when it is loaded again: by {difference:.3g}, of {largest:.3g}",
            hint="nothing was written; this is a bug in tfcli",
        )
    for text in PROBE_TEXTS if exact else ():
        if again.encode(text) != codec.encode(text) or again.prefix_ids != codec.prefix_ids:
            raise RunError(
                f"the written tokenizer gives other ids for {text!r}",
                hint="nothing was written; the format has no exact equivalent of this tokenizer",
            )
    return logits


def portable(codec: Codec) -> Tokenizer | JsonTokenizer:
    """Convert a SentencePiece tokenizer that adds ids to every text to a tokenizer.json that does so too."""
    if isinstance(codec, JsonTokenizer):
        return codec
    assert isinstance(codec, Tokenizer)
    if not codec.prefix_ids and not codec.suffix_ids:
        return codec
    described = tokenizer_json(codec)
    roles = Roles(
        bos=None if codec.bos_id is None else codec.piece(codec.bos_id),
        eos=codec.piece(codec.eos_id),
        pad=None if codec.pad_id == codec.eos_id else codec.piece(codec.pad_id),
        unk=codec.piece(codec.unk_id),
        more_eos=codec.eos_ids,
        chat_template=codec.chat_template,
    )
    return JsonTokenizer(json.dumps(described, ensure_ascii=False), name=codec.name, roles=roles)


@contextlib.contextmanager
def written(out: Path, *, directory: bool) -> Iterator[Path]:
    """Yield a temporary path next to ``out``, renamed to it at the end; on failure nothing is left."""
    out = out.resolve()  # the target of a link is written
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent} cannot be created: {error.strerror}", hint="choose another place") from None
    if directory:
        with disk.whole_folder(out, last=lambda name: name.endswith((".safetensors", ".gguf"))) as folder:
            yield folder
        return
    disk.sweep(out.parent)
    temporary = disk.aside(out)
    try:
        yield temporary
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
