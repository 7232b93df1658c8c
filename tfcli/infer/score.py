"""Scoring a text: the loss of each of its tokens."""

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
"""Tokens per batch: few enough for a processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Scores of a text: loss (nats per token), perplexity, bits per UTF-8 byte, and the number of tokens and bytes."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def checked(self) -> Scores:
        """Return these scores. Raises RunError where the loss is not finite."""
        if not math.isfinite(self.loss):
            raise RunError(
                f"the loss of the text is {self.loss}",
                hint="the weights are damaged, or the precision is too small for them: try --precision fp32",
            )
        return self


@torch.no_grad()
def evaluate(
    model: Model, ids: npt.NDArray[Any], *, text_bytes: int, codec: Codec, runtime: Runtime,
    context: int | None = None, stride: int | None = None, on_progress: Callable[[int, int], None] | None = None,
) -> Scores:  # fmt: skip
    """Score ``ids`` (N,), each token once, with ``codec.first_id`` before the first.

    ``ids`` are documents as ``tfcli.text.corpus.encoding`` joins them; they may be memory-mapped: only a few windows
    are held at once. Windows of ``context`` tokens (default: the model's) start every ``stride`` tokens (default: three
    quarters of a context); only tokens beyond the previous window are scored, with at least context - stride tokens
    before them. Each window begins with the beginning of text where the tokenizer has one, else with the token before
    it. This is the sliding window of https://huggingface.co/docs/transformers/perplexity, except that the last window
    is moved back until it is full. ``text_bytes`` is the length of the text in UTF-8 bytes; ``on_progress`` gets
    (tokens done, tokens in all). Raises UserError for a model that is not a decoder.
    """
    if not model.config.architecture.causal or model.config.encoder_depth:
        raise UserError(
            "this model does not read text from left to right, so it has no loss of each token given those before it",
            hint="perplexity is for decoders; see what this model was trained for with: tfcli predict",
        )
    context = context or model.config.context
    if stride is not None and stride < 1:
        raise UserError(f"stride is {stride}", hint="it must be at least 1")
    stride = min(stride or max(1, 3 * context // 4), context)
    rows = max(1, ROWS_TOKENS // context)
    nats, done = torch.zeros((), dtype=torch.float64), 0
    for windows, fresh in _windows(ids, codec, context=context, stride=stride, rows=rows):
        tokens_BT = torch.from_numpy(windows).to(runtime.device)
        hidden_BTD = model(tokens_BT[:, :-1], dtype=runtime.dtype)[:, -fresh:]
        nats += model.loss(hidden_BTD, tokens_BT[:, -fresh:]).cpu().double()  # in this order: MPS has no float64
        done += fresh * len(windows)
        if on_progress:
            on_progress(done, len(ids))
    loss = float(nats) / max(1, len(ids))
    bits_per_byte = float(nats) / math.log(2) / max(1, text_bytes)
    perplexity = math.exp(min(loss, 700.0))
    return Scores(loss=loss, perplexity=perplexity, bits_per_byte=bits_per_byte, tokens=len(ids), bytes=text_bytes)


def _windows(
    ids: npt.NDArray[Any], codec: Codec, *, context: int, stride: int, rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Yield batches of windows (B, T + 1) of equal length, and the number of new targets at the end of each row."""
    total = len(ids)  # the input of target i is target i - 1; of target 0 the first id
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
