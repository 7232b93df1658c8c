"""The head of a masked language model: what an encoder says stands at a position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfcli.model.fused import linear_cross_entropy
from tfcli.model.heads import Head, Transform, of
from tfcli.model.transformer import Transformer

KIND = "masked"


class Output(nn.Module):
    """The bias of the logits; their matrix is the token embedding."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(vocab_size))


class MaskedHead(Head):
    """A transform, then the token embedding, and a bias; ``labels`` is the size of the vocabulary."""

    kind = KIND

    def __init__(self, vocab_size: int, transform: Transform, *, bias: bool = True) -> None:
        super().__init__()
        self.labels = vocab_size
        self.transform = transform
        if bias:
            self.output = Output(vocab_size)

    @property
    def bias(self) -> Tensor | None:
        """Of the logits (V,)."""
        return self.output.bias if hasattr(self, "output") else None

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """(..., D) -> (..., D): what the vocabulary's matrix is multiplied with."""
        out: Tensor = self.transform(hidden_BTD)
        return out


def attached(model: Transformer) -> MaskedHead:
    """The masked-language head of a model. Raises ValueError where it has none."""
    head = of(model)
    if not isinstance(head, MaskedHead):
        raise ValueError("the model has no masked-language head")
    return head


def loss(model: Transformer, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Summed cross-entropy (nats, fp32) of the pieces (N,) that stand where the hidden states (N, D) are."""
    head = attached(model)
    return linear_cross_entropy(head(hidden_ND), model.head.weight, targets_N, head.bias)


def logits(model: Transformer, hidden_ND: Tensor) -> Tensor:
    """Hidden states (N, D) -> logits (N, V) in fp32."""
    head = attached(model)
    out_NV = model.logits(head(hidden_ND))
    return (out_NV if head.bias is None else out_NV + head.bias.to(out_NV.dtype)).float()
