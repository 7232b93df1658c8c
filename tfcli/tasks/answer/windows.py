"""A question and its context as rows of ids, in overlapping windows where the context is long."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from tfcli.errors import UserError
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.offsets import Located

LEAST = 8
"""Pieces of context that a window must have room for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """``prefix question separator context separator`` as ids; position 0 stands for "no answer".

    Pieces ``first`` to ``first + count`` (not included) of the context are at positions ``at`` and on.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    """0 for the question, 1 for the context, as BERT's segments."""
    at: int
    first: int
    count: int

    def target(self, pieces: tuple[int, int] | None) -> tuple[int, int]:
        """Positions of an answer's first and last piece; (0, 0) where it is not, or not whole, in this window."""
        if pieces is None or pieces[0] < self.first or pieces[1] >= self.first + self.count:
            return 0, 0
        return self.at + pieces[0] - self.first, self.at + pieces[1] - self.first


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How pairs are laid out for one model: the ids around the parts, and lengths in ids.

    ``length`` of a row at most, ``overlap`` of the context shared by neighbouring windows, ``question`` at most.
    """

    prefix: tuple[int, ...]
    separator: tuple[int, ...]
    length: int
    overlap: int = 128
    question: int = 64

    @classmethod
    def of(cls, codec: Codec, *, length: int, overlap: int, question: int) -> Layout:
        """For a model's tokenizer; UserError where a window has no room for context."""
        bos = codec.eos_id if codec.bos_id is None else codec.bos_id
        made = cls(
            prefix=codec.prefix_ids or (bos,),
            separator=codec.suffix_ids or (codec.eos_id,),
            length=length,
            overlap=overlap,
            question=question,
        )
        room = length - len(made.prefix) - 2 * len(made.separator) - question
        if room < LEAST:
            raise UserError(
                f"rows of {length} tokens with questions of up to {question} leave {max(0, room)} for the context",
                hint="lower answer.question, or give a longer data.context",
            )
        return made

    def windows(self, question: tuple[int, ...], context: Located) -> list[Window]:
        """Windows over the context, each further by its room less ``overlap``; the question is cut to its length."""
        head = (*self.prefix, *question[: self.question], *self.separator)
        room = self.length - len(head) - len(self.separator)
        step = max(1, room - min(self.overlap, room - LEAST // 2))
        made: list[Window] = []
        first = 0
        while True:
            part = context.ids[first : first + room]
            made.append(
                Window(
                    ids=(*head, *part, *self.separator),
                    types=(0,) * len(head) + (1,) * (len(part) + len(self.separator)),
                    at=len(head),
                    first=first,
                    count=len(part),
                )
            )
            if first + room >= len(context.ids):
                return made
            first += step


def pieces_of(context: Located, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last piece with a character of ``start`` to ``end`` (not included); None where none has.

    Pieces must lie in the order of their text, as they do; pieces of whitespace alone count to no answer.
    """
    first = bisect_right(context.spans, start, key=lambda span: span[1])
    last = bisect_left(context.spans, end, key=lambda span: span[0]) - 1
    while first <= last and context.spans[first][0] == context.spans[first][1]:
        first += 1
    while last >= first and context.spans[last][0] == context.spans[last][1]:
        last -= 1
    return (first, last) if first <= last else None


def text_of(context: Located, first: int, last: int) -> tuple[int, int]:
    """The characters of pieces ``first`` to ``last``."""
    return context.spans[first][0], max(context.spans[first][0], context.spans[last][1])
