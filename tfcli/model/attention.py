"""Multi-head attention with grouped keys and values, QK-norm, rotary positions and local windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.config.model import ModelConfig
from tfcli.model.cache import KVCache
from tfcli.model.fused import norm_rope, rotate, short_attention
from tfcli.model.layers import Linear, RMSNorm, fused_linear, fusible
from tfcli.native import ops

Rope = tuple[Tensor, Tensor]


class _Projections(nn.Module):
    """The four matrices of attention with grouped heads (Vaswani et al. 2017, 3.2; Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        attention, D, K = config.architecture.attention, config.width, config.head_width
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, K
        self.scale = attention.scale
        self.q = Linear(D, config.heads * K, attention.qkv_bias)
        self.k = Linear(D, config.kv_heads * K, attention.qkv_bias)
        self.v = Linear(D, config.kv_heads * K, attention.qkv_bias)
        self.o = Linear(config.heads * K, D, attention.out_bias)


class Attention(_Projections):
    """Self-attention with QK-norm (Henry et al. 2020), rotary positions and local windows."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        arch, K = config.architecture, config.head_width
        self.layer, self.causal = layer, arch.causal
        self.window = arch.windows.size if config.is_local(layer) else 0
        self.qk_norm = arch.attention.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(K, config.norm_eps)
            self.k_norm = RMSNorm(K, config.norm_eps)

    def forward(self, x_BTD: Tensor, rope: Rope | None, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D). ``mask`` (B or 1, 1, T or 1, S) is as in ``attend``."""
        B, T, _ = x_BTD.shape
        q_BTHK, k_BTGK, v_BTGK = self._project(x_BTD, rope)
        q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        if cache is not None:
            k_BGTK, v_BGTK = cache.append(self.layer, k_BGTK, v_BGTK)
            if self.window and T == 1 and mask is None:  # one query needs no mask
                k_BGTK, v_BGTK = k_BGTK[:, :, -self.window :], v_BGTK[:, :, -self.window :]
        out_BHTK = attend(q_BHTK, k_BGTK, v_BGTK, mask=mask, causal=self.causal, scale=self.scale)
        return self.o(out_BHTK.transpose(1, 2).reshape(B, T, self.heads * self.head_width))

    def _project(self, x_BTD: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries (B, T, H, K), keys and values (B, T, G, K), normalized and rotated."""
        B, T, _ = x_BTD.shape
        H, G, K = self.heads, self.kv_heads, self.head_width
        if fusible(self.q, self.k, self.v):
            qkv = fused_linear(x_BTD, self.q, self.k, self.v).view(B, T, H + 2 * G, K)
            if self.qk_norm and rope is not None:
                # Queries and keys are normalized and rotated alike: in one pass over both.
                qk, v = qkv.split([H + G, G], dim=2)
                scale = torch.cat([self.q_norm.weight.expand(H, K), self.k_norm.weight.expand(G, K)])
                q, k = norm_rope(qk, scale, *rope, self.q_norm.eps).split([H, G], dim=2)
                return q, k, v
            q, k, v = qkv.split([H, G, G], dim=2)
        else:
            q, k, v = (layer(x_BTD).view(B, T, -1, K) for layer in (self.q, self.k, self.v))
        if self.qk_norm and rope is not None:
            q = norm_rope(q, self.q_norm.weight.expand(H, K), *rope, self.q_norm.eps)
            k = norm_rope(k, self.k_norm.weight.expand(G, K), *rope, self.k_norm.eps)
        elif self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        elif rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v


class CrossAttention(_Projections):
    """Attention of a decoder to an encoder's output (Vaswani et al. 2017, 3.2.3): no positions, no causality."""

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, G, S, K) of an encoder's output (B, S, D)."""
        B, S, _ = x_BSD.shape
        k, v = (layer(x_BSD).view(B, S, self.kv_heads, self.head_width) for layer in (self.k, self.v))
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x_BTD: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D). B may be n times the rows of keys and values: each serves n consecutive rows.

        Queries have no order here, so that n rows (the beams of a sentence) become one with n T queries.
        """
        B, T, _ = x_BTD.shape
        rows = k_BGSK.shape[0]
        q_BHTK = self.q(x_BTD).view(rows, B // rows * T, self.heads, self.head_width).transpose(1, 2)
        out_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, mask=mask, causal=False, scale=self.scale)
        return self.o(out_BHTK.transpose(1, 2).reshape(B, T, self.heads * self.head_width))


def attend(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, mask: Tensor | None = None, causal: bool = True,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Compute ``softmax(q k^T scale + mask) v`` (Vaswani et al. 2017, eq. 1) -> (B, H, T, K) by the fastest kernel.

    ``mask`` (broadcast to B, 1, T, S) is added to the scores, or, where boolean, True where attended (``additive``
    converts it, once for all layers). Without a mask, ``causal`` lets query t see the keys up to S - T + t. ``scale``
    defaults to K^-1/2.
    """
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1], k_BGSK.shape[2]
    if T == 1:
        # One query sees all keys of its row. Folding a group's query heads into the query axis keeps the fused kernel
        # on its fast path, which torch's enable_gqa leaves on CPU.
        q_BGnK = q_BHTK.reshape(B, G, H // G, K)
        out = F.scaled_dot_product_attention(q_BGnK, k_BGSK, v_BGSK, attn_mask=mask, scale=scale)
        return out.reshape(B, H, 1, K)
    causal = causal and mask is None
    if ops.attends(q_BHTK, k_BGSK, mask, causal=causal):
        scale = K**-0.5 if scale is None else scale
        return ops.attend(q_BHTK, k_BGSK, v_BGSK, scale=scale, causal=causal, mask=mask)
    if G != H:
        k_BGSK = k_BGSK.repeat_interleave(H // G, dim=1)
        v_BGSK = v_BGSK.repeat_interleave(H // G, dim=1)
    if _short(q_BHTK, S, causal) and (S == T or not causal):
        if mask is not None and mask.dtype is torch.bool:
            mask = additive(mask, q_BHTK.dtype)
        scale = K**-0.5 if scale is None else scale
        return short_attention(q_BHTK, k_BGSK, v_BGSK, scale, mask=mask, causal=causal)
    if mask is None and causal and S != T:
        mask = additive(causal_mask(T, S, q_BHTK.device), q_BHTK.dtype)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=causal and mask is None, scale=scale
    )


def _short(q_BHTK: Tensor, S: int, causal: bool) -> bool:
    """Return whether batched products beat the fused kernel: on CPU, while the T x S weights are small.

    In training always in bf16 (a tenth of its time at T = 16), in fp32 where the kernel would compute what causality
    hides. Without gradients only in fp32 with several rows (half of its time at T = 16, the same at 96).
    """
    if q_BHTK.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    longest = max(q_BHTK.shape[2], S)
    if not torch.is_grad_enabled():
        return longest <= 64 and len(q_BHTK) > 1 and q_BHTK.dtype == torch.float32
    return longest <= 512 and (causal or q_BHTK.dtype == torch.bfloat16)


def attend_reference(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention by the paper's formula, the twin of ``attend``: outputs (B, H, T, K), weights (B, H, T, S)."""
    H, K = q_BHTK.shape[1], q_BHTK.shape[3]
    k_BHSK = k_BGSK.repeat_interleave(H // k_BGSK.shape[1], dim=1)
    v_BHSK = v_BGSK.repeat_interleave(H // v_BGSK.shape[1], dim=1)
    scores = (q_BHTK @ k_BHSK.transpose(-1, -2)) * (K**-0.5 if scale is None else scale)
    weights_BHTS = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights_BHTS @ v_BHSK, weights_BHTS


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """Return a mask (1, 1, T, S), True where query t, the (S - T + t)th position, attends."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]


def band_mask(T: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """Return a mask (1, 1, T, T) of a window: the ``window`` positions up to each query, or half of it to each side."""
    position = torch.arange(T, device=device)
    distance = position[:, None] - position  # from the query back to the key
    seen = (distance >= 0) & (distance < window) if causal else distance.abs() <= window // 2
    return seen[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask to one that is added to the scores: 0 where attended, else minus infinity.

    torch's CPU kernel would convert it again in every layer.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
