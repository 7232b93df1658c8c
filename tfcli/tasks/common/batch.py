"""Batches of examples of different lengths, and the model's head over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tfcli.model import heads
from tfcli.model.transformer import Transformer


class Batch:
    """Named tensors over examples, ``tokens_BT`` and ``mask_BT`` among them.

    The second dimension of those named in ``padded`` is the position, as long as the longest example, also after a
    split.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, padded: Sequence[str] = ("tokens_BT", "mask_BT")) -> None:
        self.tensors = dict(tensors)
        self.padded = tuple(padded)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(self.tensors["tokens_BT"])

    @property
    def real_tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.tensors["mask_BT"].sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch({name: tensor.to(device) for name, tensor in self.tensors.items()}, padded=self.padded)

    def split(self, size: int) -> list[Batch]:
        """Split into parts of ``size`` examples, sorted by length, each no longer than its longest example."""
        if len(self) <= size:
            return [self]
        lengths_B = self["mask_BT"].sum(dim=1)
        order_B = torch.argsort(lengths_B, descending=True, stable=True)
        parts = []
        for chosen in order_B.split(size):
            longest = max(1, int(lengths_B[chosen].max()))
            tensors = {
                name: tensor[chosen][:, :longest] if name in self.padded else tensor[chosen]
                for name, tensor in self.tensors.items()
            }
            parts.append(Batch(tensors, padded=self.padded))
        return parts


Rows: TypeAlias = Tensor | Batch
"""Examples for the trainer: both types have ``to``, ``split`` and ``len``."""


def pad(rows: Sequence[Sequence[int]], *, value: int = 0) -> Tensor:
    """Return lists of numbers as int64 (B, T), padded at their end with ``value``."""
    longest = max(1, max(map(len, rows), default=0))
    out = np.full((len(rows), longest), value, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return torch.from_numpy(out)


def mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the mask (B, T) of ``pad``: True where a number of the row is."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = max(1, int(lengths.max(initial=0)))
    return torch.from_numpy(np.arange(longest)[None, :] < lengths[:, None])


def head_logits(model: Transformer, rows: Batch, *, dtype: torch.dtype | None = None, dropout: float = 0.0) -> Tensor:
    """Return the logits of the model's head over a batch, in fp32."""
    head = heads.of(model)
    assert head is not None, "the task attached a head"
    types_BT = rows.tensors.get("types_BT") if model.config.architecture.embedding.token_types > 1 else None
    hidden_BTD = model(rows["tokens_BT"], mask_BT=rows["mask_BT"], types_BT=types_BT, dtype=dtype, dropout=dropout)
    logits: Tensor = head(hidden_BTD, rows["mask_BT"], dropout)
    return logits
