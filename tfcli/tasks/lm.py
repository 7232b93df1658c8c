"""Language modelling: predict each token from those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from tfcli.infer.score import Scores, evaluate
from tfcli.model.transformer import Transformer

__all__ = ["Scores", "evaluate", "loss"]


def loss(model: Transformer, tokens_BT: Tensor, *, dtype: torch.dtype, dropout: float = 0.0) -> tuple[Tensor, int]:
    """Summed cross-entropy (nats, fp32) of every token but the first of each row, and how many they are.

    ``tokens_BT`` holds T + 1 ids a row: inputs are the first T, targets the last T.
    """
    hidden_BTD = model(tokens_BT[:, :-1], dtype=dtype, dropout=dropout)
    targets_BT = tokens_BT[:, 1:]
    return model.loss(hidden_BTD, targets_BT), targets_BT.numel()
