"""Weights in 8 or 4 bits: groups of 32 columns that share a scale and a minimum, and the layers that multiply by them.

A number is ``code * scale + low`` with an unsigned code, fp16 scale and fp16 low. That holds GGUF's blocks of 32 (Q4_0,
Q4_1, Q8_0, and Q5 and Q4_K with their codes unchanged) as they are, so that nothing is quantized twice. Products of a
few rows go to the kernel of ``tfcli.native.ops``, which dequantizes codes in registers; where there is no compiler, and
on CUDA, in bf16 to PyTorch's ``_weight_int4pack_mm``. Many rows are multiplied by the matrix dequantized to their
dtype, for the time of the product: large products want bf16 matrices. With ``int8_activations`` rows are rounded to 8
bits instead, in groups of 32 too (as llama.cpp multiplies Q8_0; Dettmers et al. 2022, 2.1), and multiplied as whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.native import ops

GROUP = 32
"""Columns that share a scale."""
FEW_ROWS = 8
"""Rows up to which codes are dequantized in registers; beyond, dequantizing the matrix once is faster."""
Bits = Literal[4, 8]
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
CENTRE: dict[int, int] = {4: 8, 8: 128}
"""The code that stands for 0 where a matrix has no ``low``."""
TILE = 32
"""Rows that lie together."""


class QuantMatrix(nn.Module):
    """A matrix W (rows, columns) in 4 or 8 bits; called, it is the layer ``y = x W^T + bias``.

    It lies in tiles of 32 rows, in the order in which products read it (``native.cpp`` says how): ``codes`` uint8
    (tiles, groups, bytes), ``scale`` and ``low`` fp16 (tiles, groups, 32); without ``low``, codes are centred. Padding
    has the scale 0. ``from_codes`` makes one of codes row by row, ``grouped`` gives them back.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        low: Tensor | None,
        *,
        bits: Bits,
        rows: int,
        columns: int,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits: Bits = bits
        self.rows, self.columns = rows, columns
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("low", low)
        self.register_buffer("bias", bias)
        self.int8_activations = False
        """Products of many rows of bf16 round these to 8 bits too, where the processor multiplies 8 by 8 bits."""
        self._packed: _Packed | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.low, self.bias) if t is not None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows) in the dtype of ``x``; its gradient goes to ``x``."""
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        few = x.numel() <= FEW_ROWS * x.shape[-1]
        if self.int8_activations and x.device.type == "cpu" and not self.columns % GROUP and ops.int8(x.dtype):
            return ops.linear_int8(self, x)
        if x.device.type == "cpu" and ops.ready() and (few or ops.fast(x.dtype)):
            return ops.linear(self, x)
        if few and x.dtype == torch.bfloat16 and x.device.type in ("cpu", "cuda"):
            self._packed = self._packed or _Packed(self)
            return self._packed(x, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized(x.dtype), bias)

    def dequantized(self, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
        """The matrix (rows, columns), or only the rows of ``index`` (N,), as plain numbers of ``dtype``."""
        if self.codes.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and ops.ready():
            return ops.dequantized(self, dtype, index)
        return self.dequantized_reference(index).to(dtype)

    def dequantized_reference(self, index: Tensor | None = None) -> Tensor:
        """``code * scale + low`` in fp32, written out."""
        codes, scale, low = self.grouped(index)
        wide = codes.float()
        wide = wide - CENTRE[self.bits] if low is None else wide
        wide = wide * scale.float()[..., None]
        wide = wide if low is None else wide + low.float()[..., None]
        return wide.flatten(1)[:, : self.columns]

    def grouped(self, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes uint8 (N, groups, 32), scale and low fp16 (N, groups) of all rows, or those of ``index`` (N,)."""
        if index is None:
            index = torch.arange(self.rows, device=self.codes.device)
        tile, within = index // TILE, index % TILE
        tiles, groups = self.scale.shape[:2]
        laid = self.codes.view(tiles, groups, 2, -1, 16, 2)[tile, :, within // 16, :, within % 16]  # (N, groups, j, 2)
        codes = laid.flatten(2) if self.bits == 8 else torch.cat([(laid & 15).flatten(2), (laid >> 4).flatten(2)], -1)
        low = None if self.low is None else self.low[tile, :, within]
        return codes, self.scale[tile, :, within], low


class _Product(torch.autograd.Function):
    """y = x W^T + bias with a frozen W:  dx = dy W.  W is dequantized in each direction and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: QuantMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix._multiply(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.matrix.dequantized(grads[0].dtype), None


class PackedMatrix(nn.Module):
    """A bf16 matrix W (rows, columns) in tiles of 32 rows; called, it is the layer ``y = x W^T + bias``.

    ``tiles`` is (tiles, pairs of columns, 32, 2): a product reads it straight on (``native.cpp``). Padding is 0.
    """

    tiles: Tensor
    bias: Tensor | None

    def __init__(self, tiles: Tensor, *, rows: int, columns: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.register_buffer("tiles", tiles)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows) in the dtype of ``x``."""
        if x.device.type == "cpu" and ops.fast(x.dtype):
            return ops.linear(self, x)
        return F.linear(x, self.dequantized(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def dequantized(self, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
        """The matrix (rows, columns), or only the rows of ``index`` (N,), as plain numbers of ``dtype``."""
        if self.tiles.device.type == "cpu" and dtype in ops.KINDS and ops.ready():
            return ops.dequantized(self, dtype, index)
        index = torch.arange(self.rows, device=self.tiles.device) if index is None else index
        return self.tiles[index // TILE, :, index % TILE].flatten(1)[:, : self.columns].to(dtype)


class QuantEmbedding(nn.Module):
    """Rows of a matrix in tiles looked up by id: an embedding, whose matrix a tied head shares."""

    def __init__(self, matrix: QuantMatrix | PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) -> (..., columns) in fp32."""
        return self.matrix.dequantized(torch.float32, ids.flatten()).view(*ids.shape, self.matrix.columns)


class _Packed:
    """PyTorch's own 4-bit product, where the kernel cannot be compiled and on CUDA: zeros and scales in bf16.

    A code of 8 bits is 16 times one of 4 plus another: its product is the sum of two.
    """

    def __init__(self, matrix: QuantMatrix) -> None:
        self._rows = matrix.rows
        whole = torch.arange(-(-matrix.rows // TILE) * TILE, device=matrix.codes.device)  # the operator wants no rest
        codes, scale, low = matrix.grouped(whole)
        flat, scale = codes.flatten(1), scale.float()
        low = -CENTRE[matrix.bits] * scale if low is None else low.float()
        # The operator computes (code - 8) * scale + zero.
        if matrix.bits == 4:
            parts = [(flat, scale, low + 8 * scale)]
        else:
            parts = [(flat >> 4, 16 * scale, low + 128 * scale), (flat & 15, scale, 8 * scale)]
        on_cpu = codes.device.type == "cpu"
        # The CUDA kernel reads 1024 columns at a time.
        self._columns = flat.shape[1] if on_cpu else -(-flat.shape[1] // 1024) * 1024
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
        self._parts = [self._packed(*part, on_cpu=on_cpu) for part in parts]

    def _packed(self, codes: Tensor, scale: Tensor, zero: Tensor, *, on_cpu: bool) -> tuple[Tensor, Tensor]:
        """Codes of 4 bits, and (columns / 32, rows, 2) scales and zeros."""
        scale_zero = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
        if on_cpu:
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1), scale_zero
        more = self._columns - codes.shape[1]
        codes, scale_zero = F.pad(codes, (0, more)), F.pad(scale_zero, (0, 0, 0, 0, 0, more // GROUP))
        return torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8), scale_zero

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        flat = F.pad(x.reshape(-1, x.shape[-1]), (0, self._columns - x.shape[-1]))
        y: Tensor = sum(self._multiply(flat, weight, GROUP, scale_zero) for weight, scale_zero in self._parts)
        y = y[:, : self._rows].reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias.to(y.dtype)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Codes (rows, groups, 32) with the scale and low (rows, groups) that give the least squared error."""

    codes: Tensor
    scale: Tensor
    low: Tensor | None


def quantize(weight: Tensor, bits: Bits, *, bias: Tensor | None = None) -> QuantMatrix:
    """The nearest ``QuantMatrix`` to a matrix (rows, columns): 8 bits centred, 4 bits with a minimum of each group.

    The grid of each 4-bit group is the one of a few tried whose squared error is least, with scale and low fitted by
    least squares to the codes chosen (as in Lloyd 1982); both are rounded to fp16 before the codes are taken.
    """
    columns = weight.shape[1]
    groups = -(-columns // GROUP)
    wide = F.pad(weight.detach().float(), (0, groups * GROUP - columns)).view(len(weight), groups, GROUP)
    grid = _eight(wide) if bits == 8 else _four(wide)
    return from_codes(grid.codes.flatten(1), grid.scale, grid.low, bits=bits, columns=columns, bias=bias)


def _eight(wide: Tensor) -> _Grid:
    scale = (wide.abs().amax(-1) / 127).half()
    codes = (wide / scale.float().clamp_min(1e-30)[..., None]).round_().clamp_(-127, 127).add_(128)
    return _Grid(codes.to(torch.uint8), scale, None)


def _four(wide: Tensor) -> _Grid:
    low, high = wide.amin(-1), wide.amax(-1)
    best: _Grid | None = None
    least = torch.empty(0)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8):
        centre, span = (high + low) / 2, (high - low) * shrink
        scale, offset = (span / 15).half(), (centre - span / 2).half()
        for _ in range(2):  # codes from the grid, the grid from the codes
            codes = _codes(wide, scale, offset)
            scale, offset = _fit(wide, codes, scale, offset)
        codes = _codes(wide, scale, offset)
        error = (codes * scale.float()[..., None] + offset.float()[..., None] - wide).square_().sum(-1)
        grid = _Grid(codes.to(torch.uint8), scale, offset)
        if best is None or best.low is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = _Grid(
            torch.where(better[..., None], grid.codes, best.codes),
            torch.where(better, scale, best.scale),
            torch.where(better, offset, best.low),
        )
    assert best is not None
    return best


def _codes(wide: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    steps = scale.float().clamp_min(1e-30)[..., None]
    return ((wide - low.float()[..., None]) / steps).round_().clamp_(0, 15)


def _fit(wide: Tensor, codes: Tensor, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of ``wide = codes * scale + low`` in each group; a group of one code keeps what it has."""
    mean_c, mean_w = codes.mean(-1, keepdim=True), wide.mean(-1, keepdim=True)
    spread = (codes - mean_c).square().sum(-1)
    slope = ((codes - mean_c) * (wide - mean_w)).sum(-1) / spread.clamp_min(1e-12)
    fits = spread > 0
    offset = mean_w[..., 0] - slope * mean_c[..., 0]
    return torch.where(fits, slope.half(), scale), torch.where(fits, offset.half(), low)


def from_codes(
    codes: Tensor, scale: Tensor, low: Tensor | None, *, bits: Bits, columns: int, bias: Tensor | None = None
) -> QuantMatrix:
    """A ``QuantMatrix`` of codes uint8 (rows, columns or padded), one a byte, and fp16 scale and low (rows, groups)."""
    rows, groups = scale.shape
    more, tiles = -rows % TILE, -(-rows // TILE)
    codes = F.pad(codes, (0, groups * GROUP - codes.shape[1], 0, more))
    if bits == 4:
        laid = codes.view(tiles, 2, 16, groups, 2, 8, 2)
        laid = laid[:, :, :, :, 0] | (laid[:, :, :, :, 1] << 4)
    else:
        laid = codes.view(tiles, 2, 16, groups, 16, 2)
    laid = laid.permute(0, 3, 1, 4, 2, 5).reshape(tiles, groups, -1)  # from (tile, half, row, group, j, 2)

    def tiled(numbers: Tensor) -> Tensor:
        return F.pad(numbers, (0, 0, 0, more)).view(tiles, TILE, groups).transpose(1, 2).contiguous()

    low = None if low is None else tiled(low)
    return QuantMatrix(laid.contiguous(), tiled(scale), low, bits=bits, rows=rows, columns=columns, bias=bias)
