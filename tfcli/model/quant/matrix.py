"""Matrices in 8 or 4 bits: groups of 32 columns share a scale and a minimum.

A number is ``code * scale + low`` with an unsigned code, fp16 scale and fp16 low. This represents GGUF's blocks of 32
(Q4_0, Q4_1, Q8_0, and Q5 and Q4_K with their codes unchanged) exactly, so that nothing is quantized twice. Products of
a few rows use the kernel of ``tfcli.native.ops``, which dequantizes codes in registers; without a compiler, and on
CUDA, bf16 uses PyTorch's ``_weight_int4pack_mm``. For many rows the matrix is dequantized to their dtype for each
product. With ``int8_activations`` these rows are quantized to 8 bits instead, in groups of 32 too (as llama.cpp
multiplies Q8_0; Dettmers et al. 2022, 2.1), and multiplied as integers.
"""

from __future__ import annotations

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
CENTER: dict[int, int] = {4: 8, 8: 128}
"""The code that stands for 0 where a matrix has no ``low``."""
TILE = 32
"""Rows that are stored together."""


class QuantMatrix(nn.Module):
    """A matrix W (rows, columns) in 4 or 8 bits; called, it is the layer ``y = x W^T + bias``.

    It is stored in tiles of 32 rows, in the order in which products read it (see ``native.cpp``): ``codes`` uint8
    (tiles, groups, bytes), ``scale`` and ``low`` fp16 (tiles, groups, 32); without ``low``, codes are centered. Padding
    has the scale 0. ``from_codes`` makes one from codes row by row, ``grouped`` returns them.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor | None
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, low: Tensor | None, *, bits: Bits, rows: int, columns: int,
        bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bits: Bits = bits
        self.rows, self.columns = rows, columns
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("low", low)
        self.register_buffer("bias", bias)
        self.int8_activations = False
        """Quantize many bf16 rows to 8 bits too, on processors that multiply 8 by 8 bits."""
        self._packed: _Packed | None = None

    def describe(self) -> ops.MatrixStruct:
        """Return where the matrix lies and how."""
        kind, groups = ops.QUANTIZED[self.bits], self.scale.shape[1]
        return ops.MatrixStruct.over(
            kind, self.rows, self.columns, self.codes, groups, scale=self.scale, low=self.low, bias=self.bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows) in the dtype of ``x``, differentiable in ``x``."""
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
        return F.linear(x, self.dequantized(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def dequantized(self, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
        """Return the matrix (rows, columns), or only the rows of ``index`` (N,), in ``dtype``."""
        if self.codes.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and ops.ready():
            return ops.dequantized(self, dtype, index)
        return self.dequantized_reference(index).to(dtype)

    def dequantized_reference(self, index: Tensor | None = None) -> Tensor:
        """Compute ``code * scale + low`` in fp32 by PyTorch's operators: the twin of the compiled kernel."""
        codes, scale, low = self.grouped(index)
        centered = codes.float() - CENTER[self.bits] if low is None else codes.float()
        numbers = centered * scale.float()[..., None]
        numbers = numbers if low is None else numbers + low.float()[..., None]
        return numbers.flatten(1)[:, : self.columns]

    def grouped(self, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes uint8 (N, groups, 32), scale and low fp16 (N, groups) of all rows or those of ``index`` (N,)."""
        if index is None:
            index = torch.arange(self.rows, device=self.codes.device)
        tile, within = index // TILE, index % TILE
        tiles, groups = self.scale.shape[:2]
        laid = self.codes.view(tiles, groups, 2, -1, 16, 2)[tile, :, within // 16, :, within % 16]  # (N, groups, j, 2)
        codes = laid.flatten(2) if self.bits == 8 else torch.cat([(laid & 15).flatten(2), (laid >> 4).flatten(2)], -1)
        low = None if self.low is None else self.low[tile, :, within]
        return codes, self.scale[tile, :, within], low


class _Product(torch.autograd.Function):
    """y = x W^T + bias with a frozen W:  dx = dy W.  W is dequantized in each pass and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: QuantMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix._multiply(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.matrix.dequantized(grads[0].dtype), None


class PackedMatrix(nn.Module):
    """A bf16 matrix W (rows, columns) in tiles of 32 rows; called, it is the layer ``y = x W^T + bias``.

    ``tiles`` is (tiles, pairs of columns, 32, 2), which a product reads sequentially (``native.cpp``). Padding is 0.
    """

    tiles: Tensor
    bias: Tensor | None

    def __init__(self, tiles: Tensor, *, rows: int, columns: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.register_buffer("tiles", tiles)
        self.register_buffer("bias", bias)

    def describe(self) -> ops.MatrixStruct:
        """Return where the matrix lies and how."""
        groups = self.tiles.shape[1] // (GROUP // 2)
        return ops.MatrixStruct.over(ops.TILED, self.rows, self.columns, self.tiles, groups, bias=self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows) in the dtype of ``x``."""
        if x.device.type == "cpu" and ops.fast(x.dtype):
            return ops.linear(self, x)
        return F.linear(x, self.dequantized(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def dequantized(self, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
        """Return the matrix (rows, columns), or only the rows of ``index`` (N,), in ``dtype``."""
        if self.tiles.device.type == "cpu" and dtype in ops.KINDS and ops.ready():
            return ops.dequantized(self, dtype, index)
        index = torch.arange(self.rows, device=self.tiles.device) if index is None else index
        return self.tiles[index // TILE, :, index % TILE].flatten(1)[:, : self.columns].to(dtype)


class QuantEmbedding(nn.Module):
    """An embedding of the rows of a matrix in tiles, which a tied head shares."""

    def __init__(self, matrix: QuantMatrix | PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def describe(self) -> ops.MatrixStruct:
        """Return where the matrix lies and how."""
        return self.matrix.describe()

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) -> (..., columns) in fp32."""
        return self.matrix.dequantized(torch.float32, ids.flatten()).view(*ids.shape, self.matrix.columns)


class _Packed:
    """PyTorch's 4-bit product, without a compiler and on CUDA: zeros and scales in bf16.

    A code of 8 bits is 16 times one of 4 plus another, so that its product is the sum of two.
    """

    def __init__(self, matrix: QuantMatrix) -> None:
        self._rows = matrix.rows
        whole = torch.arange(-(-matrix.rows // TILE) * TILE, device=matrix.codes.device)  # whole tiles
        codes, scale, low = matrix.grouped(whole)
        flat, scale = codes.flatten(1), scale.float()
        low = -CENTER[matrix.bits] * scale if low is None else low.float()
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


def quantize(weight: Tensor, bits: Bits, *, bias: Tensor | None = None) -> QuantMatrix:
    """Return the nearest ``QuantMatrix`` to a matrix (rows, columns): 8 bits centered, 4 bits with a minimum.

    The grid of each 4-bit group is the one of a few candidates with the least squared error, its scale and low fitted
    by least squares to the codes (as in Lloyd 1982); both are rounded to fp16 before the codes are computed.
    """
    columns = weight.shape[1]
    groups = -(-columns // GROUP)
    numbers = F.pad(weight.detach().float(), (0, groups * GROUP - columns)).view(len(weight), groups, GROUP)
    codes, scale, low = _eight(numbers) if bits == 8 else _four(numbers)
    return from_codes(codes.flatten(1), scale, low, bits=bits, columns=columns, bias=bias)


_Grid = tuple[Tensor, Tensor, Tensor | None]
"""Codes (rows, groups, 32), scale and low (rows, groups)."""


def _eight(numbers: Tensor) -> _Grid:
    scale = (numbers.abs().amax(-1) / 127).half()
    codes = (numbers / scale.float().clamp_min(1e-30)[..., None]).round_().clamp_(-127, 127).add_(128)
    return codes.to(torch.uint8), scale, None


def _four(numbers: Tensor) -> _Grid:
    low, high = numbers.amin(-1), numbers.amax(-1)
    best_codes, best_scale, best_low = torch.zeros_like(numbers, dtype=torch.uint8), low.half(), low.half()
    least = torch.full_like(low, float("inf"))
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8):
        center, span = (high + low) / 2, (high - low) * shrink
        scale, offset = (span / 15).half(), (center - span / 2).half()
        for _ in range(2):  # codes from the grid, the grid from the codes
            codes = _codes(numbers, scale, offset)
            scale, offset = _fit(numbers, codes, scale, offset)
        codes = _codes(numbers, scale, offset)
        error = (codes * scale.float()[..., None] + offset.float()[..., None] - numbers).square_().sum(-1)
        better = (error < least) | (shrink == 1.0)
        least = torch.where(better, error, least)
        best_codes = torch.where(better[..., None], codes.to(torch.uint8), best_codes)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, offset, best_low)
    return best_codes, best_scale, best_low


def _codes(numbers: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    steps = scale.float().clamp_min(1e-30)[..., None]
    return ((numbers - low.float()[..., None]) / steps).round_().clamp_(0, 15)


def _fit(numbers: Tensor, codes: Tensor, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Fit ``numbers = codes * scale + low`` in each group by least squares; a group of one code keeps its grid."""
    mean_c, mean_w = codes.mean(-1, keepdim=True), numbers.mean(-1, keepdim=True)
    spread = (codes - mean_c).square().sum(-1)
    slope = ((codes - mean_c) * (numbers - mean_w)).sum(-1) / spread.clamp_min(1e-12)
    fits = spread > 0
    offset = mean_w[..., 0] - slope * mean_c[..., 0]
    return torch.where(fits, slope.half(), scale), torch.where(fits, offset.half(), low)


def from_codes(
    codes: Tensor, scale: Tensor, low: Tensor | None, *, bits: Bits, columns: int, bias: Tensor | None = None
) -> QuantMatrix:
    """Make a matrix of codes uint8 (rows, columns or padded), one a byte, and fp16 scale and low (rows, groups)."""
    rows, groups = scale.shape
    more, tiles = -rows % TILE, -(-rows // TILE)
    codes = F.pad(codes, (0, groups * GROUP - codes.shape[1], 0, more))
    if bits == 4:
        codes = codes.view(tiles, 2, 16, groups, 2, 8, 2)
        codes = codes[:, :, :, :, 0] | (codes[:, :, :, :, 1] << 4)
    else:
        codes = codes.view(tiles, 2, 16, groups, 16, 2)
    codes = codes.permute(0, 3, 1, 4, 2, 5).reshape(tiles, groups, -1)  # from (tile, half, row, group, j, 2)

    def tiled(numbers: Tensor) -> Tensor:
        return F.pad(numbers, (0, 0, 0, more)).view(tiles, TILE, groups).transpose(1, 2).contiguous()

    low = None if low is None else tiled(low)
    return QuantMatrix(codes.contiguous(), tiled(scale), low, bits=bits, rows=rows, columns=columns, bias=bias)
