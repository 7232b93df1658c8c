"""Multi-head attention with grouped keys and values, QK-norm and rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.config import ModelConfig
from tfcli.model.cache import KVCache
from tfcli.model.kernels import causal_attention, norm_rope
from tfcli.model.layers import Linear, RMSNorm, fused_linear


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, 3.2), grouped (Ainslie et al. 2023), QK-norm (Henry et al. 2020)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.q = Linear(config.width, config.heads * config.head_width)
        self.k = Linear(config.width, config.kv_heads * config.head_width)
        self.v = Linear(config.width, config.kv_heads * config.head_width)
        self.o = Linear(config.heads * config.head_width, config.width)
        self.q_norm = RMSNorm(config.head_width, config.norm_eps)
        self.k_norm = RMSNorm(config.head_width, config.norm_eps)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D). ``mask`` (B or 1, 1, T, S) is True where attended; None is causal."""
        B, T, _ = x_BTD.shape
        H, G, K = self.heads, self.kv_heads, self.head_width
        qkv = fused_linear(x_BTD, self.q, self.k, self.v).view(B, T, H + 2 * G, K)
        qk, v_BTGK = qkv.split([H + G, G], dim=2)
        # Queries and keys are normalised and rotated alike: once over both.
        scale = torch.cat([self.q_norm.weight.expand(H, K), self.k_norm.weight.expand(G, K)])
        qk = norm_rope(qk, scale, *rope, self.q_norm.eps)
        q_BHTK, k_BGTK = (x.transpose(1, 2) for x in qk.split([H, G], dim=2))
        v_BGTK = v_BTGK.transpose(1, 2)
        if cache is not None:
            k_BGTK, v_BGTK = cache.append(self.layer, k_BGTK, v_BGTK)
        out_BHTK = attend(q_BHTK, k_BGTK, v_BGTK, mask=mask)
        out: Tensor = self.o(out_BHTK.transpose(1, 2).reshape(B, T, H * K))
        return out


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """``softmax(q k^T scale + mask) v`` (Vaswani et al. 2017, eq. 1) -> (B, H, T, K), by the fastest kernel.

    ``mask`` (broadcast to B, 1, T, S) is True where attended. Without one, ``causal`` lets query t see the keys up to
    S - T + t. ``scale`` defaults to K^-1/2.
    """
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1], k_BGSK.shape[2]
    if T == 1 and mask is None:
        # One query sees all keys. Folding a group's query heads into the query axis keeps the fused kernel on its
        # fast path, which torch's enable_gqa leaves on CPU.
        q_BGnK = q_BHTK.reshape(B, G, H // G, K)
        return F.scaled_dot_product_attention(q_BGnK, k_BGSK, v_BGSK, scale=scale).reshape(B, H, 1, K)
    if G != H:
        k_BGSK = k_BGSK.repeat_interleave(H // G, dim=1)
        v_BGSK = v_BGSK.repeat_interleave(H // G, dim=1)
    if torch.is_grad_enabled() and _short(q_BHTK) and mask is None and causal and S == T:
        return causal_attention(q_BHTK, k_BGSK, v_BGSK, K**-0.5 if scale is None else scale)
    if mask is None and causal and S != T:
        mask = causal_mask(T, S, q_BHTK.device)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=causal and mask is None, scale=scale
    )


def _short(q_BHTK: Tensor) -> bool:
    """Whether batched products beat the fused kernel in training: on CPU, while the T x T weights are small."""
    return q_BHTK.device.type == "cpu" and q_BHTK.shape[2] <= 512 and not torch.compiler.is_compiling()


def attend_reference(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention written out as the paper has it: returns outputs (B, H, T, K) and weights (B, H, T, S).

    The twin of ``attend``, and what shows the weights.
    """
    H, K = q_BHTK.shape[1], q_BHTK.shape[3]
    k_BHSK = k_BGSK.repeat_interleave(H // k_BGSK.shape[1], dim=1)
    v_BHSK = v_BGSK.repeat_interleave(H // v_BGSK.shape[1], dim=1)
    scores = (q_BHTK @ k_BHSK.transpose(-1, -2)) * (K**-0.5 if scale is None else scale)
    weights_BHTS = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights_BHTS @ v_BHSK, weights_BHTS


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(1, 1, T, S), True where query t, the (S - T + t)th position, may look."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
