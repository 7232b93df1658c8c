"""Heads for tasks over the same Transformer: one answer a text, one a token, or the two ends of a span.

A head is a module of the model that it is attached to (``model.task_head``), so that training, checkpoints and formats
take it along with the other parameters. Names of its parts in Hugging Face directories: ``formats.heads``.
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
    """From hidden states to the logits of a task; ``kind`` is its name in ``formats.heads``."""

    kind: ClassVar[str]
    labels: int

    @abstractmethod
    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """Hidden states (B, T, D), with ``mask_BT`` True where a token is real -> logits in fp32."""


class Transform(nn.Module):
    """``norm(act(W h + b))``: what stands before the matrix of a masked-language model (Devlin et al. 2019's published
    code), and of every head of ModernBERT (Warner et al. 2024), which goes on with that of its pretraining."""

    def __init__(
        self, width: int, eps: float, *, norm_bias: bool = False, bias: bool = False, activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dense = Linear(width, width, bias)
        self.norm = LayerNorm(width, eps, norm_bias)

    @classmethod
    def of(cls, model: Transformer) -> Transform | None:
        """That of a new head of ``model``, not yet filled; None where such a model has none."""
        config, arch = model.config, model.config.architecture
        if arch.causal or arch.norms.place != "pre":
            return None
        return cls(config.width, config.norm_eps, norm_bias=arch.norms.bias)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.norm(activate(self.dense(hidden_BTD), self.activation))
        return out


class SequenceHead(Head):
    """One answer a text (B, labels).

    Of an encoder: ``W tanh(W_pool h_0 + b_pool) + b``, from its first token (Devlin et al. 2019, 4.1), or, with a
    ``transform``, ``W transform(h_0) + b``, where ``pooling`` may be "mean": of all tokens. Of a decoder: ``W h_last``,
    from the last token, the only one that has seen the whole text (Radford et al. 2018, 3.2).
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
        logits: Tensor = self.classifier(fused.torch_dropout(pooled_BD, dropout))
        return logits.float()


class TokenHead(Head):
    """One answer a token (B, T, labels): ``W h_t + b`` (Devlin et al. 2019, 5.3)."""

    kind = "token"

    def __init__(self, width: int, labels: int, *, transform: Transform | None = None) -> None:
        super().__init__()
        self.labels = labels
        self.transform = transform or nn.Identity()
        self.classifier = Linear(width, labels, bias=True)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, T, D) -> (B, T, labels)."""
        logits: Tensor = self.classifier(fused.torch_dropout(self.transform(hidden_BTD), dropout))
        return logits.float()


class SpanHead(Head):
    """Where a span begins and ends (B, T, 2): ``W h_t + b`` for each of the two (Devlin et al. 2019, 4.2)."""

    kind = "span"
    labels = 2

    def __init__(self, width: int, *, transform: Transform | None = None) -> None:
        super().__init__()
        self.transform = transform or nn.Identity()
        self.ends = Linear(width, 2, bias=True)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, T, D) -> (B, T, 2)."""
        logits: Tensor = self.ends(self.transform(hidden_BTD))
        return logits.float()


def make(
    kind: str, width: int, labels: int, *, causal: bool, transform: Transform | None = None, pooling: str = "cls"
) -> Head:
    """A head of a kind ("sequence", "token" or "span"), not yet filled."""
    if kind == SequenceHead.kind:
        return SequenceHead(width, labels, causal=causal, transform=transform, pooling=pooling)
    if kind == TokenHead.kind:
        return TokenHead(width, labels, transform=transform)
    if kind == SpanHead.kind:
        return SpanHead(width, transform=transform)
    raise ValueError(f"no head of kind {kind!r}")


def attach(model: Transformer, head: Head) -> None:
    """Make ``head`` a part of ``model``, in the place of the one that it had."""
    setattr(model, ATTRIBUTE, head.to(model.device))


def of(model: Transformer) -> Head | None:
    """The head that was attached to a model."""
    head = getattr(model, ATTRIBUTE, None)
    return head if isinstance(head, Head) else None


@torch.no_grad()
def initialize(head: Head, seed: int) -> None:
    """Fill a new head: matrices normal with std 0.02, biases 0, norms 1 (Devlin et al. 2019's published code)."""
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
    """Attach and return a new head of ``labels``, filled from ``seed``.

    A head of this kind and size that the model came with stays as it is; of another the pooler or transform, which is
    a part of the encoder's own pretraining, stays where ``keep_pooler`` says so. ``pooling`` as of ``SequenceHead``.
    """
    before = of(model)
    if before is not None and before.kind == kind and before.labels == labels:
        return before
    transform = Transform.of(model)
    old = getattr(before, "transform", None)
    if keep_pooler and isinstance(old, Transform) and transform is not None:
        transform = copy.deepcopy(old)  # whatever biases and activation it has
    causal = model.config.architecture.causal
    head = make(kind, model.config.width, labels, causal=causal, transform=transform, pooling=pooling)
    initialize(head, seed)
    head = head.to(model.device)
    for part in ("pooler", "transform"):
        old, new = getattr(before, part, None), getattr(head, part, None)
        if keep_pooler and isinstance(old, nn.Module) and isinstance(new, nn.Module):
            new.load_state_dict(old.state_dict())
    attach(model, head)
    return head


def detach(model: Transformer) -> None:
    """Take the head off a model that has one."""
    if ATTRIBUTE in model._modules:
        del model._modules[ATTRIBUTE]
