"""The block formats of GGUF's tensors in numpy: bytes as integer groups, as numbers, and back.

A row of a quantized tensor is a run of blocks; a block holds a few scales and its weights' codes, packed. Layouts as in
ggml-common.h, numbers as in ggml-quants.c (llama.cpp): equal bit by bit to ``gguf.quants``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    """Neighbours in a row that share a scale and a low end."""
    q: Bytes
    """(rows, cols)."""
    scale: Floats
    """(rows, cols / group)."""
    low: Floats
    """(rows, cols / group): the number that code 0 stands for."""

    def dequantize(self) -> Floats:
        """(rows, cols): ``q * scale + low``; every product here is exact in fp32, the sum rounds once."""
        rows, cols = self.q.shape
        out = self.q.reshape(rows, -1, self.group).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged file may hold any bits
            out *= self.scale[:, :, None]
            out += self.low[:, :, None]
        return out.reshape(rows, cols)

    def take(self, rows: ArrayLike) -> Groups:
        """These rows, in this order."""
        index = np.asarray(rows)
        return Groups(bits=self.bits, group=self.group, q=self.q[index], scale=self.scale[index], low=self.low[index])


def _spread(packed: Bytes, bits: int, run: int) -> Bytes:
    """Codes of ``bits`` from bytes (..., n): of each run of bytes first the lowest bits, then the next ones, ..."""
    runs = packed.reshape(*packed.shape[:-1], -1, run)
    out = np.empty((*runs.shape[:-1], 8 // bits, run), np.uint8)
    for at in range(8 // bits):
        np.right_shift(runs, at * bits, out=out[..., at, :])
    out &= (1 << bits) - 1
    return out.reshape(*packed.shape[:-1], -1)


def _one(numbers: NDArray[Any]) -> Floats:
    """A number of each block, as one that goes for all its groups."""
    return numbers.astype(np.float32)[..., None]


def _q4_0(b: NDArray[Any]) -> Unpacked:
    d = _one(b["d"])
    return _spread(b["q"], 4, 16), d, -8 * d


def _q4_1(b: NDArray[Any]) -> Unpacked:
    return _spread(b["q"], 4, 16), _one(b["d"]), _one(b["m"])


def _q5(b: NDArray[Any]) -> Bytes:
    return _spread(b["q"], 4, 16) | (np.unpackbits(b["h"], axis=-1, bitorder="little") << _FOUR)


def _q5_0(b: NDArray[Any]) -> Unpacked:
    d = _one(b["d"])
    return _q5(b), d, -16 * d


def _q5_1(b: NDArray[Any]) -> Unpacked:
    return _q5(b), _one(b["d"]), _one(b["m"])


def _q8_0(b: NDArray[Any]) -> Unpacked:
    d = _one(b["d"])
    return b["q"] ^ _SIGN, d, -128 * d  # two's complement with the sign bit turned is offset by 128


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


def _scales_k(b: NDArray[Any]) -> tuple[Floats, Floats]:
    """Eight scales and eight minima of six bits each, times the block's own; a minimum is subtracted."""
    s, m, high = b["s"][..., 0:4], b["s"][..., 4:8], b["s"][..., 8:12]
    scales = np.concatenate([s & 63, (high & 15) | (s >> 2 & 48)], axis=-1)
    minima = np.concatenate([m & 63, (high >> 4) | (m >> 2 & 48)], axis=-1)
    return _one(b["d"]) * scales, -_one(b["m"]) * minima


def _q4_k(b: NDArray[Any]) -> Unpacked:
    return _spread(b["q"], 4, 32), *_scales_k(b)


def _q5_k(b: NDArray[Any]) -> Unpacked:
    return _spread(b["q"], 4, 32) | (_spread(b["h"], 1, 32) << _FOUR), *_scales_k(b)


def _q6_k(b: NDArray[Any]) -> Unpacked:
    d = _one(b["d"]) * b["s"].astype(np.float32)
    return _spread(b["q"], 4, 64) | (_spread(b["h"], 2, 32) << _FOUR), d, -32 * d


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockType:
    """One of ggml's types: a block of ``block`` weights takes ``layout.itemsize`` bytes."""

    id: int
    """Its number in a file (enum ggml_type)."""
    layout: np.dtype[Any]
    block: int = 1
    bits: int = 0
    """Of ``Groups``; 0 for plain numbers."""
    group: int = 0
    unpack: Callable[[NDArray[Any]], Unpacked] | None = field(default=None, repr=False)

    @property
    def quantized(self) -> bool:
        """Whether it holds codes with scales, so that ``groups`` reads it."""
        return self.unpack is not None

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row. Raises ValueError for one that is not a whole number of blocks."""
        if cols % self.block:
            raise ValueError(f"a row of {cols} is not a multiple of {self.block}")
        return cols // self.block * self.layout.itemsize


TYPES = {
    "F32": BlockType(id=0, layout=np.dtype("<f4")),
    "F16": BlockType(id=1, layout=np.dtype("<f2")),
    "BF16": BlockType(id=30, layout=np.dtype("<u2")),
    "Q8_0": BlockType(
        id=8, block=32, bits=8, group=32, unpack=_q8_0,
        layout=np.dtype([("d", "<f2"), ("q", "32u1")]),
    ),
    "Q4_0": BlockType(
        id=2, block=32, bits=4, group=32, unpack=_q4_0,
        layout=np.dtype([("d", "<f2"), ("q", "16u1")]),
    ),
    "Q4_1": BlockType(
        id=3, block=32, bits=4, group=32, unpack=_q4_1,
        layout=np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "16u1")]),
    ),
    "Q5_0": BlockType(
        id=6, block=32, bits=8, group=32, unpack=_q5_0,
        layout=np.dtype([("d", "<f2"), ("h", "4u1"), ("q", "16u1")]),
    ),
    "Q5_1": BlockType(
        id=7, block=32, bits=8, group=32, unpack=_q5_1,
        layout=np.dtype([("d", "<f2"), ("m", "<f2"), ("h", "4u1"), ("q", "16u1")]),
    ),
    "Q2_K": BlockType(
        id=10, block=256, bits=4, group=16, unpack=_q2_k,
        layout=np.dtype([("s", "16u1"), ("q", "64u1"), ("d", "<f2"), ("m", "<f2")]),
    ),
    "Q3_K": BlockType(
        id=11, block=256, bits=4, group=16, unpack=_q3_k,
        layout=np.dtype([("h", "32u1"), ("q", "64u1"), ("s", "12u1"), ("d", "<f2")]),
    ),
    "Q4_K": BlockType(
        id=12, block=256, bits=4, group=32, unpack=_q4_k,
        layout=np.dtype([("d", "<f2"), ("m", "<f2"), ("s", "12u1"), ("q", "128u1")]),
    ),
    "Q5_K": BlockType(
        id=13, block=256, bits=8, group=32, unpack=_q5_k,
        layout=np.dtype([("d", "<f2"), ("m", "<f2"), ("s", "12u1"), ("h", "32u1"), ("q", "128u1")]),
    ),
    "Q6_K": BlockType(
        id=14, block=256, bits=8, group=16, unpack=_q6_k,
        layout=np.dtype([("q", "128u1"), ("h", "64u1"), ("s", "16i1"), ("d", "<f2")]),
    ),
}  # fmt: skip
"""The types that are read, by their names in llama.cpp."""
WRITES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
"""The types that ``quantize`` makes."""


def groups(type: str, data: Bytes) -> Groups:
    """The codes and scales in rows of blocks (rows, bytes of a row) of a quantized type."""
    kind = TYPES[type]
    if kind.unpack is None:
        raise ValueError(f"{type} has no groups")
    rows = data.shape[0]
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged file may hold any bits
        q, scale, low = kind.unpack(data.view(kind.layout))
    return Groups(
        bits=kind.bits,
        group=kind.group,
        q=q.reshape(rows, -1),
        scale=scale.reshape(rows, -1),
        low=low.reshape(rows, -1),
    )


def dequantize(type: str, data: Bytes) -> Floats:
    """The numbers in rows of bytes (rows, bytes of a row), as new memory (rows, cols)."""
    kind = TYPES[type]
    if kind.quantized:
        return groups(type, data).dequantize()
    values = data.view(kind.layout)
    if type == "BF16":  # the upper half of an fp32
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return values.astype(np.float32)


def quantize(type: str, values: NDArray[Any]) -> Bytes:
    """Numbers (rows, cols) as blocks of a type in ``WRITES`` (rows, bytes of a row), as llama.cpp's reference does it.

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
    """1/d, and 0 where fp32 has none."""
    return np.divide(1, d, out=np.zeros_like(d), where=np.abs(d) > 1 / np.finfo(np.float32).max)


def _blocks(type: str, q: Bytes) -> NDArray[Any]:
    """New blocks of a 4- or 8-bit type with these codes (rows, blocks, 32) in them; scales are to be filled in."""
    out = np.empty(q.shape[:-1], TYPES[type].layout)
    out["q"] = q[..., :16] | (q[..., 16:] << _FOUR) if TYPES[type].bits == 4 else q ^ _SIGN
    return out


def _to_f32(x: Floats) -> NDArray[Any]:
    return x.astype("<f4")


def _to_f16(x: Floats) -> NDArray[Any]:
    return x.astype("<f2")


def _to_bf16(x: Floats) -> NDArray[Any]:
    """To nearest, ties to even."""
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
    "F32": _to_f32,
    "F16": _to_f16,
    "BF16": _to_bf16,
    "Q8_0": _to_q8_0,
    "Q4_0": _to_q4_0,
    "Q4_1": _to_q4_1,
}


def exact_type(groups: Groups) -> str | None:
    """The type whose blocks hold these groups without any change: Q4_0, Q4_1, Q8_0, or None."""
    return next((type for type in ("Q4_0", "Q8_0", "Q4_1") if _holds(type, groups)), None)


def _holds(type: str, groups: Groups) -> bool:
    if groups.group != 32 or groups.bits != TYPES[type].bits or not _is_half(groups.scale):
        return False
    if type == "Q4_1":
        return _is_half(groups.low)
    middle = 8 if groups.bits == 4 else 128
    return np.array_equal(groups.low, -middle * groups.scale)


def pack(groups: Groups, type: str | None = None) -> tuple[str, Bytes]:
    """A type that holds these groups exactly (default: ``exact_type``) and its blocks (rows, bytes of a row).

    Raises ValueError where it does not, or where there is none.
    """
    type = exact_type(groups) if type is None else type
    if type is None or not _holds(type, groups):
        raise ValueError(f"{type or 'no block type'} does not hold these groups exactly")
    rows = len(groups.q)
    out = _blocks(type, groups.q.reshape(rows, -1, 32))
    out["d"] = groups.scale
    if type == "Q4_1":
        out["m"] = groups.low
    return type, out.view(np.uint8).reshape(rows, -1)


def _is_half(values: Floats) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values).all() and np.array_equal(values.astype(np.float16).astype(np.float32), values))
