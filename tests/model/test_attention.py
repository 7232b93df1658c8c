"""Attention: the fast paths give what the paper's formula gives."""

import pytest
import torch
from torch import Tensor

from tfcli.model.attention import additive, attend, attend_reference, band_mask, causal_mask


def qkv(B: int = 2, H: int = 4, G: int = 2, T: int = 7, S: int = 7, K: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, K))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_the_explained_example() -> None:
    """Two tokens, four features, no scaling: weights and outputs worked out by hand.

    The first query has no product with either key: weights 1/2 and 1/2. The second has 1 with the first and 0 with the
    second key: e/(e + 1) = 0.7311 and 1/(e + 1) = 0.2689. (The explanation that this comes from says 0.6667 and
    0.3333: it takes e as 2.)
    """
    q = torch.tensor([[[[1.0, 0, 0, 0], [0, 1, 0, 0]]]])
    k = torch.tensor([[[[0.0, 1, 0, 0], [0, 0, 1, 0]]]])
    v = torch.tensor([[[[0.0, 0, 1, 0], [0, 0, 0, 1]]]])
    out, weights = attend_reference(q, k, v, mask=torch.ones(1, 1, 2, 2, dtype=torch.bool), scale=1.0)
    assert weights[0, 0].tolist() == [[0.5, 0.5], pytest.approx([0.7311, 0.2689], abs=1e-4)]
    expected = torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.7311, 0.2689]])
    torch.testing.assert_close(out[0, 0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(attend(q, k, v, causal=False, scale=1.0)[0, 0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (3, 1), (6, 3)])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (1, 9), (3, 9), (1, 1), (66, 66), (3, 66)])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_causal_equals_reference(H: int, G: int, T: int, S: int, grad: bool) -> None:
    """Would catch a wrong kernel choice, a mask aligned to the wrong end, or heads paired with the wrong group."""
    q, k, v = qkv(H=H, G=G, T=T, S=S)
    expected, _ = attend_reference(q, k, v, mask=causal_mask(T, S, q.device))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(attend(q, k, v), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("S", [8, 66])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_mask_and_scale_equal_reference(T: int, S: int, H: int, G: int, grad: bool) -> None:
    """Would catch a mask with its meaning inverted, or a scale that one path ignores."""
    q, k, v = qkv(H=H, G=G, T=T, S=S)
    mask = torch.rand(2, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True
    expected, _ = attend_reference(q, k, v, mask=mask, scale=0.3)
    with torch.set_grad_enabled(grad):
        for given in (mask, additive(mask, q.dtype)):
            torch.testing.assert_close(attend(q, k, v, mask=given, scale=0.3), expected, atol=1e-6, rtol=1e-5)


def test_windows() -> None:
    """The window of a decoder counts the query itself; an encoder's reaches half of it to each side."""
    decoder, encoder = (band_mask(5, 3, causal, torch.device("cpu"))[0, 0].int().tolist() for causal in (True, False))
    assert decoder == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert encoder == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_gradients_equal_reference() -> None:
    """Would catch a hand-written backward pass that differs from the formula's."""
    grads = []
    for function in (attend, lambda q, k, v: attend_reference(q, k, v, mask=causal_mask(7, 7, q.device))[0]):
        inputs = [tensor.requires_grad_() for tensor in qkv()]
        (function(*inputs) * torch.arange(8.0)).sum().backward()
        grads.append([tensor.grad for tensor in inputs])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_grouped_queries_are_repeated_heads() -> None:
    """Would catch query head h reading another group than h // (H / G)."""
    q, k, v = qkv(H=6, G=2)
    repeated = attend(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1))
    torch.testing.assert_close(attend(q, k, v), repeated, atol=1e-6, rtol=1e-5)


def test_weights_sum_to_one_and_see_no_future() -> None:
    """The weights that inspection shows are probabilities, zero where the mask is."""
    q, k, v = qkv()
    _, weights = attend_reference(q, k, v, mask=causal_mask(7, 7, q.device))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
    assert weights.triu(1).abs().max() == 0
