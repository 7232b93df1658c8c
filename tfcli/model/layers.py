"""Linear layers, norms, rotary positions and the feed-forward layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.config.model import ModelConfig, RopeScaling
from tfcli.model.fused import rms_norm, swiglu
from tfcli.native import ops

NO_SCALING = RopeScaling()


class Linear(nn.Module):
    """``y = x W^T + b`` in the dtype of ``x``, with master weights in fp32: mixed precision without autocast."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, fan_in: int, fan_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.register_parameter("bias", nn.Parameter(torch.empty(fan_out)) if bias else None)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Linear:
        """Make a layer of a weight (fan_out, fan_in), a parameter as it is, and a bias."""
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0])
        layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        layer.bias = None if bias is None else nn.Parameter(bias)
        return layer

    def describe(self) -> ops.MatrixStruct:
        """Return where the matrix lies and how."""
        return ops.MatrixStruct.plain(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) -> (..., fan_out) in the dtype of ``x``."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def fusible(*layers: nn.Module) -> bool:
    """Return whether to compute these layers as one product: in training, where all are plain.

    Inference would copy their weights for it.
    """
    return torch.is_grad_enabled() and all(type(layer) is Linear for layer in layers)


def fused_linear(x: Tensor, *layers: Linear) -> Tensor:
    """Return the outputs of several ``layers`` for one input, side by side in the last dimension, by one product."""
    weight = torch.cat([layer.weight for layer in layers]).to(x.dtype)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return F.linear(x, weight, torch.cat(biases).to(x.dtype) if biases else None)


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) w + b`` over the last dimension (Ba et al. 2016, eq. 4)."""

    bias: Tensor | None

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.register_parameter("bias", nn.Parameter(torch.empty(width)) if bias else None)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


def make_norm(config: ModelConfig, width: int) -> RMSNorm | LayerNorm:
    """Make the norm of the architecture."""
    if config.architecture.norms.kind == "layer":
        return LayerNorm(width, config.norm_eps, config.architecture.norms.bias)
    return RMSNorm(width, config.norm_eps)


def rope_frequencies(
    head_width: int, theta: float, scaling: RopeScaling = NO_SCALING, device: torch.device | None = None
) -> Tensor:
    """Return the K/2 rotary frequencies theta^(-2i/K), radians per position (Su et al. 2021, 3.2.2), scaled.

    linear divides all by the factor (Chen et al. 2023); llama3 divides those of long wavelength, keeps those of short
    and blends between (Llama 3.1's published code); yarn does so by the number of turns in the original context (Peng
    et al. 2023, 3.2).
    """
    exponent = torch.arange(0, head_width, 2, dtype=torch.int64, device=device).float() / head_width
    kept = 1.0 / theta**exponent
    if scaling.kind == "none":
        return kept
    divided = kept / scaling.factor
    if scaling.kind == "linear":
        return divided
    if scaling.kind == "llama3":
        turns = scaling.original_context * kept / (2 * math.pi)  # context / wavelength
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = ((turns - low) / (high - low)).clamp(0, 1)
    else:

        def dimension(turns: float) -> float:  # the one that turns so often in the original context
            return head_width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(dimension(scaling.beta_fast)), 0)
        last = min(math.ceil(dimension(scaling.beta_slow)), head_width - 1)
        index = torch.arange(head_width // 2, device=device)
        share = 1 - ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    return share * kept + (1 - share) * divided


def rope_table(
    positions: Tensor, head_width: int, theta: float, scaling: RopeScaling = NO_SCALING
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (..., K/2) in fp32 of every position times every frequency."""
    angle = positions[..., None].float() * rope_frequencies(head_width, theta, scaling, positions.device)
    cos, sin = angle.cos(), angle.sin()
    if scaling.kind == "yarn":
        return cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


class FeedForward(nn.Module):
    """``W_down (act(W_gate x) * W_up x)`` (Shazeer 2020) or ``W_down act(W_up x)`` (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F, bias = config.width, config.ffn_width, config.architecture.feed_forward.bias
        self.activation = config.architecture.feed_forward.activation
        self.gated = config.architecture.feed_forward.gated
        if self.gated:
            self.gate = Linear(D, F, bias)
        self.up = Linear(D, F, bias)
        self.down = Linear(F, D, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.gated and self.activation == "silu" and fusible(self.gate, self.up):
            inner = swiglu(fused_linear(x_BTD, self.gate, self.up))
        else:
            inner = gated(self.gate(x_BTD) if self.gated else None, self.up(x_BTD), self.activation)
        return self.down(inner)


def gated(gate: Tensor | None, up: Tensor, activation: str) -> Tensor:
    """Return ``act(gate) * up``, or ``act(up)`` without a gate."""
    if ops.serves(up) and (gate is not None or activation in ("silu", "gelu_tanh")):
        return ops.activate(gate, up, activation)
    return activate(up, activation) if gate is None else activate(gate, activation) * up


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply silu (Elfwing et al. 2018), gelu (Hendrycks and Gimpel 2016), its tanh approximation, or relu."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
