"""The yardstick: a recurrent language model (Hochreiter and Schmidhuber 1997) as large as a decoder of any settings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.config.model import Architecture, AttentionConfig, EmbeddingConfig, ModelConfig
from tfcli.model.cost import parameters
from tfcli.model.fused import linear_cross_entropy

LAYERS = 2
"""As of Zaremba et al. 2014; deeper ones are harder to train and no better."""


def size(vocab_size: int, width: int) -> int:
    """Parameters: the embedding, which is the head too, and of each layer two matrices and two biases of four gates."""
    return vocab_size * width + LAYERS * 4 * (2 * width * width + 2 * width)


def like(decoder: ModelConfig) -> ModelConfig:
    """The shape of an LSTM with as many parameters as a decoder, as nearly as a whole width gives them."""
    wanted = parameters(decoder).total
    width = 1
    while size(decoder.vocab_size, width) < wanted:
        width += 1
    below = width - 1
    if below and wanted - size(decoder.vocab_size, below) < size(decoder.vocab_size, width) - wanted:
        width = below
    return shape(vocab_size=decoder.vocab_size, context=decoder.context, width=width)


def shape(*, vocab_size: int, context: int, width: int) -> ModelConfig:
    """The shape as the other parts of tfcli have it: no heads, a step of four gates."""
    return ModelConfig(
        vocab_size=vocab_size,
        context=context,
        depth=LAYERS,
        width=width,
        heads=1,
        kv_heads=1,
        head_width=width,
        ffn_width=4 * width,
        architecture=Architecture(
            attention=AttentionConfig(qk_norm=False), embedding=EmbeddingConfig(positions="learned")
        ),
    )


class Lstm(nn.Module):
    """Token embedding, ``LAYERS`` LSTM layers and the embedding again as head; every row begins with an empty state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, D), freeze=False)
        self.layers = nn.ModuleList(nn.LSTM(D, D, batch_first=True) for _ in range(LAYERS))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Embedding normal, std 0.1; matrices uniform, bound width^-1/2; biases 0, but of the forget gate 1."""
        generator = torch.Generator().manual_seed(seed)
        D = self.config.width
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape)
            if name == "embed.weight":
                value.normal_(0.0, 0.1, generator=generator)
            elif "weight" in name:
                value.uniform_(-(D**-0.5), D**-0.5, generator=generator)
            elif "bias_ih" in name:
                value[D : 2 * D] = 1.0
            parameter.copy_(value)

    def forward(self, tokens_BT: Tensor, *, dtype: torch.dtype | None = None, dropout: float = 0.0) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D) in ``dtype`` (default: of its weights).

        Dropout is of what a layer reads and of what the head reads, not of its state (Zaremba et al. 2014).
        """
        x_BTD = self.embed(tokens_BT).to(dtype or self.embed.weight.dtype)
        for layer in self.layers:
            x_BTD = F.dropout(x_BTD, dropout, training=dropout > 0)
            weights = {name: parameter.to(x_BTD.dtype) for name, parameter in layer.named_parameters()}
            x_BTD, _ = torch.func.functional_call(layer, weights, (x_BTD,))
        return F.dropout(x_BTD, dropout, training=dropout > 0)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed cross-entropy (nats, fp32) of the targets (B, T) given the hidden states (B, T, D)."""
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), self.embed.weight, targets_BT.flatten())
