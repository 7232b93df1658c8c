"""Linear, RMSNorm, rotary angles and the gated feed-forward layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.config import ModelConfig
from tfcli.model.kernels import rms_norm, swiglu

FEW_ROWS = 256
"""Rows up to which copying several weights together costs more than multiplying by them one by one."""


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
    """The outputs of several ``layers`` on one input, side by side in the last dimension.

    One product for all of them, except where a decoding step would copy the weights to multiply them by a few rows.
    """
    if not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]:
        return torch.cat([layer(x) for layer in layers], dim=-1)
    return F.linear(x, torch.cat([layer.weight for layer in layers]).to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return rms_norm(x, self.weight, self.eps)


def rope_table(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., K/2) in fp32 of every position times every frequency theta^(-2i/K) (Su et al. 2021, 3.2.2)."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.int64, device=positions.device).float() / head_width
    angle = positions[..., None].float() * (1.0 / theta**exponent)
    return angle.cos(), angle.sin()


class FeedForward(nn.Module):
    """SwiGLU: ``W_down (silu(W_gate x) * W_up x)`` (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.ffn_width)
        self.up = Linear(config.width, config.ffn_width)
        self.down = Linear(config.ffn_width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.down(swiglu(fused_linear(x_BTD, self.gate, self.up)))
        return out
