"""A model whose weights have moved: the same numbers, the same products, no row beside another."""

import mmap

import pytest
import torch
from tiny_models import model

from tfcli.infer.residency import pack_weights
from tfcli.infer.step import Stepper
from tfcli.model.quant import matrix as quant
from tfcli.model.quant import quantize
from tfcli.native import ops

BF16 = torch.bfloat16
BIG = {"width": 96, "heads": 6, "head_width": 16, "ffn_width": 160, "depth": 2, "vocab_size": 50_003}
"""More than the four large pages from which weights move."""


def packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> quant.PackedMatrix:
    """A bf16 matrix in tiles."""
    rows, columns = weight.shape
    tiles = torch.full((-(-rows // 32), -(-columns // 32) * 16, 32, 2), float("nan"), dtype=BF16)
    ops.tile(weight, tiles)
    return quant.PackedMatrix(tiles, rows=rows, columns=columns, bias=bias)


@pytest.fixture(autouse=True)
def bf16_products() -> None:
    if not ops.fast(BF16):
        pytest.skip("this processor does not multiply bf16")


@pytest.mark.parametrize("columns", [32, 40, 65, 576])
@pytest.mark.parametrize("rows", [1, 31, 64, 100])
def test_tiles_hold_the_numbers_and_multiply_by_them(rows: int, columns: int) -> None:
    """Padding, odd widths, every number of input rows; a row's product is the same bits whatever is beside it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(BF16)
    bias = torch.randn(rows, generator=generator).to(BF16)
    matrix = packed(weight, bias)
    assert torch.equal(matrix.dequantized(BF16), weight)
    assert torch.equal(matrix.dequantized(torch.float16), weight.half())  # the way without the compiled library
    index = torch.tensor([rows - 1, 0])
    assert torch.equal(matrix.dequantized(torch.float32, index), weight[index].float())
    assert torch.equal(quant.QuantEmbedding(matrix)(index[None]), weight[index].float()[None])
    for count in (1, 2, 3, 7, 8, 9, 21, 70):
        x = torch.randn(count, columns, generator=generator).to(BF16)
        expected = x.float() @ weight.float().T + bias.float()
        torch.testing.assert_close(matrix(x).float(), expected, atol=0.02, rtol=0.01)  # one rounding to bf16
        torch.testing.assert_close(matrix(x.float()), expected, atol=1e-4, rtol=1e-5)
        assert torch.equal(matrix(x)[-1:], matrix(x[-1:]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("large", [True, False])
@torch.inference_mode()
def test_a_packed_model_is_the_same_model(tied: bool, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers with and without large pages, tied or not; dequantized, the very model that it was."""
    if not large:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    core = model(**BIG, tied=tied).requires_grad_(False).to(BF16)
    before = {name: value.clone() for name, value in core.state_dict().items()}
    ids = torch.tensor([[5, 6, 7, 8, 49_999]])
    expected = core.logits(core(ids)).float()
    pack_weights(core)
    got = core.logits(core(ids)).float()
    assert float((got - expected).abs().max() / expected.abs().max()) < 0.02
    assert isinstance(core.head, quant.PackedMatrix)
    assert (getattr(core.embed, "matrix", None) is core.head) == tied
    after = quantize.dequantize_model(core, BF16).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@torch.inference_mode()
def test_fp32_weights_move_and_stay_plain() -> None:
    """Only bf16 products want tiles; would catch a parameter that lost its place or a tie."""
    core = model(**BIG).requires_grad_(False)
    ids = torch.tensor([[5, 6, 7]])
    expected, norm = core.logits(core(ids)), core.norm.weight
    pack_weights(core)
    assert torch.equal(core.logits(core(ids)), expected)
    assert core.norm.weight is norm
    assert core.head.weight is core.embed.weight
    Stepper(core, exact=True)


def test_a_second_time_nothing_moves() -> None:
    """Would catch weights taken away from under a ``Stepper`` that knows where they lie."""
    for dtype in (torch.float32, BF16):
        core = model(**BIG).requires_grad_(False).to(dtype)
        pack_weights(core)
        before = [tensor.data_ptr() for tensor in (*core.parameters(), *core.buffers())]
        pack_weights(core)
        assert [tensor.data_ptr() for tensor in (*core.parameters(), *core.buffers())] == before
