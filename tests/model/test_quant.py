"""Quantized matrices: what the codes stand for, how near they are, and every way to multiply by them."""

import pytest
import torch

from tfcli.model.quant import matrix as quant
from tfcli.model.quant import quantize
from tfcli.native import ops

WIDTHS = [32, 40, 64, 100, 576]


def weight(columns: int, rows: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", WIDTHS)
def test_widening_equals_the_formula(bits: quant.Bits, columns: int) -> None:
    """The kernel dequantizes codes as its twin does, row by row too."""
    matrix = quant.quantize(weight(columns), bits)
    expected = matrix.dequantized_reference()
    assert expected.shape == (48, columns)
    assert ops.ready(), ops.unavailable()
    torch.testing.assert_close(matrix.dequantized(torch.float32), expected, atol=1e-7, rtol=1e-6)
    assert torch.equal(matrix.dequantized(torch.bfloat16), matrix.dequantized(torch.float32).to(torch.bfloat16))
    some = torch.tensor([47, 0, 3, 3])
    assert torch.equal(matrix.dequantized(torch.float32, some), matrix.dequantized(torch.float32)[some])
    ids = torch.tensor([[1, 2], [40, 0]])
    assert torch.equal(quant.QuantEmbedding(matrix)(ids), matrix.dequantized(torch.float32)[ids])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
def test_products_equal_those_of_the_numbers(bits: quant.Bits, columns: int, rows: int) -> None:
    """Few rows go to the kernel, many to the dequantized matrix: fp32 to 1e-5, bf16 as near as bf16 numbers allow."""
    matrix = quant.quantize(weight(columns), bits, bias=torch.arange(48.0))
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    expected = x @ matrix.dequantized_reference().T + torch.arange(48.0)
    torch.testing.assert_close(matrix(x), expected, atol=1e-5, rtol=1e-5)
    assert matrix(x[None]).shape == (1, rows, 48)
    rounded = matrix(x.to(torch.bfloat16)).float()
    torch.testing.assert_close(rounded, expected, atol=0.02, rtol=0.01)  # 2^-8 of a sum of some tens


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("rows", [48, 33])
@pytest.mark.parametrize("columns", WIDTHS)
def test_pytorch_s_own_kernel_gives_the_same(
    bits: quant.Bits, low: bool, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler: as near as scale and zero in bf16 are; no matrix is dequantized for it."""
    monkeypatch.setattr(ops, "ready", lambda: False)
    matrix = quant.quantize(weight(columns, rows), bits, bias=torch.arange(float(rows)))
    if low:
        codes, scale, _ = matrix.grouped()
        least = -scale * 2 ** (bits - 1) + 0.002
        bias = matrix.bias
        matrix = quant.from_codes(codes.flatten(1), scale, least, bits=bits, columns=columns, bias=bias)
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    expected = x.float() @ matrix.dequantized_reference().T + torch.arange(float(rows))
    monkeypatch.setattr(matrix, "dequantized_reference", lambda index=None: pytest.fail("dequantized for two rows"))
    torch.testing.assert_close(matrix(x).float(), expected, atol=0.03, rtol=0.01)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each 32 numbers of a row to whole multiples of their greatest magnitude / 127, in fp32."""
    grouped = x.float().unflatten(-1, (-1, 32))
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    return ((grouped / scale.clamp_min(1e-30)).round() * scale).flatten(-2)


@pytest.mark.skipif(not ops.int8(torch.bfloat16), reason="a processor that multiplies 8 by 8 bits")
@pytest.mark.parametrize("columns", [32, 64, 576])
@pytest.mark.parametrize("outputs", [1, 31, 48, 96])
@pytest.mark.parametrize("rows", [1, 5, 6, 13])
def test_products_of_bytes_equal_those_of_the_rounded_numbers(columns: int, outputs: int, rows: int) -> None:
    """The input rounded by hand times the numbers that the codes stand for; 2^-8 is what bf16 rounds a result by."""
    bias = torch.linspace(-1, 1, outputs)
    matrix = quant.quantize(weight(columns, outputs), 8, bias=bias)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    x[0] = 0
    matrix.int8_activations = True
    y = matrix(x)
    assert y.dtype == torch.bfloat16
    expected = rounded(x) @ matrix.dequantized_reference().T + bias
    torch.testing.assert_close(y.float(), expected, atol=2e-3, rtol=2**-8)
    torch.testing.assert_close(y[0].float(), bias.to(torch.bfloat16).float(), atol=0, rtol=0)
    assert torch.equal(matrix(x[None].expand(2, -1, -1))[1], y)  # a row is the same beside others
    assert torch.equal(matrix(x[rows - 1 :]), y[rows - 1 :])
    x[-1, 3] = float("nan")
    assert matrix(x)[-1].isnan().all()


def test_rounding_the_input_is_for_bf16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix with int8 activations is like any other in fp32, and on processors without 8-bit products."""
    matrix = quant.quantize(weight(64), 8)
    matrix.int8_activations = True
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(matrix(x), x @ matrix.dequantized_reference().T, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(ops, "int8", lambda dtype: False)
    monkeypatch.setattr(ops, "linear_int8", lambda *_: pytest.fail("called"))
    expected = x.to(torch.bfloat16).float() @ matrix.dequantized_reference().T
    torch.testing.assert_close(matrix(x.to(torch.bfloat16)).float(), expected, atol=0.02, rtol=0.01)


def test_eight_bits_is_ggml_s_q8_0() -> None:
    """The numbers of the gguf package's quantizer, which llama.cpp shares."""
    gguf = pytest.importorskip("gguf")
    given = weight(96)
    blocks = gguf.quants.quantize(given.numpy(), gguf.GGMLQuantizationType.Q8_0)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    ours = quant.quantize(given, 8).dequantized_reference()
    step = given.view(48, 3, 32).abs().amax(-1) / 127
    assert ((ours - theirs).view(48, 3, 32).abs().amax(-1) <= 1.01 * step).all()  # ties in a code or two
    assert (ours == theirs).float().mean() > 0.99


def test_four_bits_are_nearer_than_ggml_s_q4_1() -> None:
    """The grid is searched, not only spanned from least to most: less squared error in all, never much more in one."""
    gguf = pytest.importorskip("gguf")
    given = weight(1024, seed=4)
    given[:, ::97] *= 6  # outliers
    blocks = gguf.quants.quantize(given.numpy(), gguf.GGMLQuantizationType.Q4_1)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    ours = quant.quantize(given, 4).dequantized_reference()
    error, before = (given - ours).square().sum(), (given - theirs).square().sum()
    assert error < 0.93 * before


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-8, 1e4])
@pytest.mark.parametrize("bits", [4, 8])
def test_constant_groups(value: float, bits: quant.Bits) -> None:
    """Would catch a division by a span of zero."""
    ours = quant.quantize(torch.full((4, 64), value), bits).dequantized_reference()
    torch.testing.assert_close(ours, torch.full((4, 64), value), atol=1e-7, rtol=2e-3)  # fp16 has 11 bits


def test_what_is_on_the_grid_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that were 4 bits once are found again: quantizing a dequantized model loses nothing."""
    once = quant.quantize(weight(128), 4).dequantized_reference()
    again = quant.quantize(once, 4).dequantized_reference()
    assert (again - once).abs().max() < 2e-3 * once.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("centred", [True, False])
def test_codes_come_back_as_they_were(bits: quant.Bits, centred: bool) -> None:
    """Every code, scale and low of a file is kept unchanged, whole or in parts."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << bits, (70, 96), generator=generator, dtype=torch.uint8)
    scale = torch.rand(70, 3, generator=generator).half()
    low = None if centred else torch.rand(70, 3, generator=generator).half()
    whole = quant.from_codes(codes, scale, low, bits=bits, columns=96)
    parts = [
        quant.from_codes(codes[some], scale[some], None if low is None else low[some], bits=bits, columns=96)
        for some in (slice(0, 32), slice(32, 64), slice(64, 70))
    ]
    index = torch.tensor([69, 0, 33])
    for matrix in (whole, quantize.stacked(parts, rows=70)):
        assert (matrix.rows, matrix.columns) == (70, 96)
        for some, expected in ((None, slice(None)), (index, index)):
            got = matrix.grouped(some)
            assert torch.equal(got[0].flatten(1), codes[expected])
            assert torch.equal(got[1], scale[expected])
            assert (got[2] is None) if low is None else torch.equal(got[2], low[expected])  # type: ignore[arg-type]


def test_bytes() -> None:
    """A quarter and a half of bf16 and a little: 5 bits and 8.5 bits a number."""
    assert quantize.weight_bytes(quant.quantize(weight(640, rows=64), 4)) * 8 == 64 * 640 * 5
    assert quantize.weight_bytes(quant.quantize(weight(640, rows=64), 8)) * 8 == 64 * 640 * 8.5
