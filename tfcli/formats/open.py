"""Any model that tfcli reads, by its path: a Hugging Face directory, a GGUF file or a checkpoint of llama2.c."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError
from tfcli.formats.gguf import families as gguf_families
from tfcli.formats.gguf.file import GgufFile, open_gguf
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf.families.registry import kind_of
from tfcli.formats.hf.stored import ADAPTER, CONFIG, read_data
from tfcli.text.read import files
from tfcli.text.tokenizers.codec import Codec

if TYPE_CHECKING:
    import torch

    from tfcli.formats.hf.heads import Loaded
    from tfcli.model.transformer import Transformer
    from tfcli.runtime import Runtime

GGUF = b"GGUF"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model at a path, which can be described or loaded; its description is read once, when first needed.

    The properties raise UserError for files that are absent, damaged or unsupported.
    """

    kind: Literal["hf", "gguf", "llama2.c", "adapter"]
    path: Path
    """The directory for "hf" and "adapter", else the file."""

    @cached_property
    def hf_config(self) -> Mapping[str, Any]:
        """The content of config.json, of an adapter that of task.json; {} for files."""
        if self.kind == "adapter":
            from tfcli.formats.hf import adapters

            return adapters.about(self.path)
        return read_data(self.path) if self.kind == "hf" else {}

    @cached_property
    def head(self) -> str | None:
        """The kind of its task head, None for none."""
        if self.kind == "adapter":
            from tfcli.formats.hf import adapters

            return adapters.kind_of(self.path)
        return kind_of(self.hf_config)

    @cached_property
    def config(self) -> ModelConfig:
        """The shape; for an adapter that of its base. No weights are read."""
        if self.kind == "adapter":
            return self.base.config
        if self.kind == "hf":
            return hf.read_config(self.path, self.hf_config)
        if self.kind == "gguf":
            return gguf_families.read(self._gguf)[1]
        from tfcli.formats import llama2c

        return llama2c.read_config(self.path)

    @cached_property
    def base(self) -> Opened:
        """The model that an adapter names as its base."""
        from tfcli.formats.hf import adapters

        directory = self.path
        named = adapters.read_config(directory).get("base_model_name_or_path")
        path = Path(named) if isinstance(named, str) and named else None
        if path is None or not path.exists():
            raise UserError(
                f"{directory} is an adapter for {named!r}, which does not exist",
                hint=f"put the path of its base into {directory / ADAPTER}, or merge the two: "
                f"tfcli convert BASE OUT --merge {directory}",
            )
        base = open_path(path)
        if base.kind == "adapter":
            raise UserError(f"{directory} is an adapter for {path}, an adapter itself", hint="merge that one first")
        return base

    @cached_property
    def _gguf(self) -> GgufFile:
        return open_gguf(self.path)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored weights."""
        if self.kind == "adapter":
            return self.base.stored_bytes
        held = self.path.glob("*.safetensors") if self.kind == "hf" else [self.path]
        return sum(file.stat().st_size for file in held)

    def load(
        self,
        *,
        runtime: Runtime,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        whole_groups: bool = False,
        tokenizer: str | Path | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> tuple[Transformer, Codec]:
        """Load the model, on the runtime's device, and its tokenizer.

        ``dtype`` of what is not quantized (default: the runtime's). ``quantize`` is "int8" or "int4": matrices are
        quantized one at a time as they are read; ``whole_groups`` as in ``Quantization``. A directory of adapters is
        loaded as its base with them merged in. ``tokenizer`` is the file of a llama2.c checkpoint, where it is not next
        to it. ``on_note`` is told what was not read. Raises UserError for files that are absent, damaged, unsupported
        or do not belong together, and for quantizing twice.
        """
        import torch

        from tfcli.model.quant.quantize import Quantization, quantize_model

        to = None if quantize is None else Quantization.of(quantize, whole_groups=whole_groups)
        if tokenizer is not None and self.kind != "llama2.c":
            hint = "--tokenizer goes with a checkpoint of llama2.c"
            raise UserError(f"{self.path} has a tokenizer of its own", hint=hint)
        if self.kind == "adapter":
            from tfcli.model import heads

            loaded = self.load_whole(runtime=runtime, dtype=torch.float32, on_note=on_note)
            if loaded.kind is not None and on_note:
                on_note(f"{self.path}: the head of its task is not read")
            heads.detach(loaded.model)
            if to is not None:
                quantize_model(loaded.model, to, name=str(self.path))
            for parameter in loaded.model.parameters():
                parameter.data = parameter.data.to(dtype or runtime.dtype)
            return loaded.model, loaded.codec
        if self.kind == "gguf":
            from tfcli.formats.gguf import load as gguf_load

            return gguf_load.load(self._gguf, runtime=runtime, dtype=dtype, quantize=to)
        if self.kind == "llama2.c":
            from tfcli.formats import llama2c

            return llama2c.load(self.path, tokenizer, runtime=runtime, dtype=dtype, quantize=to)
        return hf.load(self.path, runtime=runtime, dtype=dtype, hf_config=self.hf_config, quantize=to, on_note=on_note)

    def load_whole(
        self,
        *,
        runtime: Runtime,
        dtype: torch.dtype | None = None,
        tokenizer: str | Path | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Loaded:
        """Load the model with its task head where it has one, and the description of that task; as ``load``."""
        import torch

        from tfcli.formats.hf import adapters, heads
        from tfcli.model import lora

        if tokenizer is None and self.kind == "hf":
            return heads.load(self.path, runtime=runtime, dtype=dtype, hf_config=self.hf_config, on_note=on_note)
        if tokenizer is not None or self.kind != "adapter":
            model, codec = self.load(runtime=runtime, dtype=dtype, tokenizer=tokenizer, on_note=on_note)
            return heads.Loaded(model=model, codec=codec, hf_config={}, kind=None)
        base = self.base.load_whole(runtime=runtime, dtype=torch.float32, on_note=on_note)
        loaded = adapters.put_on(base, self.path, on_note=on_note)
        lora.merge(loaded.model)
        for parameter in loaded.model.parameters():  # not the fp16 scales of quantized matrices
            parameter.data = parameter.data.to(dtype or runtime.dtype)
        return loaded


def open_path(path: str | Path) -> Opened:
    """Return the model at a path; for a directory with a GGUF file and no safetensors, that file.

    Raises UserError for what is not a model; damage is found when it is read.
    """
    path = Path(path)
    if path.is_file():
        return _file(path)
    if path.is_dir() and not any((path / name).is_file() for name in (hf.WEIGHTS, f"{hf.WEIGHTS}.index.json")):
        held = sorted(path.glob("*.gguf"))
        if len(held) == 1:
            return Opened(kind="gguf", path=held[0])
        if held:
            raise UserError(f"{path} holds {len(held)} GGUF files", hint=f"name one of them, for example {held[0]}")
        if (path / ADAPTER).is_file() and not (path / CONFIG).is_file():
            return Opened(kind="adapter", path=path)
    return Opened(kind="hf", path=path)


def _file(path: Path) -> Opened:
    try:
        with path.open("rb") as file:
            head = file.read(files.SNIFF)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if head.startswith(GGUF) or path.suffix == ".gguf":
        return Opened(kind="gguf", path=path)
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise UserError(f"{path} is one file of a model", hint=f"name the directory that it is in: {path.parent}")
    if path.suffix == ".bin" or head.startswith((b"PK\x03\x04", b"\x80")):
        return Opened(kind="llama2.c", path=path)
    hint = "a model is a directory with config.json and model.safetensors, or a .gguf file"
    raise UserError(f"{path} is {files.what_it_is(head) or 'text'}, expected a model", hint=hint)
