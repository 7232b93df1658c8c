"""The character offsets of each id in its text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tfcli.errors import UserError
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """The ids of a text (``Codec.encode``) and the half-open span of characters of each.

    Spans exclude surrounding whitespace; that of a whitespace piece is empty. Characters that a tokenizer drops are in
    no span, one that it splits into bytes is in several.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def locate(codec: Codec, texts: Sequence[str]) -> list[Located]:
    """Encode each text with offsets.

    Raises UserError for a tokenizer that changes its text and reports no offsets.
    """
    if isinstance(codec, JsonTokenizer):
        pairs = codec.encode_offsets(texts)
    else:
        pairs = [(ids, _by_bytes(codec, ids, text)) for ids, text in zip(codec.encode_batch(texts), texts, strict=True)]
    return [
        Located(ids=tuple(ids), spans=tuple(_trimmed(text, *span) for span in spans))
        for (ids, spans), text in zip(pairs, texts, strict=True)
    ]


def _by_bytes(codec: Codec, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """Locate pieces whose concatenated bytes are the text, perhaps after a space added by the tokenizer."""
    parts = [codec.id_bytes(id) for id in ids]
    whole = b"".join(parts)
    added = len(whole) - len(text.encode())
    if whole != b" " * max(0, added) + text.encode() or added not in (0, 1):
        raise UserError(
            f"{codec.name} changes its text, so that its pieces have no place in it",
            hint="use a model with a tokenizer.json, or a tokenizer that tfcli trained",
        )
    begins = list(accumulate((len(char.encode()) for char in text), initial=added))  # the byte offset of each character
    ends = list(accumulate(map(len, parts)))
    spans = []
    for end, data in zip(ends, parts, strict=True):
        start = max(end - len(data), added)
        first = bisect_right(begins, start) - 1
        spans.append((first, first if end <= start else bisect_right(begins, end - 1)))
    return spans


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end
