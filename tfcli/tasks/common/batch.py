"""Examples of different lengths as tensors: padded at their end, cut into micro-batches and moved together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor


class Batch:
    """Named tensors whose first dimension is the example. ``tokens_BT`` and ``mask_BT`` are always among them.

    The second dimension of those named in ``padded`` is the position: it is as long as the longest example, also after
    a split.
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
        """Tokens of all examples, padding left out."""
        return int(self.tensors["mask_BT"].sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch({name: tensor.to(device) for name, tensor in self.tensors.items()}, padded=self.padded)

    def split(self, size: int) -> list[Batch]:
        """Parts of ``size`` examples, the longest together, each no longer than its longest example."""
        if len(self) <= size:
            return [self]
        lengths_B = self["mask_BT"].sum(dim=1)
        order_B = torch.argsort(lengths_B, descending=True, stable=True)
        parts = []
        for chosen in order_B.split(size):
            longest = max(1, int(lengths_B[chosen].max()))
            parts.append(
                Batch(
                    {
                        name: tensor[chosen][:, :longest] if name in self.padded else tensor[chosen]
                        for name, tensor in self.tensors.items()
                    },
                    padded=self.padded,
                )
            )
        return parts


Rows: TypeAlias = Tensor | Batch
"""What a task feeds the trainer: both have ``to``, ``split`` and ``len``."""


def pad(rows: Sequence[Sequence[int]], *, value: int = 0) -> Tensor:
    """Lists of numbers as int64 (B, T), each filled up at its end with ``value``."""
    longest = max(1, max(map(len, rows), default=0))
    out = np.full((len(rows), longest), value, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return torch.from_numpy(out)


def mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """True (B, T) where ``pad`` puts a number of the row."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = max(1, int(lengths.max(initial=0)))
    return torch.from_numpy(np.arange(longest)[None, :] < lengths[:, None])
