"""Quantize whole models to 8 or 4 bits: every matrix but positions and types, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfcli.errors import UserError, unknown
from tfcli.model import heads
from tfcli.model.layers import Linear
from tfcli.model.lora import put
from tfcli.model.quant.matrix import BITS, GROUP, TILE, Bits, PackedMatrix, QuantEmbedding, QuantMatrix, quantize
from tfcli.model.transformer import Transformer

AT_ONCE = 1 << 19
"""Numbers of a matrix that are quantized at once: this takes some ten times as many beside the result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """The form that a model's matrices are to take.

    "int4" keeps the embedding and the head in 8 bits: in 4, they alone raised SmolLM2-135M's perplexity by 4.6 %, and
    all other matrices together by 0.1 % (of weights that Q4_1 holds), for an eighth of its size.
    """

    bits: Bits
    outer: Bits = 8
    """Bits of the embedding and the head."""
    whole_groups: bool = False
    """Matrices whose rows are not whole groups of 32 stay as they are: GGUF's blocks have no padding."""

    @classmethod
    def of(cls, kind: str, *, whole_groups: bool = False) -> Quantization:
        """Return the quantization named "int8" or "int4". Raises UserError for another name."""
        if kind not in BITS:
            raise unknown("kind of quantization", kind, BITS)
        return cls(bits=BITS[kind], whole_groups=whole_groups)

    def bits_of(self, path: str, columns: int) -> Bits | None:
        """Return the bits of the matrix at ``path``; None where it stays as it is."""
        if self.whole_groups and columns % GROUP:
            return None
        return self.outer if path in ("embed", "head") else self.bits


def slices(rows: int, columns: int) -> Iterator[slice]:
    """Divide the rows of a matrix into parts of about ``AT_ONCE`` numbers, whole tiles of rows each."""
    step = max(1, AT_ONCE // (TILE * columns)) * TILE
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def stacked(parts: Iterable[QuantMatrix], *, rows: int, bias: Tensor | None = None) -> QuantMatrix:
    """Join the parts that ``slices`` made of ``rows`` rows, in order; one part is in memory beside the result."""
    whole: QuantMatrix | None = None
    tile = 0
    for part in parts:
        if whole is None:
            shape = (-(-rows // TILE), part.scale.shape[1])
            codes, scale = part.codes.new_empty(*shape, part.codes.shape[2]), part.scale.new_empty(*shape, TILE)
            low = None if part.low is None else torch.empty_like(scale)
            whole = QuantMatrix(codes, scale, low, bits=part.bits, rows=rows, columns=part.columns, bias=bias)
        for target, source in ((whole.codes, part.codes), (whole.scale, part.scale), (whole.low, part.low)):
            if target is not None and source is not None:
                target[tile : tile + len(source)] = source
        tile += len(part.codes)
    if whole is None or tile != len(whole.codes):
        raise ValueError(f"{tile} tiles of a matrix of {rows} rows")
    return whole


@torch.no_grad()
def quantized(weight: Tensor, bits: Bits, *, bias: Tensor | None = None) -> QuantMatrix:
    """Apply ``quantize`` to a matrix (rows, columns), some rows at a time."""
    rows, columns = weight.shape
    parts = (quantize(weight[some], bits) for some in slices(rows, columns))
    return stacked(parts, rows=rows, bias=None if bias is None else bias.detach())


def bits(model: Transformer) -> list[int]:
    """Return the distinct numbers of bits of a model's quantized matrices; [] where none is quantized."""
    return sorted({module.bits for module in model.modules() if isinstance(module, QuantMatrix)})


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that parameters and buffers hold as they are stored, shared ones counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())


def refuse_twice(model: Transformer, name: str) -> None:
    """Raise UserError for a model that is quantized already."""
    if widths := bits(model):
        raise UserError(
            f"{name} is quantized already, to {' and '.join(map(str, widths))} bits",
            hint="quantizing twice only loses quality: use it as it is, or start from the model it was made from",
        )


def quantize_model(model: Transformer, to: Quantization, *, name: str = "the model") -> Transformer:
    """Replace every ``Linear``, the embedding and the head by a ``QuantMatrix``, in place; a tied head stays tied.

    The head of a task is not quantized. Raises UserError for a model (``name`` in the message) that is already.
    """
    refuse_twice(model, name)
    layers = [(path, module.weight, module.bias) for path, module in model.named_modules() if type(module) is Linear]
    layers = [layer for layer in layers if not layer[0].startswith(f"{heads.ATTRIBUTE}.")]
    own = [layer for layer in layers if layer[1] is not model.embed.weight]
    for path, weight, bias in [("embed", model.embed.weight, None), *own]:
        if wanted := to.bits_of(path, weight.shape[1]):
            place(model, path, quantized(weight, wanted, bias=bias))
    return model


@torch.no_grad()
def dequantize_model(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Replace every ``QuantMatrix`` and ``PackedMatrix`` by a plain layer of ``dtype``, in place."""
    if isinstance(model.embed, QuantEmbedding):
        numbers = model.embed.matrix.dequantized(dtype)
        model.embed = nn.Embedding.from_pretrained(numbers, freeze=False)
        if model.config.tied:
            model.head = Linear.of(model.embed.weight, None)
    for path, matrix in list(model.named_modules()):
        if isinstance(matrix, QuantMatrix | PackedMatrix):
            put(model, {path: Linear.of(matrix.dequantized(dtype), matrix.bias)})
    return model


def place(model: Transformer, path: str, matrix: QuantMatrix | PackedMatrix) -> None:
    """Replace the layer at ``path`` by a matrix; "embed" replaces a tied head too.

    Encoders read whole texts, by products of many rows: matrices of 8 bits quantize their input to 8 bits too.
    """
    if isinstance(matrix, QuantMatrix):
        arch = model.config.architecture
        matrix.int8_activations = (
            matrix.bits == 8 and matrix.low is None and not arch.causal and path not in ("embed", "head")
        )
    if path == "embed":
        model.embed = QuantEmbedding(matrix)  # type: ignore[assignment]
        if model.config.tied:
            model.head = matrix  # type: ignore[assignment]
        return
    put(model, {path: matrix})


def assign(
    model: Transformer, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype, to: Quantization | None
) -> None:
    """Set a parameter of a new model, as a ``QuantMatrix`` where ``quantize_model`` makes one.

    A tied head goes with the embedding, whose name is "embed.weight".
    """
    path, _, kind = name.rpartition(".")
    part, tensor = model.get_submodule(path), tensor.to(device)
    matrix = kind == "weight" and (path == "embed" or type(part) is Linear)
    wanted = to.bits_of(path, tensor.shape[1]) if to is not None and matrix else None
    if wanted is not None:
        bias = getattr(part, "bias", None)
        place(model, path, quantized(tensor, wanted, bias=None if bias is None or bias.is_meta else bias))
        return
    value = tensor.to(dtype)
    setattr(part, kind, value if isinstance(part, QuantMatrix) else nn.Parameter(value))
    if path == "embed" and model.config.tied:
        model.head.weight = model.embed.weight
