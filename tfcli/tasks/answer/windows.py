"""A question and its context as rows of ids, in overlapping windows over a long context."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from tfcli.errors import UserError
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.offsets import Located

LEAST = 8
"""Minimum room for tokens of the context in a window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """``prefix question separator context separator`` as ids; position 0 stands for "no answer".

    Tokens ``first`` to ``first + count`` (exclusive) of the context start at position ``at``.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    """Segment ids of BERT: 0 for the question, 1 for the context."""
    at: int
    first: int
    count: int

    def target(self, pieces: tuple[int, int] | None) -> tuple[int, int]:
        """Return the positions of an answer's first and last token; (0, 0) where the window does not hold it whole."""
        if pieces is None or pieces[0] < self.first or pieces[1] >= self.first + self.count:
            return 0, 0
        return self.at + pieces[0] - self.first, self.at + pieces[1] - self.first


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The layout of a model's rows: the ids around the parts, and lengths in ids.

    ``length`` is the maximum of a row, ``question`` that of a question; neighboring windows share ``overlap`` ids.
    """

    prefix: tuple[int, ...]
    separator: tuple[int, ...]
    length: int
    overlap: int = 128
    question: int = 64

    @classmethod
    def of(cls, codec: Codec, *, length: int, overlap: int, question: int) -> Layout:
        """Return the layout for a tokenizer. Raises UserError where a window has no room for context."""
        bos = codec.eos_id if codec.bos_id is None else codec.bos_id
        layout = cls(
            prefix=codec.prefix_ids or (bos,),
            separator=codec.suffix_ids or (codec.eos_id,),
            length=length,
            overlap=overlap,
            question=question,
        )
        room = length - len(layout.prefix) - 2 * len(layout.separator) - question
        if room < LEAST:
            raise UserError(
                f"rows of {length} tokens with questions of up to {question} leave {max(0, room)} for the context",
                hint="lower answer.question, or give a longer data.context",
            )
        return layout

    def windows(self, question: tuple[int, ...], context: Located) -> list[Window]:
        """Return windows over the context, each further by its room less ``overlap``; the question is truncated."""
        head = (*self.prefix, *question[: self.question], *self.separator)
        room = self.length - len(head) - len(self.separator)
        step = max(1, room - min(self.overlap, room - LEAST // 2))
        windows: list[Window] = []
        for first in range(0, max(1, len(context.ids) - room + step), step):
            part = (*context.ids[first : first + room], *self.separator)
            types = (0,) * len(head) + (1,) * len(part)
            count = len(part) - len(self.separator)
            windows.append(Window(ids=(*head, *part), types=types, at=len(head), first=first, count=count))
        return windows


def pieces_of(context: Located, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token with a character of ``start`` to ``end`` (exclusive); None where none has.

    Tokens are in the order of their text; a token of whitespace alone belongs to no answer.
    """
    first = bisect_right(context.spans, start, key=lambda span: span[1])
    last = bisect_left(context.spans, end, key=lambda span: span[0]) - 1
    while first <= last and context.spans[first][0] == context.spans[first][1]:
        first += 1
    while last >= first and context.spans[last][0] == context.spans[last][1]:
        last -= 1
    return (first, last) if first <= last else None


def text_of(context: Located, first: int, last: int) -> tuple[int, int]:
    """Return the span of characters of tokens ``first`` to ``last``."""
    return context.spans[first][0], max(context.spans[first][0], context.spans[last][1])
