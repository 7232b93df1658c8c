"""Linear, RMSNorm, rotary positions and the gated feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.config import ModelConfig


class Linear(nn.Module):
    """``y = x W^T`` without bias; the stored weight may be wider than the activations.

    Master weights stay in fp32 and the product runs in the dtype of ``x``: mixed precision without autocast.
    """

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) -> (..., fan_out) in the dtype of ``x``."""
        return F.linear(x, self.weight.to(x.dtype))


def fused_linear(x: Tensor, *layers: Linear) -> Tensor:
    """The outputs of several ``layers`` on one input, side by side in the last dimension: one product for all."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]).to(x.dtype))


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in few passes over memory; on CPU torch's own composes it from six elementwise kernels.

    y = x r w with r = (mean(x^2) + eps)^-1/2, hence with g = dy w:  dx = r g - x r^3 mean(g x),  dw = sum(dy x r).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        g_unit = grad * unit
        dims = tuple(range(x.dim() - weight.dim()))
        d_weight = g_unit.sum(dims, dtype=torch.float32)
        mean = (g_unit.mul_(weight.to(x.dtype))).mean(-1, keepdim=True, dtype=torch.float32).to(x.dtype)
        dx = (grad * weight.to(x.dtype)).addcmul_(unit, mean, value=-1).mul_(scale)
        return dx, d_weight, None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of ``x`` (..., width); ``weight`` has the last one or two dimensions of ``x``."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula as the paper writes it, in fp32: the twin that the fast path is tested against."""
    x32 = x.float()
    return (x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


def rope_table(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., K/2) in fp32 of every position times every frequency theta^(-2i/K) (Su et al. 2021, 3.2.2)."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.int64, device=positions.device).float() / head_width
    angle = positions[..., None].float() * (1.0 / theta**exponent)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) by the angle given."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)
    return out


class _Rope(torch.autograd.Function):
    """A rotation; its transpose, which the gradient needs, is the rotation the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def apply_rope(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys; ``cos`` and ``sin`` broadcast to (B, T, H, K/2)."""
    if x_BTHK.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Rope.apply(x_BTHK, cos, sin)  # type: ignore[no-any-return, no-untyped-call]
    return apply_rope_reference(x_BTHK, cos, sin)


def apply_rope_reference(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation written with concatenation, as torch.compile fuses it best: the twin of the fast path."""
    a, b = x_BTHK.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class FeedForward(nn.Module):
    """SwiGLU: ``W_down (silu(W_gate x) * W_up x)`` (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.ffn_width)
        self.up = Linear(config.width, config.ffn_width)
        self.down = Linear(config.ffn_width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate_BTF, up_BTF = fused_linear(x_BTD, self.gate, self.up).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate_BTF) * up_BTF)
        return out
