"""Small GGUF files with random weights, and transformers' model of the same file."""

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from tfcli.config.model import STORED, ModelConfig, from_flat
from tfcli.formats.gguf import blocks as ggml_blocks
from tfcli.formats.gguf import families
from tfcli.formats.gguf.file import NewTensor, write_gguf
from tfcli.formats.gguf.save import general
from tfcli.formats.gguf.settings import ROPE_FREQS
from tfcli.formats.gguf.vocab_writer import to_gguf
from tfcli.text.tokenizers.sentencepiece import Tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 400, "context": 64, "depth": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 16,
    "ffn_width": 64,
}  # fmt: skip


def config(architecture: str, **changes: Any) -> ModelConfig:
    """Two small blocks of a family with grouped queries; ``changes`` of the shape or of the architecture."""
    family = next(family for family in families.FAMILIES if family.name == architecture)
    own = {name: changes.pop(name) for name in list(changes) if name in STORED}
    return family.complete(ModelConfig(**{**SMALL, **changes}, architecture=from_flat(own, family.architecture)))


def factors(config: ModelConfig) -> list[NewTensor]:
    """Llama 3's tensor of rotary factors, for a model that has one."""
    found = families.rope_factors(families.written(config)[0], config)
    return [] if found is None else [NewTensor(name=ROPE_FREQS, shape=found.shape, type="F32", data=found)]


def numbers(shape: tuple[int, ...], rng: np.random.Generator, scale: float = 0.2) -> NDArray[np.float32]:
    """Random weights, of norms around 1; none is zero."""
    return (rng.normal(size=shape) * scale + (len(shape) == 1)).astype(np.float32)


def blocks(type: str, shape: tuple[int, ...], rng: np.random.Generator, scale: float = 0.2) -> NDArray[np.uint8]:
    """A quantized matrix (rows, bytes of a row); types that the gguf package does not make get random codes."""
    kind = ggml_blocks.TYPES[type]
    if kind.block == 32:
        made = gguf.quants.quantize(numbers(shape, rng, scale), gguf.GGMLQuantizationType[type])
        return made.view(np.uint8).reshape(shape[0], -1)
    data = rng.integers(0, 256, (shape[0], kind.row_bytes(shape[1])), np.uint8).view(kind.layout)
    spread = {"Q2_K": 3 * 8, "Q3_K": 4 * 16, "Q4_K": 15 * 32, "Q5_K": 31 * 32, "Q6_K": 32 * 64}[type]
    data["d"] = scale * 2 / spread * rng.uniform(0.5, 1.0, data.shape)
    if "m" in kind.layout.names:
        data["m"] = scale / 32
    return data.view(np.uint8).reshape(shape[0], -1)


def save(
    path: Path, config: ModelConfig, *, type: str = "F32", tokenizer: Tokenizer | None = None, **types: str
) -> Path:
    """A file of such a model whose matrices are ``type``, or by the name of their part (``token_embd="Q8_0"``)."""
    rng = np.random.default_rng(0)
    family, metadata = families.written(config)
    tensors = factors(config)
    for name, place in families.places(family, config).items():
        shape = place.shape
        kind = types.get(name.split(".")[-2], type) if len(shape) == 2 else "F32"
        data = blocks(kind, shape, rng) if ggml_blocks.TYPES[kind].quantized else numbers(shape, rng)
        tensors.append(NewTensor(name=name, shape=shape, type=kind, data=data))
    metadata |= general(family, type="F16", name="tiny")
    if tokenizer is not None:
        metadata |= to_gguf(tokenizer, vocab_size=config.vocab_size)
    write_gguf(path, metadata, tensors)
    return path


def transformers_model(path: Path, **changes: Any) -> Any:
    """transformers' model of a file, with ``changes`` to the settings that it takes from it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        for name, value in changes.items():
            setattr(settings, name, value)
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=settings, dtype=torch.float32
        )
