"""Models written as GGUF files: quantized matrices keep their codes, the others become one type of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfcli.errors import UserError
from tfcli.formats.gguf import blocks, families
from tfcli.formats.gguf.blocks import TYPES, Bytes, Groups
from tfcli.formats.gguf.families import Family
from tfcli.formats.gguf.file import NewTensor, write_gguf
from tfcli.formats.gguf.settings import ROPE_FREQS
from tfcli.formats.gguf.vocab_writer import to_gguf
from tfcli.model.quant.matrix import CENTER, GROUP, QuantEmbedding, QuantMatrix
from tfcli.model.quant.quantize import slices
from tfcli.model.transformer import Transformer
from tfcli.text.tokenizers.codec import Codec

PLAIN = ("F32", "F16", "BF16")
"""Types of plain numbers."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""{type of most matrices: ``general.file_type``} (enum llama_ftype)."""


def save(path: str | Path, model: Transformer, codec: Codec, *, type: str = "F16", name: str | None = None) -> None:
    """Write a model and its tokenizer as a GGUF file, whole or not at all.

    Matrices of plain numbers become ``type`` (F32, F16 or BF16), quantized ones the blocks that hold their codes bit by
    bit: Q8_0, Q4_0 or Q4_1. Norms and biases are F32. ``name`` is the model's name in the file. Raises UserError for a
    model or tokenizer that GGUF files do not support, and for numbers that a type cannot represent.
    """
    if type not in PLAIN:
        raise ValueError(f"{type} is no type of plain numbers")
    family, settings = families.written(model.config, name=name or "the model")
    tensors = list(_tensors(model, family, type))
    mostly = Counter(tensor.type for tensor in tensors if len(tensor.shape) == 2).most_common(1)[0][0]
    metadata = general(family, type=mostly, name=name) | settings
    write_gguf(path, metadata | to_gguf(codec, vocab_size=model.config.vocab_size), tensors)


def general(family: Family, *, type: str, name: str | None = None) -> dict[str, Any]:
    """Return the metadata that every file has; ``type`` is that of most matrices."""
    return {
        "general.architecture": family.name,
        "general.type": "model",
        **({"general.name": name} if name else {}),
        "general.file_type": FILE_TYPES[type],
        "general.quantization_version": 2,
    }


def stored_type(name: str, shape: tuple[int, ...], type: str) -> str:
    """Return the type to store a tensor in when the matrices are to be ``type``, by llama.cpp's rules.

    Norms and biases are F32; a matrix whose rows are not whole blocks is F16.
    """
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return "F32"
    return "F16" if shape[-1] % TYPES[type].block else type


def _tensors(model: Transformer, family: Family, type: str) -> Iterator[NewTensor]:
    factors = families.rope_factors(family, model.config)
    if factors is not None:
        yield NewTensor(name=ROPE_FREQS, shape=factors.shape, type="F32", data=factors)
    for name, place in families.places(family, model.config).items():
        path, _, kind = place.ours.rpartition(".")
        part: Any = model.get_submodule(path)
        part = part.matrix if isinstance(part, QuantEmbedding) else part
        shape, order = place.shape, place.rows_written
        if isinstance(part, QuantMatrix) and kind == "weight":
            yield NewTensor(
                name=name, shape=shape, type=block_type(part, name), data=partial(_blocks, part, name, order)
            )
        else:
            stored = stored_type(name, shape, type)
            yield NewTensor(name=name, shape=shape, type=stored, data=partial(_numbers, getattr(part, kind), order))


def _numbers(tensor: Tensor, order: NDArray[np.intp] | None) -> NDArray[Any]:
    values: NDArray[Any] = tensor.detach().cpu().float().numpy()
    return values if order is None else values[order]


def _blocks(matrix: QuantMatrix, name: str, order: NDArray[np.intp] | None) -> Bytes:
    type = block_type(matrix, name)
    out = np.empty((matrix.rows, TYPES[type].row_bytes(matrix.columns)), np.uint8)
    for some in slices(matrix.rows, matrix.columns):
        rows = np.arange(matrix.rows)[some] if order is None else order[some]
        out[some] = blocks.pack(groups(matrix, torch.from_numpy(rows)), type)
    return out


def block_type(matrix: QuantMatrix, name: str = "the matrix") -> str:
    """Return the type whose blocks hold the codes of a matrix. Raises UserError if there is none."""
    if matrix.columns % GROUP or (matrix.bits == 8 and matrix.low is not None):
        what = f"rows of {matrix.columns}" if matrix.columns % GROUP else "8-bit codes with a minimum"
        hint = "write plain numbers instead: --type f16"
        raise UserError(f"{name} has {what}, which no block type that tfcli writes can hold", hint=hint)
    return "Q8_0" if matrix.bits == 8 else "Q4_0" if matrix.low is None else "Q4_1"


def groups(matrix: QuantMatrix, rows: Tensor) -> Groups:
    """Return codes and scales of some rows of a quantized matrix, unchanged."""
    codes, scale, low = matrix.grouped(rows.to(matrix.codes.device))
    scales = scale.cpu().float().numpy()
    lows = -CENTER[matrix.bits] * scales if low is None else low.cpu().float().numpy()
    return Groups(bits=matrix.bits, group=GROUP, q=codes.flatten(1).cpu().numpy(), scale=scales, low=lows)
