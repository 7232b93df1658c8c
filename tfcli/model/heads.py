"""Heads for tasks over the same Transformer: one answer a text, one a token, or the two ends of a span.

A head is a module of the model that it is attached to (``model.task_head``), so that training, checkpoints and formats
take it along with the other parameters. Names of its parts in Hugging Face directories: ``formats.heads``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.model.layers import Linear
from tfcli.model.transformer import Transformer

ATTRIBUTE = "task_head"


class Head(nn.Module):
    """From hidden states to the logits of a task; ``kind`` is its name in ``formats.heads``."""

    kind: ClassVar[str]
    labels: int

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """Hidden states (B, T, D), with ``mask_BT`` True where a token is real -> logits in fp32."""
        raise NotImplementedError


class SequenceHead(Head):
    """One answer a text (B, labels).

    Of an encoder: ``W tanh(W_pool h_0 + b_pool) + b``, from its first token (Devlin et al. 2019, 4.1). Of a decoder:
    ``W h_last``, from the last token, the only one that has seen the whole text (Radford et al. 2018, 3.2).
    """

    kind = "sequence"

    def __init__(self, width: int, labels: int, *, causal: bool) -> None:
        super().__init__()
        self.labels, self.causal = labels, causal
        if not causal:
            self.pooler = Linear(width, width, bias=True)
        self.classifier = Linear(width, labels, bias=not causal)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, T, D) -> (B, labels)."""
        if self.causal:
            last_B = mask_BT.sum(dim=1) - 1
            pooled_BD = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        else:
            pooled_BD = torch.tanh(self.pooler(hidden_BTD[:, 0]))
        logits: Tensor = self.classifier(F.dropout(pooled_BD, dropout, training=dropout > 0))
        return logits.float()


class TokenHead(Head):
    """One answer a token (B, T, labels): ``W h_t + b`` (Devlin et al. 2019, 5.3)."""

    kind = "token"

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.labels = labels
        self.classifier = Linear(width, labels, bias=True)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, T, D) -> (B, T, labels)."""
        logits: Tensor = self.classifier(F.dropout(hidden_BTD, dropout, training=dropout > 0))
        return logits.float()


class SpanHead(Head):
    """Where a span begins and ends (B, T, 2): ``W h_t + b`` for each of the two (Devlin et al. 2019, 4.2)."""

    kind = "span"
    labels = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ends = Linear(width, 2, bias=True)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, T, D) -> (B, T, 2)."""
        logits: Tensor = self.ends(hidden_BTD)
        return logits.float()


def make(kind: str, width: int, labels: int, *, causal: bool) -> Head:
    """A head of a kind ("sequence", "token" or "span"), not yet filled."""
    if kind == SequenceHead.kind:
        return SequenceHead(width, labels, causal=causal)
    if kind == TokenHead.kind:
        return TokenHead(width, labels)
    if kind == SpanHead.kind:
        return SpanHead(width)
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
    """Fill a new head: matrices normal with std 0.02, biases 0 (Devlin et al. 2019's published code)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        value = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            value.normal_(0.0, 0.02, generator=generator)
        parameter.copy_(value)


def fresh(model: Transformer, kind: str, labels: int, *, seed: int, keep_pooler: bool = True) -> Head:
    """Attach and return a new head of ``labels``, filled from ``seed``.

    A head of this kind and size that the model came with stays as it is; of one of another size the pooler, which is
    a part of the encoder's own pretraining, stays where ``keep_pooler`` says so.
    """
    before = of(model)
    if before is not None and before.kind == kind and before.labels == labels:
        return before
    head = make(kind, model.config.width, labels, causal=model.config.wiring.causal)
    initialize(head, seed)
    head = head.to(model.device)
    old, new = getattr(before, "pooler", None), getattr(head, "pooler", None)
    if keep_pooler and isinstance(old, nn.Module) and isinstance(new, nn.Module):
        new.load_state_dict(old.state_dict())
    attach(model, head)
    return head


def detach(model: Transformer) -> None:
    """Take the head off a model that has one."""
    if ATTRIBUTE in model._modules:
        del model._modules[ATTRIBUTE]
