"""Scoring a text: how surprised the model is by each of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tfcli.errors import RunError, UserError
from tfcli.model.base import Model
from tfcli.runtime import Runtime
from tfcli.text.tokenizers.codec import Codec

ROWS_TOKENS = 2048
"""Tokens at once: few enough for a processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Of a text: loss (nats per token), perplexity, bits per byte of its UTF-8 form, and what was counted."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def checked(self) -> Scores:
        """These scores. Raises RunError where the loss is not a number: no score is better than a wrong one."""
        if not math.isfinite(self.loss):
            raise RunError(
                f"the loss of the text is {self.loss}",
                hint="the weights are damaged, or the precision is too small for them: try --precision fp32",
            )
        return self


@torch.no_grad()
def evaluate(
    model: Model,
    ids: npt.NDArray[Any],
    *,
    text_bytes: int,
    codec: Codec,
    runtime: Runtime,
    context: int | None = None,
    stride: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score the whole of ``ids`` (N,), each token once, with ``codec.first_id`` before the first.

    ``ids`` are as ``text.encoding`` joins documents. Windows of ``context`` tokens (default: the model's) start every
    ``stride`` tokens (default: three quarters of a context); of each but the first only the tokens that the window
    before did not reach are scored, so that they have at least context - stride tokens before them. Each window begins
    with the beginning of text where the tokenizer has one, else with the token before it. It is the sliding window of
    https://huggingface.co/docs/transformers/perplexity, but that the last window is moved back until it is full.
    ``text_bytes`` is the length of the text in UTF-8 bytes. ``ids`` may be memory-mapped: only a few windows are held
    at once. ``on_progress`` is told (tokens done, tokens in all). Raises UserError for a model that is no decoder.
    """
    if not model.config.architecture.causal or model.config.encoder_depth:
        raise UserError(
            "this model does not read a text from left to right, so it gives no loss of each token after those before",
            hint="perplexity is of decoders; see what it was trained for with: tfcli predict",
        )
    context = context or model.config.context
    stride = min(stride or max(1, 3 * context // 4), context)
    rows = max(1, ROWS_TOKENS // context)
    nats = torch.zeros((), dtype=torch.float64)
    done = 0
    for windows, fresh in _windows(ids, codec, context=context, stride=stride, rows=rows):
        tokens_BT = torch.from_numpy(windows).to(runtime.device)
        hidden_BTD = model(tokens_BT[:, :-1], dtype=runtime.dtype)[:, -fresh:]
        nats += model.loss(hidden_BTD, tokens_BT[:, -fresh:]).cpu().double()  # in this order: MPS has no float64
        done += fresh * len(windows)
        if on_progress:
            on_progress(done, len(ids))
    loss = float(nats) / max(1, len(ids))
    return Scores(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=float(nats) / math.log(2) / max(1, text_bytes),
        tokens=len(ids),
        bytes=text_bytes,
    )


def _windows(
    ids: npt.NDArray[Any], codec: Codec, *, context: int, stride: int, rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Batches of windows (B, T + 1) of equal length, and how many of the last targets in each row are new."""
    total = len(ids)  # targets 0 .. total - 1; the input of target i is target i - 1, and the first id before target 0
    first, always = codec.first_id, bool(codec.prefix_ids)

    def window(end: int, length: int) -> npt.NDArray[np.int64]:
        start = end - length - 1
        if always or start < 0:
            return np.concatenate([[first], np.asarray(ids[start + 1 : end], np.int64)])
        return np.asarray(ids[start:end], np.int64)

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
