"""Teacher forcing of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tfcli.model.transformer import Transformer
from tfcli.tasks.common.batch import Batch, mask, pad

IGNORED = -100
"""Target of padding."""


def both_sides(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Batch:
    """Return a batch with the source as ``tokens_BT`` and the target as ``targets_BU``, padded with ``IGNORED``."""
    return Batch({"tokens_BT": pad(sources), "mask_BT": mask(sources), "targets_BU": pad(targets, value=IGNORED)})


def forced(
    model: Transformer, rows: Batch, *, start_id: int, dtype: torch.dtype, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return the decoder's hidden states (N, D) after ``start_id`` and the targets so far, and the targets (N,)."""
    real_BU = rows["targets_BU"] != IGNORED
    longest = int(real_BU.sum(dim=1).max())  # of this part of a batch
    real_BU, targets_BU = real_BU[:, :longest], rows["targets_BU"][:, :longest]
    start_B1 = torch.full_like(targets_BU[:, :1], start_id)
    read_BU = torch.cat([start_B1, targets_BU[:, :-1].clamp_min(0)], dim=1)
    memory = model.encode(rows["tokens_BT"], mask_BS=rows["mask_BT"], dtype=dtype, dropout=dropout)
    hidden_BUD = model(read_BU, memory=memory, dtype=dtype, dropout=dropout)
    return hidden_BUD[real_BU], targets_BU[real_BU]
