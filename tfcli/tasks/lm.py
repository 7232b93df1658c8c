"""Language modelling: predict each token from those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    targets_BT = tokens_BT[:, 1:]
    return model.loss(hidden_BTD, targets_BT), targets_BT.numel()


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
    model: Transformer, ids: np.ndarray, *, text_bytes: int, first: int, runtime: Runtime, stride: int | None = None
) -> Scores:
    """Score the whole of ``ids`` (N,), each token once, with ``first`` (the end-of-text id) before the first.

    Windows as long as the model's context start every ``stride`` tokens (default: half a context); of each but the
    first only the tokens that the window before did not reach are scored, so that they have at least
    context - stride tokens before them. ``text_bytes`` is the length of the text in UTF-8 bytes.
    """
    context = model.config.context
    stride = min(stride or max(1, context // 2), context)
    rows = max(1, 8192 // context)
    nats = torch.zeros((), dtype=torch.float64)
    for windows, fresh in _windows(ids, first=first, context=context, stride=stride, rows=rows):
        tokens_BT = torch.from_numpy(windows).to(runtime.device)
        hidden_BTD = model(tokens_BT[:, :-1], dtype=runtime.dtype)[:, -fresh:]
        logits_NV = model.logits(hidden_BTD).flatten(0, 1)
        nats += F.cross_entropy(logits_NV.float(), tokens_BT[:, -fresh:].flatten(), reduction="sum").double().cpu()
    loss_value = float(nats) / max(1, len(ids))
    return Scores(
        loss=loss_value,
        perplexity=math.exp(min(loss_value, 700.0)),
        bits_per_byte=float(nats) / math.log(2) / max(1, text_bytes),
        tokens=len(ids),
        bytes=text_bytes,
    )


def _windows(
    ids: np.ndarray, *, first: int, context: int, stride: int, rows: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of windows (B, T + 1) of equal length, and how many of the last targets in each row are new."""
    total = len(ids)  # targets 0 .. total - 1; the input of target i is target i - 1, and `first` before target 0

    def window(end: int, length: int) -> np.ndarray:
        start = end - length - 1
        body = np.asarray(ids[max(0, start) : end], dtype=np.int64)
        return body if start >= 0 else np.concatenate([[first], body])

    done = min(context, total)
    if done:
        yield window(done, done)[None], done
    full = (total - done) // stride
    for begin in range(0, full, rows):
        ends = [done + (i + 1) * stride for i in range(begin, min(full, begin + rows))]
        yield np.stack([window(end, context) for end in ends]), stride
    rest = (total - done) % stride
    if rest:
        yield window(total, min(context, total))[None], rest
