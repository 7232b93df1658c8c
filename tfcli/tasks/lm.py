"""Language modelling: predict each token from those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime


def loss(model: Transformer, tokens_BT: Tensor, *, dtype: torch.dtype, dropout: float = 0.0) -> tuple[Tensor, int]:
    """Summed cross-entropy (nats, fp32) of every token but the first of each row, and how many they are.

    ``tokens_BT`` holds T + 1 ids a row: inputs are the first T, targets the last T.
    """
    hidden_BTD = model(tokens_BT[:, :-1], dtype=dtype, dropout=dropout)
    logits_NV = model.logits(hidden_BTD).flatten(0, 1)
    targets_N = tokens_BT[:, 1:].flatten()
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum"), targets_N.numel()


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Of a text: loss (nats per token), perplexity, bits per byte of its UTF-8 form, and what was counted."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate(
    model: Transformer, ids: np.ndarray, *, text_bytes: int, context: int, runtime: Runtime, rows: int = 16
) -> Scores:
    """Score ``ids`` (N,), the whole of it, each token once.

    Windows of ``context`` tokens overlap by half: after the first, the second half of each window is scored with the
    first half as context. The first token is predicted from the end-of-text-like token 0 context it lacks, so it is
    scored as uniform over the vocabulary.
    """
    nats = math.log(model.config.vocab_size)
    half = max(1, context // 2)
    starts = list(range(0, max(1, len(ids) - 1 - half), half))
    batch: list[tuple[np.ndarray, int]] = []
    for i, start in enumerate(starts):
        window = np.asarray(ids[start : start + context + 1], dtype=np.int64)
        batch.append((window, 0 if start == 0 else context - half))
        if len(batch) == rows or i == len(starts) - 1:
            nats += _score(model, batch, runtime)
            batch = []
    loss_value = nats / max(1, len(ids))
    return Scores(
        loss=loss_value,
        perplexity=math.exp(min(loss_value, 700.0)),
        bits_per_byte=nats / math.log(2) / max(1, text_bytes),
        tokens=len(ids),
        bytes=text_bytes,
    )
