"""Heads over the Transformer: one answer per text or per token, the two ends of a span, or masked tokens.

A head is a module of the model that it is attached to (``model.task_head``), so that training, checkpoints and formats
handle it with the other parameters. ``tfcli.formats.hf.heads`` maps its parts to Hugging Face's names.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from tfcli.model import fused
from tfcli.model.layers import LayerNorm, Linear, activate
from tfcli.model.transformer import Transformer

ATTRIBUTE = "task_head"
Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]


class Head(nn.Module, ABC):
    """A layer from hidden states to the logits of a task; ``kind`` is its name in ``tfcli.formats.hf.heads``."""

    kind: ClassVar[str]
    labels: int

    @abstractmethod
    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """Hidden states (B, T, D) -> logits in fp32; ``mask_BT`` is True where a token is not padding."""


class Transform(nn.Module):
    """``norm(act(W h + b))``, which precedes the matrix of a masked-language head (Devlin et al. 2019's published code)
    and of every head of ModernBERT (Warner et al. 2024), where it comes from pretraining."""

    def __init__(
        self, width: int, eps: float, *, norm_bias: bool = False, bias: bool = False, activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dense = Linear(width, width, bias)
        self.norm = LayerNorm(width, eps, norm_bias)

    @classmethod
    def of(cls, model: Transformer) -> Transform | None:
        """Make the transform of a new head of ``model``, not initialized; None where its architecture has none."""
        config, arch = model.config, model.config.architecture
        if arch.causal or arch.norms.place != "pre":
            return None
        return cls(config.width, config.norm_eps, norm_bias=arch.norms.bias)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.norm(activate(self.dense(hidden_BTD), self.activation))


class SequenceHead(Head):
    """One answer per text (B, labels).

    For an encoder ``W tanh(W_pool h_0 + b_pool) + b`` of the first token (Devlin et al. 2019, 4.1) or, with a
    ``transform``, ``W transform(h_0) + b``, where ``pooling`` may be "mean" over all tokens. For a decoder ``W h_last``
    of the last token, the only one that attends to the whole text (Radford et al. 2018, 3.2).
    """

    kind = "sequence"

    def __init__(
        self, width: int, labels: int, *, causal: bool, transform: Transform | None = None, pooling: str = "cls"
    ) -> None:
        super().__init__()
        self.labels, self.causal, self.pooling = labels, causal, pooling
        if transform is not None:
            self.transform = transform
        elif not causal:
            self.pooler = Linear(width, width, bias=True)
        self.classifier = Linear(width, labels, bias=not causal)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, T, D) -> (B, labels)."""
        if self.causal:
            last_B = mask_BT.sum(dim=1) - 1
            pooled_BD = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        elif hasattr(self, "transform"):
            first_BD = hidden_BTD[:, 0]
            if self.pooling == "mean":
                real_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
                first_BD = (hidden_BTD * real_BT1).sum(dim=1) / real_BT1.sum(dim=1)
            pooled_BD = self.transform(first_BD)
        else:
            pooled_BD = torch.tanh(self.pooler(hidden_BTD[:, 0]))
        return self.classifier(fused.torch_dropout(pooled_BD, dropout)).float()


class TokenHead(Head):
    """One answer per token (B, T, labels): ``W h_t + b`` (Devlin et al. 2019, 5.3)."""

    kind = "token"

    def __init__(self, width: int, labels: int, *, transform: Transform | None = None) -> None:
        super().__init__()
        self.labels = labels
        self.transform = transform or nn.Identity()
        self.classifier = Linear(width, labels, bias=True)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, T, D) -> (B, T, labels)."""
        return self.classifier(fused.torch_dropout(self.transform(hidden_BTD), dropout)).float()


class SpanHead(Head):
    """The beginning and end of a span (B, T, 2): ``W h_t + b`` for each of the two (Devlin et al. 2019, 4.2)."""

    kind = "span"
    labels = 2

    def __init__(self, width: int, *, transform: Transform | None = None) -> None:
        super().__init__()
        self.transform = transform or nn.Identity()
        self.ends = Linear(width, 2, bias=True)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, T, D) -> (B, T, 2)."""
        return self.ends(self.transform(hidden_BTD)).float()


class MaskedBias(nn.Module):
    """The bias of a masked-language head; its matrix is the token embedding."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(vocab_size))


class MaskedHead(Head):
    """The masked-language head of an encoder: a transform, the token embedding and a bias; ``labels`` is V."""

    kind = "masked"

    def __init__(self, vocab_size: int, transform: Transform, *, bias: bool = True) -> None:
        super().__init__()
        self.labels = vocab_size
        self.transform = transform
        self.output = MaskedBias(vocab_size) if bias else None

    @property
    def bias(self) -> Tensor | None:
        """The bias of the logits (V,)."""
        return None if self.output is None else self.output.bias

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """(..., D) -> (..., D), the input of the product with the token embedding."""
        return self.transform(hidden_BTD)

    @classmethod
    def of(cls, model: Transformer) -> MaskedHead:
        """Return the masked-language head of a model. Raises ValueError where it has none."""
        head = of(model)
        if not isinstance(head, cls):
            raise ValueError("the model has no masked-language head")
        return head


def masked_loss(model: Transformer, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return the summed cross-entropy (nats, fp32) of masked tokens (N,) given the hidden states (N, D) there."""
    head = MaskedHead.of(model)
    return fused.linear_cross_entropy(head(hidden_ND), model.head.weight, targets_N, head.bias)


def masked_logits(model: Transformer, hidden_ND: Tensor) -> Tensor:
    """Hidden states (N, D) -> logits (N, V) in fp32."""
    head = MaskedHead.of(model)
    out_NV = model.logits(head(hidden_ND))
    return (out_NV if head.bias is None else out_NV + head.bias.to(out_NV.dtype)).float()


def make(
    kind: str, width: int, labels: int, *, causal: bool, transform: Transform | None = None, pooling: str = "cls"
) -> Head:
    """Make a head of a kind ("sequence", "token" or "span"), not initialized."""
    if kind == SequenceHead.kind:
        return SequenceHead(width, labels, causal=causal, transform=transform, pooling=pooling)
    if kind == TokenHead.kind:
        return TokenHead(width, labels, transform=transform)
    if kind == SpanHead.kind:
        return SpanHead(width, transform=transform)
    raise ValueError(f"no head of kind {kind!r}")


def attach(model: Transformer, head: Head) -> None:
    """Make ``head`` a part of ``model``, replacing any that it had."""
    setattr(model, ATTRIBUTE, head.to(model.device))


def of(model: Transformer) -> Head | None:
    """Return the head that is attached to a model, if any."""
    head = getattr(model, ATTRIBUTE, None)
    return head if isinstance(head, Head) else None


@torch.no_grad()
def initialize(head: Head, seed: int) -> None:
    """Initialize a new head: matrices normal with std 0.02, biases 0, norms 1 (Devlin et al. 2019's published code)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in head.named_parameters():
        value = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            value.normal_(0.0, 0.02, generator=generator)
        elif name.endswith("norm.weight"):
            value.fill_(1.0)
        parameter.copy_(value)


def fresh(
    model: Transformer, kind: str, labels: int, *, seed: int, keep_pooler: bool = True, pooling: str = "cls"
) -> Head:
    """Attach and return a new head of ``labels``, initialized from ``seed``.

    A head of this kind and size that the model came with is kept; of another, ``keep_pooler`` keeps the pooler or
    transform, which belongs to the encoder's pretraining. ``pooling`` is as in ``SequenceHead``.
    """
    before = of(model)
    if before is not None and before.kind == kind and before.labels == labels:
        return before
    causal, transform = model.config.architecture.causal, Transform.of(model)
    head = make(kind, model.config.width, labels, causal=causal, transform=transform, pooling=pooling)
    initialize(head, seed)
    for part in ("pooler", "transform"):
        old, new = getattr(before, part, None), getattr(head, part, None)
        if keep_pooler and isinstance(old, nn.Module) and isinstance(new, type(old)):
            setattr(head, part, copy.deepcopy(old))  # with the biases and the activation that it has
    attach(model, head)
    return head


def detach(model: Transformer) -> None:
    """Remove the head of a model that has one."""
    if of(model) is not None:
        delattr(model, ATTRIBUTE)
