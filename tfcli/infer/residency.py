"""Where a model's weights lie while it generates: in large pages, bf16 matrices in the order that products read.

Reading all weights for every token is what decoding is; with pages of 4 kB that took up to three times as long here.
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
    """Make a model that is only read from here on ready for that, in place.

    Its weights move to one stretch of memory in large pages, where the system has these and the weights fill some. On a
    processor that multiplies bf16, bf16 matrices become ``PackedMatrix`` on their way. Other parameters and buffers
    stay the same objects. Nothing else may use the model meanwhile; a second time nothing moves.
    """
    matrices = _packable(model)
    packed = {weight.data_ptr() for _, weight, _ in matrices}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"]
    tensors = [t for t in tensors if t.data_ptr() not in packed]
    if not matrices and len({t.untyped_storage().data_ptr() for t in tensors}) == 1:
        return  # done already, and there may be a ``Stepper`` that knows where they lie
    others = {t.data_ptr(): t.detach() for t in tensors}
    room = _Room([_tiled_bytes(weight) for _, weight, _ in matrices] + [t.nbytes for t in others.values()])
    while matrices:  # each is freed as it has moved
        path, weight, bias = matrices.pop(0)
        rows, columns = weight.shape
        tiles = room.take(_tiled_bytes(weight)).view(torch.bfloat16).view(-(-rows // TILE), -1, TILE, 2)
        ops.tile(weight, tiles)
        place(model, path, PackedMatrix(tiles, rows=rows, columns=columns, bias=bias))
        del weight
    if room.large:
        by_place: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            by_place.setdefault(tensor.data_ptr(), []).append(tensor)
        while others:
            where, old = others.popitem()
            new = room.take(old.nbytes).view(old.dtype).view(old.shape)
            new.copy_(old)
            for tensor in by_place[where]:
                tensor.data = new
    _give_back()


def _packable(model: Transformer) -> list[tuple[str, Tensor, Tensor | None]]:
    """Paths, weights and biases of the matrices that become a ``PackedMatrix``; a tied head goes with "embed"."""
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


class _Room:
    """Memory for pieces of these sizes, one behind the other in large pages where that is possible."""

    def __init__(self, sizes: list[int]) -> None:
        total = sum(map(_whole_lines, sizes))
        self._memory: Tensor | None = None
        self._at = self._moved = 0
        if total < 4 * PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        memory = mmap.mmap(-1, total + PAGE)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
            self._memory = torch.frombuffer(memory, dtype=torch.uint8)
            self._at = -self._memory.data_ptr() % PAGE

    @property
    def large(self) -> bool:
        """Whether there are large pages."""
        return self._memory is not None

    def take(self, size: int) -> Tensor:
        """The next ``size`` bytes."""
        if self._memory is None:
            return torch.empty(size, dtype=torch.uint8)
        start = self._at
        self._at += _whole_lines(size)
        self._moved += size
        if self._moved > 16 * PAGE:
            _give_back()
            self._moved = 0
        return self._memory[start : start + size]


def _whole_lines(size: int) -> int:
    return -(-size // 64) * 64


def _give_back() -> None:
    """Hand freed memory back to the system (glibc), so that what was moved is not held twice."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
