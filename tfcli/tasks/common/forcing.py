"""Teacher forcing of an encoder-decoder: what a batch of two sides is, and what the decoder makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tfcli.model.transformer import Transformer
from tfcli.tasks.common.batch import Batch, mask, pad

IGNORED = -100
"""The target where a shorter one has ended."""


def both_sides(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Batch:
    """Both sides: ``tokens_BT`` the source, ``targets_BU`` what is learnt, with ``IGNORED`` at its end."""
    return Batch({"tokens_BT": pad(sources), "mask_BT": mask(sources), "targets_BU": pad(targets, value=IGNORED)})


def forced(
    model: Transformer, rows: Batch, *, start_id: int, dtype: torch.dtype, dropout: float
) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) of the decoder that reads ``start_id`` and then the targets, and these targets (N,)."""
    real_BU = rows["targets_BU"] != IGNORED
    longest = int(real_BU.sum(dim=1).max())  # of this part of a batch
    real_BU, targets_BU = real_BU[:, :longest], rows["targets_BU"][:, :longest]
    start_B1 = torch.full_like(targets_BU[:, :1], start_id)
    read_BU = torch.cat([start_B1, targets_BU[:, :-1].clamp_min(0)], dim=1)
    memory = model.encode(rows["tokens_BT"], mask_BS=rows["mask_BT"], dtype=dtype, dropout=dropout)
    hidden_BUD = model(read_BU, memory=memory, dtype=dtype, dropout=dropout)
    return hidden_BUD[real_BU], targets_BU[real_BU]
