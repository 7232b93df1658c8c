"""The Transformer: blocks over a residual stream, wired by ModelConfig."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.config import ModelConfig
from tfcli.model.attention import Attention, causal_mask
from tfcli.model.cache import KVCache
from tfcli.model.kernels import linear_cross_entropy
from tfcli.model.layers import FeedForward, Linear, RMSNorm, rope_table


class Block(nn.Module):
    """Pre-norm block: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))`` (Xiong et al. 2020)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, dropout: float
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        y_BTD = self.attention(self.attention_norm(x_BTD), rope, mask, cache)
        x_BTD = x_BTD + F.dropout(y_BTD, dropout, training=dropout > 0)
        y_BTD = self.ffn(self.ffn_norm(x_BTD))
        return x_BTD + F.dropout(y_BTD, dropout, training=dropout > 0)


class Transformer(nn.Module):
    """A decoder: token embedding, ``depth`` blocks, a final norm and an output head.

    One forward serves training and inference: the cache is a value passed in. Constructors only declare; ``initialize``
    or loaded weights fill the parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.width), freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = Linear(config.width, config.vocab_size)
        if config.tied:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed.weight.device

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        cache: KVCache | None = None,
        dtype: torch.dtype | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D) after the final norm, in ``dtype`` (default: the weights').

        With a cache the tokens follow what it holds, and it is advanced by T. Its ``pad_B`` marks left padding.
        """
        T = tokens_BT.shape[1]
        past = cache.length if cache is not None else 0
        positions = torch.arange(past, past + T, device=tokens_BT.device)
        mask = None
        if cache is not None and cache.pad_B is not None:
            positions = (positions - cache.pad_B[:, None]).clamp_min(0)
            mask = padded_mask(T, past + T, cache.pad_B)
        x_BTD = F.embedding(tokens_BT, self.embed.weight)
        x_BTD = x_BTD.to(dtype or x_BTD.dtype)
        cos, sin = rope_table(positions, self.config.head_width, self.config.rope_theta)
        rope = (cos.to(x_BTD.dtype).unsqueeze(-2), sin.to(x_BTD.dtype).unsqueeze(-2))
        x_BTD = F.dropout(x_BTD, dropout, training=dropout > 0)
        for block in self.blocks:
            x_BTD = block(x_BTD, rope, mask, cache, dropout)
        if cache is not None:
            cache.advance(T)
        hidden_BTD: Tensor = self.norm(x_BTD)
        return hidden_BTD

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed cross-entropy (nats, fp32) of the targets (B, T) given the hidden states (B, T, D)."""
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), self.head.weight, targets_BT.flatten())

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) in the dtype of the hidden states."""
        out: Tensor = self.head(hidden_BTD)
        return out


def padded_mask(T: int, S: int, pad_B: Tensor) -> Tensor:
    """(B, 1, T, S): causal, and blind to each row's first ``pad_B`` positions.

    A padded query would see nothing, which softmax cannot express; it sees itself, and nobody reads it.
    """
    causal = causal_mask(T, S, pad_B.device)
    real = torch.arange(S, device=pad_B.device) >= pad_B[:, None]
    itself = torch.eye(S, dtype=torch.bool, device=pad_B.device)[S - T :]
    return (causal & real[:, None, None, :]) | itself


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fill every parameter, for fast learning:

    | parameter | value |
    |---|---|
    | embedding (and tied head) | normal, std 0.02 |
    | untied head | zero: the first prediction is uniform |
    | norms | 1 |
    | attention o, ffn down | zero: every block starts as the identity (Zhang et al. 2019, Fixup) |
    | other matrices | uniform, std fan_in^-1/2 |
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape)
        if name == "embed.weight":
            value.normal_(0.0, 0.02, generator=generator)
        elif name.endswith("norm.weight"):
            value.fill_(1.0)
        elif name.endswith((".o.weight", ".down.weight")) or name == "head.weight":
            value.zero_()
        else:
            bound = (3.0 / parameter.shape[1]) ** 0.5
            value.uniform_(-bound, bound, generator=generator)
        parameter.copy_(value)
