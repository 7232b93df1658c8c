"""A model that finds answers in texts: the best span over all windows, and how it stands against "no answer"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.infer.batches import by_length
from tfcli.model import heads
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.answer.data import Question
from tfcli.tasks.answer.windows import Layout, Window, text_of
from tfcli.tasks.common import batch
from tfcli.tasks.common.batch import Batch
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.offsets import Located, locate

NOTHING = 1e6
"""The margin of "no answer" where a context has no pieces."""
PADDED = ("tokens_BT", "mask_BT", "types_BT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Questions as windows: of ``windows[i]``, question ``owner[i]``; the pieces of every context."""

    windows: list[Window]
    owner: list[int]
    contexts: list[Located]
    cut: list[int]
    """Indices of questions that were longer than the layout allows, and lost what follows."""
    long: int
    """Questions with more than one window."""


def encode(codec: Codec, layout: Layout, questions: Sequence[tuple[str, str]]) -> Encoded:
    """Windows of (question, context) pairs; a context that comes again is encoded once."""
    texts = list(dict.fromkeys(context for _, context in questions))
    known = dict(zip(texts, locate(codec, texts), strict=True))
    asked = codec.encode_batch([question for question, _ in questions])
    windows: list[Window] = []
    owner: list[int] = []
    long = 0
    for index, ((_, context), ids) in enumerate(zip(questions, asked, strict=True)):
        made = layout.windows(tuple(ids), known[context])
        windows += made
        owner += [index] * len(made)
        long += len(made) > 1
    return Encoded(
        windows=windows,
        owner=owner,
        contexts=[known[context] for _, context in questions],
        cut=[index for index, ids in enumerate(asked) if len(ids) > layout.question],
        long=long,
    )


def tensors(windows: Sequence[Window]) -> dict[str, Tensor]:
    """Those of ``PADDED``."""
    ids = [window.ids for window in windows]
    return {
        "tokens_BT": batch.pad(ids),
        "mask_BT": batch.mask(ids),
        "types_BT": batch.pad([window.types for window in windows]),
    }


def logits(model: Transformer, part: Batch, *, dtype: torch.dtype | None = None, dropout: float = 0.0) -> Tensor:
    """Where an answer begins and ends (B, T, 2), in fp32; padding is -inf, whatever stands beside a row."""
    head = heads.of(model)
    assert head is not None, "a head was attached"
    mask_BT = part["mask_BT"]
    types_BT = part["types_BT"] if model.config.architecture.embedding.token_types > 1 else None
    hidden_BTD = model(part["tokens_BT"], mask_BT=mask_BT, types_BT=types_BT, dtype=dtype, dropout=dropout)
    found_BT2: Tensor = head(hidden_BTD, mask_BT, dropout)
    return found_BT2.masked_fill(~mask_BT[..., None], -math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The best answer to one question: characters ``start`` to ``end`` of its context.

    ``null_margin`` is by how much "no answer" scores above it, in logits. ``probability`` and ``null_probability`` are
    a softmax over all spans of all windows, and no answer.
    """

    start: int
    end: int
    null_margin: float
    probability: float
    null_probability: float


@torch.inference_mode()
def read(model: Transformer, encoded: Encoded, runtime: Runtime, *, longest: int) -> list[Reading]:
    """The best span of at most ``longest`` pieces for each question.

    A span scores start logit + end logit; no answer the same at position 0, in the window where that is least (Devlin
    et al. 2019, 4.3, and its published code).
    """
    windows = encoded.windows
    rows = np.empty((len(windows), 5))
    for chosen in by_length([len(window.ids) for window in windows], device=runtime.device):
        some = [windows[index] for index in chosen]
        part = Batch(tensors(some), padded=PADDED).to(runtime.device)
        rows[chosen] = _spans(logits(model, part, dtype=runtime.dtype), some, longest)
    ends = np.searchsorted(encoded.owner, np.arange(len(encoded.contexts) + 1))
    return [
        _best(rows[start:end], windows[start:end], context)
        for start, end, context in zip(ends, ends[1:], encoded.contexts, strict=False)
    ]


def _spans(logits_BT2: Tensor, windows: Sequence[Window], longest: int) -> npt.NDArray[np.float64]:
    """(B, 5): the best span's score, its first and last position, the score of no answer, the log-sum over spans."""
    first_BT, last_BT = logits_BT2.double().unbind(dim=-1)
    T = first_BT.shape[1]
    at = torch.tensor([[window.at, window.at + window.count] for window in windows], device=first_BT.device)
    positions = torch.arange(T, device=first_BT.device)
    context_BT = (positions >= at[:, :1]) & (positions < at[:, 1:])
    null_B = first_BT[:, 0] + last_BT[:, 0]
    first_BT = first_BT.masked_fill(~context_BT, -math.inf)
    last_BT = last_BT.masked_fill(~context_BT, -math.inf)
    # scores[b, d, t]: from t to t + d
    further = [torch.nn.functional.pad(last_BT[:, d:], (0, d), value=-math.inf) for d in range(min(longest, T))]
    scores_BET = first_BT[:, None] + torch.stack(further, dim=1)
    flat = scores_BET.flatten(1)
    best_B, where_B = flat.max(dim=1)
    start_B = where_B % T
    columns = (best_B, start_B, start_B + where_B // T, null_B, flat.logsumexp(dim=1))
    return torch.stack([column.double() for column in columns], dim=1).cpu().numpy()


def _best(rows: npt.NDArray[np.float64], windows: Sequence[Window], context: Located) -> Reading:
    """Of the windows of one question."""
    which = int(rows[:, 0].argmax())
    score, first, last = rows[which, :3]
    null = float(rows[:, 3].min())
    if not math.isfinite(score):  # the context has no pieces
        return Reading(start=0, end=0, null_margin=NOTHING, probability=0.0, null_probability=1.0)
    total = np.logaddexp.reduce([*rows[:, 4], null])
    window = windows[which]
    shift = window.first - window.at
    start, end = text_of(context, int(first) + shift, int(last) + shift)
    return Reading(
        start=start,
        end=end,
        null_margin=null - float(score),
        probability=float(np.exp(score - total)),
        null_probability=float(np.exp(null - total)),
    )


def pairs(questions: Sequence[Question]) -> list[tuple[str, str]]:
    """(question, context) of each."""
    return [(question.question, question.context) for question in questions]
