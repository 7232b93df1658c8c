"""The CPU kernels with gradients by hand against their formulas."""

import pytest
import torch
from torch import Tensor

from tfcli.model.attention import attend_reference
from tfcli.model.fused import (
    add_dropout,
    dropout,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    norm_rope,
    norm_rope_reference,
    rms_norm,
    rms_norm_reference,
    rotate,
    rotate_reference,
    short_attention,
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


@pytest.mark.parametrize(("seen", "S"), [("all", 7), ("causal", 5), ("row", 7), ("query", 5)])
def test_short_attention_equals_formula_with_gradients(seen: str, S: int) -> None:
    """Would catch a mask that goes to the wrong head or row, and a wrong term in the backward pass."""
    B, H, T, K = 3, 2, 5, 8
    allowed = {
        "all": torch.ones(1, 1, 1, S, dtype=torch.bool),
        "causal": torch.ones(T, S, dtype=torch.bool).tril()[None, None],
        "row": (torch.arange(S) < torch.tensor([7, 2, 4])[:, None])[:, None, None],
        "query": torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(3)) < 0.5,
    }[seen]
    if seen == "query":
        allowed = allowed | torch.eye(T, dtype=torch.bool)
    added = torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))
    mask = None if seen in ("all", "causal") else added
    results = []
    for fast in (True, False):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, H, n, K, generator=generator).requires_grad_() for n in (T, S, S))
        if fast:
            out = short_attention(q, k, v, 0.3, mask=mask, causal=seen == "causal")
        else:
            out, _ = attend_reference(q, k, v, mask=allowed, scale=0.3)
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_cross_entropy_equals_formula_with_gradients(smoothing: float, biased: bool) -> None:
    """Would catch a smoothed loss without its gradient, or a gradient without its loss."""
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 8, generator=generator).requires_grad_()
        w = torch.randn(11, 8, generator=generator).requires_grad_()
        b = torch.randn(11, generator=generator).requires_grad_() if biased else None
        loss = function(x, w, torch.tensor([0, 10, 3, 3, 7, 1]), b, smoothing=smoothing)
        (loss / 6).backward()
        results.append((loss.detach(), x.grad, w.grad, *([] if b is None else [b.grad])))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_dropout_zeroes_its_part_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    """Would catch a threshold off by its sign, four numbers that fall together, and a gradient through other ones."""
    torch.manual_seed(0)
    x = torch.ones(99_999, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    gone = y == 0
    assert abs(float(gone.float().mean()) - p) < 4 * (p * (1 - p) / 99_999) ** 0.5  # four standard deviations
    together = gone[:-3].float() * gone[3:].float()
    assert abs(float(together.mean()) - p * p) < 4 * (p * p / 99_999) ** 0.5
    torch.testing.assert_close(y[~gone], torch.full_like(y[~gone], 1 / (1 - p)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())
    torch.manual_seed(0)
    torch.testing.assert_close(add_dropout(2 * x, x, p), 2 + y)
    assert dropout(x, 0.0) is x
    assert (dropout(x, 1 - 1e-6) == 0).float().mean() > 0.999, "a threshold that wraps around keeps all"
