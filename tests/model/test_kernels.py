"""The CPU kernels with gradients by hand against their formulas."""

import pytest
import torch
from torch import Tensor

from tfcli.model.kernels import (
    norm_rope,
    norm_rope_reference,
    rms_norm,
    rms_norm_reference,
    rotate,
    rotate_reference,
    swiglu,
    swiglu_reference,
)
from tfcli.model.layers import rope_table

CASES = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6)),
    "norm_rope": (lambda x, w: norm_rope(x, w, *table(), 1e-6), lambda x, w: norm_rope_reference(x, w, *table(), 1e-6)),
    "rotate": (lambda x, w: rotate(x * w, *table()), lambda x, w: rotate_reference(x * w, *table())),
    "swiglu": (lambda x, w: swiglu(x * w), lambda x, w: swiglu_reference(x * w)),
}


def table() -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(torch.arange(5), 8, 10_000.0)
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_formula_with_gradients(name: str) -> None:
    """Would catch a wrong term in a backward pass, which trains, but worse."""
    results = []
    for function in CASES[name]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 5, 3, 8, generator=generator).requires_grad_()
        w = torch.randn(3, 8, generator=generator).requires_grad_()
        y = function(x, w)
        (y * torch.randn(y.shape, generator=generator)).sum().backward()
        results.append((y.detach(), x.grad, w.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_kernel_in_bf16_stays_near_fp32(name: str) -> None:
    """Would catch sums kept in bf16: the error may be a few units of bf16's 2^-8, not more."""
    fast = CASES[name][0]
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    w = torch.ones(3, 8)
    torch.testing.assert_close(fast(x.bfloat16(), w).float(), fast(x, w), atol=0.06, rtol=0.03)


def test_rotation_keeps_length_and_depends_on_distance() -> None:
    """Su et al. 2021, 3.2: a product of rotated vectors is a function of the distance of their positions."""
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_table(torch.arange(12), 8, 10_000.0)
    ones = torch.ones(1, 8)
    rows = norm_rope(x.expand(1, 12, 1, 8).contiguous(), ones, cos.unsqueeze(-2), sin.unsqueeze(-2), 1e-6)[0, :, 0]
    products = rows @ rows.T
    for distance in range(5):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert products[0, 0] - products[0, 4] > 0.1
