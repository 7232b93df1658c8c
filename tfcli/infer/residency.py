"""Packing a model's weights for generation: in large pages, bf16 matrices in the order that products read.

Decoding reads all weights for every token; with pages of 4 kB that took up to three times as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor, nn

from tfcli.model.layers import Linear
from tfcli.model.quant.matrix import GROUP, TILE, PackedMatrix
from tfcli.model.quant.quantize import place
from tfcli.model.transformer import Transformer
from tfcli.native import ops

PAGE = 2 << 20
"""Bytes of a large page."""


def pack_weights(model: Transformer) -> None:
    """Pack the weights of a model for inference, in place.

    The weights move to one block of memory in large pages, where the system has these and the weights fill some. On a
    processor that multiplies bf16, bf16 matrices become ``PackedMatrix``. Other parameters and buffers stay the same
    objects. Nothing else may use the model meanwhile; a second call does nothing.
    """
    matrices = _packable(model)
    packed = {weight.data_ptr() for _, weight, _ in matrices}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"]
    tensors = [t for t in tensors if t.data_ptr() not in packed]
    if not matrices and len({t.untyped_storage().data_ptr() for t in tensors}) == 1:
        return  # packed already, and a ``Stepper`` may hold their addresses
    others = {t.data_ptr(): t.detach() for t in tensors}
    memory = _Memory([_tiled_bytes(weight) for _, weight, _ in matrices] + [t.nbytes for t in others.values()])
    while matrices:  # each is freed once it has moved
        path, weight, bias = matrices.pop(0)
        rows, columns = weight.shape
        tiles = memory.take(_tiled_bytes(weight)).view(torch.bfloat16).view(-(-rows // TILE), -1, TILE, 2)
        ops.tile(weight, tiles)
        place(model, path, PackedMatrix(tiles, rows=rows, columns=columns, bias=bias))
        del weight
    if memory.block is not None:
        by_address: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            by_address.setdefault(tensor.data_ptr(), []).append(tensor)
        while others:
            start, old = others.popitem()
            new = memory.take(old.nbytes).view(old.dtype).view(old.shape)
            new.copy_(old)
            for tensor in by_address[start]:
                tensor.data = new
    _trim()


def _packable(model: Transformer) -> list[tuple[str, Tensor, Tensor | None]]:
    """List path, weight and bias of each matrix to pack; a tied head goes with "embed"."""
    if model.device.type != "cpu" or not ops.fast(torch.bfloat16):
        return []
    layers = [(path, module) for path, module in model.named_modules() if type(module) is Linear]
    if model.config.tied and isinstance(model.embed, nn.Embedding):
        layers = [("embed", model.embed), *(layer for layer in layers if layer[0] != "head")]  # type: ignore[list-item]
    return [
        (path, layer.weight.detach(), getattr(layer, "bias", None))
        for path, layer in layers
        if layer.weight.dtype == torch.bfloat16
    ]


def _tiled_bytes(weight: Tensor) -> int:
    rows, columns = weight.shape
    return -(-rows // TILE) * TILE * -(-columns // GROUP) * GROUP * 2


class _Memory:
    """Memory for tensors of these sizes in bytes, contiguous in large pages where that is possible."""

    def __init__(self, sizes: list[int]) -> None:
        total = sum(map(_aligned, sizes))
        self.block: Tensor | None = None
        """The large pages, if any."""
        self._at = self._moved = 0
        if total < 4 * PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        memory = mmap.mmap(-1, total + PAGE)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
            self.block = torch.frombuffer(memory, dtype=torch.uint8)
            self._at = -self.block.data_ptr() % PAGE

    def take(self, size: int) -> Tensor:
        if self.block is None:
            return torch.empty(size, dtype=torch.uint8)
        start = self._at
        self._at += _aligned(size)
        self._moved += size
        if self._moved > 16 * PAGE:
            _trim()
            self._moved = 0
        return self.block[start : start + size]


def _aligned(size: int) -> int:
    return -(-size // 64) * 64  # whole cache lines


def _trim() -> None:
    """Return freed memory to the system (glibc), so that moved weights are not held twice."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
