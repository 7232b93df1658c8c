"""Models from GGUF files: quantized matrices keep their codes.

A matrix of a type whose groups have 32 weights (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K) becomes a ``QuantMatrix``
with its codes unchanged; Q5's take a byte each. Scales are rounded to fp16, which changes only those of Q4_K and Q5_K.
Types with groups of 16 (Q2_K, Q3_K, Q6_K) are requantized to 8 bits in groups of 32, with an error far below their own.
Other tensors become numbers of the model's dtype. No matrix is ever dequantized as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError
from tfcli.formats.gguf import blocks, families
from tfcli.formats.gguf.blocks import TYPES, Floats
from tfcli.formats.gguf.families import Family, Place
from tfcli.formats.gguf.file import GgufFile, GgufTensor
from tfcli.formats.gguf.vocab import from_gguf
from tfcli.model.quant import matrix as quant
from tfcli.model.quant.matrix import GROUP, Bits, QuantMatrix, from_codes
from tfcli.model.quant.quantize import Quantization, place, slices, stacked
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.text.tokenizers.codec import Codec

CENTRED = ("Q4_0", "Q8_0")
"""Types whose middle code means 0, as in a ``QuantMatrix`` without ``low``."""


def load(
    file: GgufFile, *, runtime: Runtime, dtype: torch.dtype | None = None, quantize: Quantization | None = None
) -> tuple[Transformer, Codec]:
    """Load the model in a GGUF file, on the runtime's device, and its tokenizer; ``dtype`` of what is not quantized.

    ``quantize`` quantizes the matrices of a file without quantized ones. Raises UserError for a damaged file, an
    unsupported architecture or tokenizer, and for quantizing twice.
    """
    family, config = families.read(file)
    codec = from_gguf(file.metadata, name=str(file.path))
    return load_model(file, family, config, runtime=runtime, dtype=dtype, quantize=quantize), codec


def load_model(
    file: GgufFile,
    family: Family,
    config: ModelConfig,
    *,
    runtime: Runtime,
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
) -> Transformer:
    """Load the model alone; ``family`` and ``config`` are ``families.read`` of the file."""
    kinds = sorted({t.type for t in file.tensors.values() if TYPES[t.type].quantized and len(t.shape) == 2})
    if quantize and kinds:
        hint = "quantizing twice only loses quality: use it as it is, or start from the model that it was made from"
        raise UserError(f"{file.path} is quantized already ({', '.join(kinds)})", hint=hint)
    with torch.device("meta"):
        model = Transformer(config)
    places = families.places(family, config)
    reader = _Reader(file, places, dtype or runtime.dtype, quantize)
    for name, stored in places.items():
        path, _, kind = stored.ours.rpartition(".")
        if kind == "weight":
            reader.put(model, path, name)
    if config.tied and isinstance(model.embed, nn.Embedding):
        model.head.weight = model.embed.weight
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise AssertionError(f"parameters without values: {', '.join(left)}")
    return model.to(runtime.device).requires_grad_(True)


class _Reader:
    """Puts the tensors of a file into a model, one at a time."""

    def __init__(
        self, file: GgufFile, places: Mapping[str, Place], dtype: torch.dtype, quantize: Quantization | None
    ) -> None:
        self.file, self.places, self.dtype, self.quantize = file, places, dtype, quantize

    def put(self, model: Transformer, path: str, name: str) -> None:
        """Put the weight ``name``, and its bias where the model has one, into the part at ``path``."""
        tensor, bias_name = self.file.tensors[name], name.removesuffix("weight") + "bias"
        part = model.get_submodule(path)
        bias = self.numbers(bias_name) if getattr(part, "bias", None) is not None else None
        wanted = self.quantize.bits_of(path, tensor.shape[-1]) if self.quantize else None
        if len(tensor.shape) == 2 and (TYPES[tensor.type].quantized or wanted):
            place(model, path, self.matrix(name, bias, wanted or 8))
        else:
            part.weight = nn.Parameter(self.numbers(name))
            if bias is not None:
                part.bias = nn.Parameter(bias)
        self.file.release(tensor)

    def numbers(self, name: str) -> Tensor:
        """Return a tensor as plain numbers of the model's dtype."""
        tensor = self.file.tensors[name]
        if len(tensor.shape) == 1 or tensor.shape[0] == 1:
            values = tensor.dequantize()
            order = self.places[name].rows_read
            return torch.from_numpy(values if order is None else values[order]).to(self.dtype)
        out = torch.empty(tensor.shape, dtype=self.dtype)
        for some, values in self._slices(name):
            out[some] = torch.from_numpy(values)
        return out

    def matrix(self, name: str, bias: Tensor | None, bits: Bits) -> QuantMatrix:
        """Return a tensor as a quantized matrix; ``bits`` apply to one that is requantized."""
        tensor = self.file.tensors[name]
        if TYPES[tensor.type].group == GROUP:
            return stacked(self._as_stored(name), rows=tensor.shape[0], bias=bias)
        requantized = (quant.quantize(torch.from_numpy(values), bits) for _, values in self._slices(name))
        return stacked(requantized, rows=tensor.shape[0], bias=bias)

    def _as_stored(self, name: str) -> Iterator[QuantMatrix]:
        tensor = self.file.tensors[name]
        for rows in self._rows(name):
            groups = blocks.groups(tensor.type, tensor.data[rows])
            low = None if tensor.type in CENTRED else self._half(groups.low, tensor)
            bits: Bits = 4 if groups.bits == 4 else 8
            codes, scale = torch.from_numpy(groups.q), self._half(groups.scale, tensor)
            yield from_codes(codes, scale, low, bits=bits, columns=tensor.shape[1])

    def _slices(self, name: str) -> Iterator[tuple[slice, Floats]]:
        """Yield slices of the rows, and their numbers."""
        tensor = self.file.tensors[name]
        for some, rows in zip(slices(*tensor.shape), self._rows(name), strict=True):
            yield some, blocks.dequantize(tensor.type, tensor.data[rows])

    def _rows(self, name: str) -> Iterator[slice | NDArray[np.intp]]:
        """Yield the places of tfcli's rows in the file, slice by slice."""
        order = self.places[name].rows_read
        for some in slices(*self.file.tensors[name].shape):
            yield some if order is None else order[some]

    def _half(self, values: Floats, tensor: GgufTensor) -> Tensor:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(
                f"{self.file.path}: the tensor {tensor.name} has scales that are not finite or too large",
                hint="the file is damaged: download or convert it again",
            )
        return torch.from_numpy(half)
