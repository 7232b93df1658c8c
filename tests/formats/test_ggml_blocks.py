"""Blocks of quantized weights, held to the gguf package bit by bit."""

from __future__ import annotations

import contextlib
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tfcli.errors import UserError
from tfcli.formats.gguf import blocks as ggml_blocks
from tfcli.formats.gguf.blocks import TYPES, WRITES, Groups

QUANTIZED = [name for name, kind in TYPES.items() if kind.quantized]
BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def random_blocks(type: str, rows: int = 12, cols: int = 512, seed: int = 0, sane: bool = True) -> NDArray[np.uint8]:
    """Rows of any bits, but for the scales: those are numbers, unless not ``sane``."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, TYPES[type].row_bytes(cols)), dtype=np.uint8)
    if sane and TYPES[type].quantized:
        blocks = data.view(TYPES[type].layout)
        for name in {"d", "m"} & set(blocks.dtype.names or ()):
            blocks[name] = rng.normal(0, 0.1, blocks.shape)
    if sane and type in ("F16", "BF16", "F32"):
        values = rng.normal(0, 1, (rows, cols)).astype(np.float32)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type]).view(np.uint8)
    return data.reshape(rows, -1)


def oracle(type: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type]).reshape(len(data), -1)


def test_types_are_those_of_llama_cpp() -> None:
    """Would catch a wrong number or size: every tensor after it would be read from the wrong place."""
    for name, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType[name]
        assert (kind.id, kind.block, kind.layout.itemsize) == (theirs.value, *gguf.GGML_QUANT_SIZES[theirs])


@pytest.mark.parametrize("type", TYPES)
def test_numbers_are_those_of_gguf(type: str) -> None:
    """Would catch any slip in nibble order, sign, six-bit scales or rounding: equality is exact."""
    data = random_blocks(type)
    ours = ggml_blocks.dequantize(type, data)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, oracle(type, data))
    np.testing.assert_array_equal(ggml_blocks.dequantize(type, data[3:7]), ours[3:7])


@pytest.mark.parametrize("type", QUANTIZED)
def test_groups_are_the_same_numbers(type: str) -> None:
    """Would catch codes out of range, groups of the wrong length, and anything rounded on the way."""
    data = random_blocks(type, seed=1)
    groups = ggml_blocks.groups(type, data)
    assert groups.q.shape == (12, 512) and groups.q.dtype == np.uint8 and groups.q.max() == 2 ** BITS[type] - 1
    assert groups.bits == (4 if BITS[type] <= 4 else 8)
    assert groups.scale.shape == groups.low.shape == (12, 512 // groups.group)
    assert groups.scale.dtype == groups.low.dtype == np.float32
    each = np.repeat(groups.scale, groups.group, axis=1).astype(np.float64)
    low = np.repeat(groups.low, groups.group, axis=1).astype(np.float64)
    np.testing.assert_array_equal((groups.q * each + low).astype(np.float32), oracle(type, data))
    np.testing.assert_array_equal(groups.dequantize(), oracle(type, data))


@pytest.mark.parametrize("type", TYPES)
def test_any_bits_are_read_without_a_warning(type: str) -> None:
    """A damaged file of the right size may hold infinite scales; warnings are errors here."""
    data = random_blocks(type, seed=2, sane=False)
    ours, theirs = ggml_blocks.dequantize(type, data), oracle(type, data)
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[finite], theirs[finite])
    assert not np.isfinite(ours[~finite]).any()


def test_plain_numbers_have_no_groups() -> None:
    with pytest.raises(ValueError, match="F16 has no groups"):
        ggml_blocks.groups("F16", random_blocks("F16"))


def rows_of_all_kinds() -> NDArray[np.float32]:
    """Gaussian rows of many scales, and what quantizers trip over."""
    rng = np.random.default_rng(3)
    x = (rng.normal(0, 1, (2000, 64)) * 10.0 ** rng.uniform(-6, 3, (2000, 1))).astype(np.float32)
    x[0] = 0.0
    x[1] = -0.25  # no range
    x[2] = np.arange(64) - 31.5  # ties
    x[3] = np.abs(x[3])
    x[4, 1:] = 0.0
    x[5] = np.float32(1e-36) * rng.normal(0, 1, 64)
    x[6, ::2] = -x[6, 1::2]  # two of the largest magnitude
    return x


@pytest.mark.parametrize("type", WRITES)
def test_quantizers_are_those_of_gguf(type: str) -> None:
    """Would catch another rounding rule or another choice of the scale: bytes are equal."""
    x = rows_of_all_kinds()
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[type]).view(np.uint8).reshape(len(x), -1)
    np.testing.assert_array_equal(ggml_blocks.quantize(type, x), theirs)
    np.testing.assert_array_equal(ggml_blocks.quantize(type, x.astype(np.float64)), theirs)


@pytest.mark.parametrize("type", WRITES)
def test_numbers_too_small_for_a_scale_become_zero(type: str) -> None:
    """1 / d would be infinite; the reference casts that to an integer, which is undefined."""
    x = np.full((1, 32), 1e-40, np.float32)
    x[0, ::3] = -1e-41
    assert (np.abs(ggml_blocks.dequantize(type, ggml_blocks.quantize(type, x))) < 1e-39).all()


@pytest.mark.parametrize(
    ("type", "value", "message"),
    [
        ("Q8_0", np.nan, "not finite"),
        ("F32", np.inf, "not finite"),
        ("F16", 1e5, "too large for F16"),
        ("Q8_0", 1e8, "too large for Q8_0"),
        ("Q4_1", -1e5, "too large for Q4_1"),
        ("Q4_0", 1e6, "too large for Q4_0"),
    ],
)
def test_numbers_without_a_place_are_refused(type: str, value: float, message: str) -> None:
    """Would catch an infinite weight written without a word."""
    x = np.zeros((2, 32), np.float32)
    x[1, 3] = value
    with pytest.raises(UserError, match=message):
        ggml_blocks.quantize(type, x)


def test_rows_of_broken_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="40 is not a multiple of 32"):
        ggml_blocks.quantize("Q8_0", np.zeros((2, 40), np.float32))


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_1"])
def test_groups_pack_into_the_blocks_they_came_from(type: str) -> None:
    """Would catch a second quantization on the way out."""
    data = random_blocks(type, seed=4)
    np.testing.assert_array_equal(ggml_blocks.pack(ggml_blocks.groups(type, data), type), data)


def test_groups_that_several_types_hold_pack_into_the_one_asked_for() -> None:
    """A matrix of zeros, or some rows of one, must not change the type of the rest."""
    base = ggml_blocks.groups("Q4_0", random_blocks("Q4_0", seed=5))
    blocks = ggml_blocks.pack(base, "Q4_1")
    np.testing.assert_array_equal(ggml_blocks.dequantize("Q4_1", blocks), base.dequantize())
    with pytest.raises(ValueError, match="Q8_0 does not hold"):
        ggml_blocks.pack(base, "Q8_0")


def test_only_exact_groups_pack() -> None:
    """Would catch rounding a scale into fp16, or an offset that the type does not have."""

    def change(**fields: Any) -> Groups:
        made = {name: getattr(base, name) for name in ("bits", "group", "q", "scale", "low")}
        return Groups(**{**made, **fields})

    def exact(groups: Groups) -> list[str]:
        types = []
        for type in ("Q8_0", "Q4_0", "Q4_1"):
            with contextlib.suppress(ValueError):
                ggml_blocks.pack(groups, type)
                types.append(type)
        return types

    base = ggml_blocks.groups("Q4_0", random_blocks("Q4_0", seed=5))
    assert exact(base) == ["Q4_0", "Q4_1"]
    assert exact(change(low=base.low * 0.5)) == ["Q4_1"]
    assert exact(change(low=base.low * np.float32(1.0001))) == []
    assert exact(change(scale=base.scale * np.float32(1.0001))) == []
    assert exact(change(scale=base.scale * np.float32(1e9))) == []
    assert exact(change(bits=8, low=-16 * base.scale)) == []
    for type in ("Q6_K", "Q4_K", "Q5_0"):
        assert exact(ggml_blocks.groups(type, random_blocks(type))) == []
