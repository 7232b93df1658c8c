"""The block formats of GGUF's tensors in numpy: bytes to integer groups, to numbers, and back.

A row of a quantized tensor is a sequence of blocks; a block holds a few scales and the packed codes of its weights.
Layouts as in ggml-common.h, numbers as in ggml-quants.c (llama.cpp): equal bit by bit to ``gguf.quants``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfcli.errors import UserError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Unpacked = tuple[Bytes, Floats, Floats]
"""Codes (rows, blocks, weights of a block), scales and lows (rows, blocks, groups of a block)."""

_TWO, _FOUR, _SIGN = np.uint8(2), np.uint8(4), np.uint8(0x80)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Groups:
    """A quantized matrix as codes with a scale and a low end per group: ``q * scale + low``; nothing is rounded."""

    bits: int
    """4: codes 0..15; 8: codes 0..255."""
    group: int
    """Number of neighbors in a row that share a scale and a low end."""
    q: Bytes
    """(rows, cols)."""
    scale: Floats
    """(rows, cols / group)."""
    low: Floats
    """(rows, cols / group): the value of code 0."""

    def dequantize(self) -> Floats:
        """Return ``q * scale + low`` (rows, cols); every product here is exact in fp32, the sum rounds once."""
        rows, cols = self.q.shape
        out = self.q.reshape(rows, -1, self.group).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged file may hold any bits
            out *= self.scale[:, :, None]
            out += self.low[:, :, None]
        return out.reshape(rows, cols)


def _spread(packed: Bytes, bits: int, run: int) -> Bytes:
    """Unpack codes of ``bits`` from bytes (..., n): of each run of bytes first the lowest bits, then the next, ..."""
    runs = packed.reshape(*packed.shape[:-1], -1, run)
    out = np.empty((*runs.shape[:-1], 8 // bits, run), np.uint8)
    for at in range(8 // bits):
        np.right_shift(runs, at * bits, out=out[..., at, :])
    out &= (1 << bits) - 1
    return out.reshape(*packed.shape[:-1], -1)


def _one(numbers: NDArray[Any]) -> Floats:
    """Return a number per block in a shape that broadcasts over its groups."""
    return numbers.astype(np.float32)[..., None]


def _q4_q5(b: NDArray[Any]) -> Unpacked:
    """Unpack Q4_0, Q4_1, Q5_0 or Q5_1: a fifth bit in "h", a minimum in "m", else codes around the middle one."""
    q, d, fields = _spread(b["q"], 4, 16), _one(b["d"]), b.dtype.names or ()
    if "h" in fields:
        q |= np.unpackbits(b["h"], axis=-1, bitorder="little") << _FOUR
    return q, d, _one(b["m"]) if "m" in fields else -(16 if "h" in fields else 8) * d


def _q8_0(b: NDArray[Any]) -> Unpacked:
    d = _one(b["d"])
    return b["q"] ^ _SIGN, d, -128 * d  # two's complement with the sign bit flipped is offset by 128


def _q2_k(b: NDArray[Any]) -> Unpacked:
    return (
        _spread(b["q"], 2, 32),
        _one(b["d"]) * (b["s"] & 15).astype(np.float32),
        -_one(b["m"]) * (b["s"] >> 4).astype(np.float32),
    )


def _q3_k(b: NDArray[Any]) -> Unpacked:
    q = _spread(b["q"], 2, 32) | (_spread(b["h"], 1, 32) << _TWO)
    scales = _spread(b["s"][..., :8], 4, 8) | (_spread(b["s"][..., 8:], 2, 4) << _FOUR)
    d = _one(b["d"]) * (scales.astype(np.float32) - 32)
    return q, d, -4 * d


def _q4_q5_k(b: NDArray[Any]) -> Unpacked:
    """Unpack Q4_K or Q5_K (a fifth bit in "h"): eight scales and minima of six bits each, times the block's own."""
    q = _spread(b["q"], 4, 32)
    if "h" in (b.dtype.names or ()):
        q |= _spread(b["h"], 1, 32) << _FOUR
    s, m, high = b["s"][..., 0:4], b["s"][..., 4:8], b["s"][..., 8:12]
    scales = np.concatenate([s & 63, (high & 15) | (s >> 2 & 48)], axis=-1)
    minima = np.concatenate([m & 63, (high >> 4) | (m >> 2 & 48)], axis=-1)
    return q, _one(b["d"]) * scales, -_one(b["m"]) * minima


def _q6_k(b: NDArray[Any]) -> Unpacked:
    d = _one(b["d"]) * b["s"].astype(np.float32)
    return _spread(b["q"], 4, 64) | (_spread(b["h"], 2, 32) << _FOUR), d, -32 * d


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockType:
    """One of ggml's types: a block of ``block`` weights takes ``layout.itemsize`` bytes."""

    id: int
    """The number of the type in files (enum ggml_type)."""
    layout: np.dtype[Any]
    block: int = 1
    bits: int = 0
    """Those of ``Groups``; 0 for plain numbers."""
    group: int = 0
    unpack: Callable[[NDArray[Any]], Unpacked] | None = field(default=None, repr=False)

    @property
    def quantized(self) -> bool:
        """True if it holds codes with scales, which ``groups`` reads."""
        return self.unpack is not None

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of a row. Raises ValueError for one that is not a whole number of blocks."""
        if cols % self.block:
            raise ValueError(f"a row of {cols} is not a multiple of {self.block}")
        return cols // self.block * self.layout.itemsize


def _layout(**fields: str) -> np.dtype[Any]:
    """Return the dtype of a block: d its scale, m its minimum, s the scales of groups, q codes, h their high bits."""
    return np.dtype(list(fields.items()))


F2 = "<f2"
TYPES = {
    "F32": BlockType(id=0, layout=np.dtype("<f4")),
    "F16": BlockType(id=1, layout=np.dtype("<f2")),
    "BF16": BlockType(id=30, layout=np.dtype("<u2")),
    "Q8_0": BlockType(id=8, block=32, bits=8, group=32, unpack=_q8_0, layout=_layout(d=F2, q="32u1")),
    "Q4_0": BlockType(id=2, block=32, bits=4, group=32, unpack=_q4_q5, layout=_layout(d=F2, q="16u1")),
    "Q4_1": BlockType(id=3, block=32, bits=4, group=32, unpack=_q4_q5, layout=_layout(d=F2, m=F2, q="16u1")),
    "Q5_0": BlockType(id=6, block=32, bits=8, group=32, unpack=_q4_q5, layout=_layout(d=F2, h="4u1", q="16u1")),
    "Q5_1": BlockType(id=7, block=32, bits=8, group=32, unpack=_q4_q5, layout=_layout(d=F2, m=F2, h="4u1", q="16u1")),
    **{
        name: BlockType(id=id, block=256, bits=bits, group=group, unpack=unpack, layout=layout)
        for name, id, bits, group, unpack, layout in (
            ("Q2_K", 10, 4, 16, _q2_k, _layout(s="16u1", q="64u1", d=F2, m=F2)),
            ("Q3_K", 11, 4, 16, _q3_k, _layout(h="32u1", q="64u1", s="12u1", d=F2)),
            ("Q4_K", 12, 4, 32, _q4_q5_k, _layout(d=F2, m=F2, s="12u1", q="128u1")),
            ("Q5_K", 13, 8, 32, _q4_q5_k, _layout(d=F2, m=F2, s="12u1", h="32u1", q="128u1")),
            ("Q6_K", 14, 8, 16, _q6_k, _layout(q="128u1", h="64u1", s="16i1", d=F2)),
        )
    },
}
"""The types that are read, by their names in llama.cpp."""
WRITES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
"""The types that ``quantize`` makes."""


def groups(type: str, data: Bytes) -> Groups:
    """Return the codes and scales in rows of blocks (rows, bytes of a row) of a quantized type."""
    kind = TYPES[type]
    if kind.unpack is None:
        raise ValueError(f"{type} has no groups")
    rows = len(data)
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged file may hold any bits
        q, scale, low = kind.unpack(data.view(kind.layout))
    q, scale, low = q.reshape(rows, -1), scale.reshape(rows, -1), low.reshape(rows, -1)
    return Groups(bits=kind.bits, group=kind.group, q=q, scale=scale, low=low)


def dequantize(type: str, data: Bytes) -> Floats:
    """Return the numbers in rows of bytes (rows, bytes of a row), as new memory (rows, cols)."""
    kind = TYPES[type]
    if kind.quantized:
        return groups(type, data).dequantize()
    values = data.view(kind.layout)
    if type == "BF16":  # the upper half of an fp32
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return values.astype(np.float32)


def quantize(type: str, values: NDArray[Any]) -> Bytes:
    """Quantize numbers (rows, cols) to blocks of a type in ``WRITES`` (rows, bytes of a row), as llama.cpp's reference.

    Raises UserError for numbers that are not finite or too large for the type, ValueError for cols that are not whole
    blocks.
    """
    kind = TYPES[type]
    kind.row_bytes(values.shape[1])
    x = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(x).all():
        raise UserError("it holds values that are not finite", hint="the model is damaged or its training diverged")
    with np.errstate(over="ignore", under="ignore"):
        out = _QUANTIZE[type](x.reshape(len(x), -1, kind.block))
    halves = [out] if type == "F16" else [out[name] for name in ("d", "m") if name in (out.dtype.names or ())]
    if not all(np.isfinite(half).all() for half in halves):
        raise UserError(f"it holds values up to {np.abs(x).max():.3g}, too large for {type}", hint="choose F32 or BF16")
    return out.view(np.uint8).reshape(len(x), -1)


def _inverse(d: Floats) -> Floats:
    """Return 1/d, and 0 where it overflows fp32."""
    return np.divide(1, d, out=np.zeros_like(d), where=np.abs(d) > 1 / np.finfo(np.float32).max)


def _blocks(type: str, q: Bytes) -> NDArray[Any]:
    """Return new blocks of a 4- or 8-bit type with these codes (rows, blocks, 32), scales not yet filled in."""
    out = np.empty(q.shape[:-1], TYPES[type].layout)
    out["q"] = q[..., :16] | (q[..., 16:] << _FOUR) if TYPES[type].bits == 4 else q ^ _SIGN
    return out


def _to_bf16(x: Floats) -> NDArray[Any]:
    """Round to nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2")


def _to_q8_0(x: Floats) -> NDArray[Any]:
    """d = max |x| / 127, q = x / d to nearest, ties away from zero."""
    d = np.abs(x).max(-1) / np.float32(127)
    scaled = x * _inverse(d)[..., None]
    whole = np.trunc(scaled)
    whole += np.trunc(2 * (scaled - whole))
    out = _blocks("Q8_0", whole.astype(np.int8).view(np.uint8) ^ _SIGN)
    out["d"] = d
    return out


def _to_q4_0(x: Floats) -> NDArray[Any]:
    """d = -(the x of largest magnitude) / 8, q = x / d + 8 to nearest, at most 15."""
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    d = largest / np.float32(-8)
    q = np.trunc(x * _inverse(d)[..., None] + np.float32(8.5))
    out = _blocks("Q4_0", np.minimum(q, 15).astype(np.uint8))
    out["d"] = d
    return out


def _to_q4_1(x: Floats) -> NDArray[Any]:
    """m = min x, d = (max x - min x) / 15, q = (x - m) / d to nearest."""
    low = x.min(-1)
    d = (x.max(-1) - low) / np.float32(15)
    q = np.trunc((x - low[..., None]) * _inverse(d)[..., None] + np.float32(0.5))
    out = _blocks("Q4_1", np.minimum(q, 15).astype(np.uint8))
    out["d"], out["m"] = d, low
    return out


_QUANTIZE: dict[str, Callable[[Floats], NDArray[Any]]] = {
    "F32": lambda x: x.astype("<f4"),
    "F16": lambda x: x.astype("<f2"),
    "BF16": _to_bf16,
    "Q8_0": _to_q8_0,
    "Q4_0": _to_q4_0,
    "Q4_1": _to_q4_1,
}


def _holds(type: str, groups: Groups) -> bool:
    if groups.group != 32 or groups.bits != TYPES[type].bits or not _is_half(groups.scale):
        return False
    if type == "Q4_1":
        return _is_half(groups.low)
    middle = 8 if groups.bits == 4 else 128
    return np.array_equal(groups.low, -middle * groups.scale)


def pack(groups: Groups, type: str) -> Bytes:
    """Return the blocks (rows, bytes of a row) of Q4_0, Q4_1 or Q8_0 with exactly these groups.

    Raises ValueError where the type cannot hold them exactly.
    """
    if not _holds(type, groups):
        raise ValueError(f"{type} does not hold these groups exactly")
    rows = len(groups.q)
    out = _blocks(type, groups.q.reshape(rows, -1, 32))
    out["d"] = groups.scale
    if type == "Q4_1":
        out["m"] = groups.low
    return out.view(np.uint8).reshape(rows, -1)


def _is_half(values: Floats) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values).all() and np.array_equal(values.astype(np.float16).astype(np.float32), values))
