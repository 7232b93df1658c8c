"""Any model that tfcli reads, by its path: a Hugging Face directory, a GGUF file or a checkpoint of llama2.c."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf.families.registry import kind_of
from tfcli.formats.hf.stored import ADAPTER, CONFIG, open_model, read_data
from tfcli.text.read import files
from tfcli.text.tokenizers.codec import Codec

if TYPE_CHECKING:
    import torch

    from tfcli.formats.hf.heads import Loaded
    from tfcli.model.quant.quantize import Quantization
    from tfcli.model.transformer import Transformer
    from tfcli.runtime import Runtime

GGUF = b"GGUF"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a path leads to."""

    kind: Literal["hf", "gguf", "llama2.c", "adapter"]
    path: Path
    """The directory of "hf" and of "adapter", else the file."""


def locate(path: str | Path) -> Found:
    """What kind of model lies at a path; of a directory with a GGUF file and no safetensors, that file.

    Raises UserError for what is no model at all; whether it is whole is found when it is read.
    """
    path = Path(path)
    if path.is_file():
        return _file(path)
    if path.is_dir() and not any((path / name).is_file() for name in (hf.WEIGHTS, f"{hf.WEIGHTS}.index.json")):
        held = sorted(path.glob("*.gguf"))
        if len(held) == 1:
            return Found(kind="gguf", path=held[0])
        if held:
            raise UserError(f"{path} holds {len(held)} GGUF files", hint=f"name one of them, for example {held[0]}")
        if (path / ADAPTER).is_file() and not (path / CONFIG).is_file():
            return Found(kind="adapter", path=path)
    return Found(kind="hf", path=path)


def base_of(directory: Path) -> Path:
    """The model that an adapter names as its base. Raises UserError where it is not there."""
    from tfcli.formats.hf import adapters

    named = adapters.read_config(directory).get("base_model_name_or_path")
    base = Path(named) if isinstance(named, str) and named else None
    if base is None or not base.exists():
        raise UserError(
            f"{directory} is an adapter for {named!r}, which is not there",
            hint=f"say where its base is now, in {directory / ADAPTER}, or merge the two: tfcli convert BASE OUT "
            f"--merge {directory}",
        )
    if locate(base).kind == "adapter":
        raise UserError(f"{directory} is an adapter for {base}, an adapter itself", hint="merge that one first")
    return base


def _file(path: Path) -> Found:
    try:
        with path.open("rb") as file:
            head = file.read(files.SNIFF)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if head.startswith(GGUF) or path.suffix == ".gguf":
        return Found(kind="gguf", path=path)
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise UserError(f"{path} is one file of a model", hint=f"name the directory that it is in: {path.parent}")
    if path.suffix == ".bin" or head.startswith((b"PK\x03\x04", b"\x80")):
        return Found(kind="llama2.c", path=path)
    raise UserError(
        f"{path} is {files.what_it_is(head) or 'text'}, expected a model",
        hint="a model is a directory with config.json and model.safetensors, or a .gguf file",
    )


def about_of(path: str | Path) -> tuple[dict[str, Any], str | None]:
    """What the directory at a path says of its task, and the kind of its head; ({}, None) for what has neither."""
    found = locate(path)
    if found.kind == "adapter":
        from tfcli.formats.hf import adapters

        return adapters.about(found.path), adapters.kind_of(found.path)
    if found.kind != "hf" or not (found.path / CONFIG).is_file():
        return {}, None
    about = read_data(found.path)
    return about, kind_of(about)


def read_config(path: str | Path) -> ModelConfig:
    """The shape of the model at a path; no weights are read. Raises UserError as ``load`` does."""
    found = locate(path)
    if found.kind == "adapter":
        return read_config(base_of(found.path))
    if found.kind == "hf":
        return hf.read_config(found.path)
    if found.kind == "gguf":
        from tfcli.formats.gguf import load as gguf_load

        return gguf_load.read_config(found.path)
    from tfcli.formats import llama2c

    return llama2c.read_config(found.path)


def stored_bytes(path: str | Path) -> int:
    """Bytes of the weights at a path, as they are stored."""
    found = locate(path)
    if found.kind == "adapter":
        return stored_bytes(base_of(found.path))
    held = found.path.glob("*.safetensors") if found.kind == "hf" else [found.path]
    return sum(file.stat().st_size for file in held)


def load(
    path: str | Path,
    *,
    runtime: Runtime,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    whole_groups: bool = False,
    tokenizer: str | Path | None = None,
    on_note: Callable[[str], None] | None = None,
) -> tuple[Transformer, Codec]:
    """The model at a path, on the runtime's device, and its tokenizer.

    ``dtype`` of what is not quantized (default: the runtime's). ``quantize`` is "int8" or "int4": matrices are
    quantized one at a time as they are read; ``whole_groups`` as in ``Quantization``. A directory of adapters is its
    base with them merged in. ``tokenizer`` is the file of a
    llama2.c checkpoint, where it does not lie beside it. ``on_note`` is told what of a directory was not read. Raises
    UserError for what is absent, damaged, not read by tfcli or does not belong together, and for quantizing twice.
    """
    from tfcli.model.quant.quantize import Quantization

    found = locate(path)
    to = None if quantize is None else Quantization.of(quantize, whole_groups=whole_groups)
    if tokenizer is not None and found.kind != "llama2.c":
        raise UserError(f"{path} has a tokenizer of its own", hint="--tokenizer goes with a checkpoint of llama2.c")
    if found.kind == "adapter":
        return _adapted(found.path, runtime, dtype, to, on_note)
    if found.kind == "gguf":
        from tfcli.formats.gguf import load as gguf_load

        return gguf_load.load(found.path, runtime=runtime, dtype=dtype, quantize=to)
    if found.kind == "llama2.c":
        from tfcli.formats import llama2c

        return llama2c.load(found.path, tokenizer, runtime=runtime, dtype=dtype, quantize=to)
    if to is None:
        return hf.load(found.path, runtime=runtime, dtype=dtype, on_note=on_note)
    return _quantized(found.path, to, runtime, dtype, on_note)


def load_whole(
    path: str | Path,
    *,
    runtime: Runtime,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Loaded:
    """As ``load``, with the head of its task where it has one, and what is said of that task."""
    import torch

    from tfcli.formats.hf import adapters, heads
    from tfcli.model import lora

    found = locate(path)
    if tokenizer is None and found.kind == "hf":
        return heads.load(found.path, runtime=runtime, dtype=dtype, on_note=on_note)
    if tokenizer is not None or found.kind != "adapter":
        model, codec = load(path, runtime=runtime, dtype=dtype, tokenizer=tokenizer, on_note=on_note)
        return heads.Loaded(model=model, codec=codec, about={}, kind=None)
    base = load_whole(base_of(found.path), runtime=runtime, dtype=torch.float32, on_note=on_note)
    loaded = adapters.put_on(base, found.path, on_note=on_note)
    lora.merge(loaded.model)
    for parameter in loaded.model.parameters():  # not the fp16 scales of quantized matrices
        parameter.data = parameter.data.to(dtype or runtime.dtype)
    return loaded


def _adapted(
    directory: Path,
    runtime: Runtime,
    dtype: torch.dtype | None,
    to: Quantization | None,
    on_note: Callable[[str], None] | None,
) -> tuple[Transformer, Codec]:
    """The base of an adapter with it merged in, quantized where ``to`` says so, and the template that it learnt."""
    import torch

    from tfcli.model import heads
    from tfcli.model.quant.quantize import quantize_model

    loaded = load_whole(directory, runtime=runtime, dtype=torch.float32, on_note=on_note)
    if loaded.kind is not None and on_note:
        on_note(f"{directory}: the head of its task is not read")
    heads.detach(loaded.model)
    if to is not None:
        quantize_model(loaded.model, to, name=str(directory))
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.to(dtype or runtime.dtype)
    return loaded.model, loaded.codec


def _quantized(
    directory: Path,
    to: Quantization,
    runtime: Runtime,
    dtype: torch.dtype | None,
    on_note: Callable[[str], None] | None,
) -> tuple[Transformer, Codec]:
    """As ``hf.load``, one matrix at a time in the form that it is stored in."""
    import torch

    from tfcli.model.quant.quantize import assign
    from tfcli.model.transformer import Transformer

    codec = hf.read_tokenizer(directory)
    stored = open_model(directory, on_note=on_note)
    with torch.device("meta"):
        model = Transformer(stored.config)
    for name, tensor in stored.tensors():
        assign(model, name, tensor, runtime.device, dtype or runtime.dtype, to)
    return model, codec
