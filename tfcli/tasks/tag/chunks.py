"""Words as tokens, and long sentences as overlapping rows: each word is tagged in one of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tfcli.errors import UserError
from tfcli.tasks.tag.words import Span
from tfcli.text.tokenizers.codec import Codec

LEAST = 4
"""Minimum room for tokens in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A row of ids from some words of sentence ``index``.

    ``words`` are those that are tagged here, ``at`` the position of each one's first token, where the model predicts
    its tag (Devlin et al. 2019, 5.3). Others in the row are context. Words without tokens are in no row.
    """

    index: int
    ids: tuple[int, ...]
    words: tuple[int, ...]
    at: tuple[int, ...]


class Cutter:
    """Cuts sentences into rows of at most ``length`` ids; neighbors share about a quarter of them."""

    def __init__(self, codec: Codec, *, length: int) -> None:
        self.codec = codec
        self.before: tuple[int, ...] = tuple(codec.prefix_ids)
        self.after: tuple[int, ...] = tuple(codec.suffix_ids)
        self.room = length - len(self.before) - len(self.after)
        self.without_pieces = 0
        """Words that the tokenizer leaves nothing of."""
        self.cut_words = 0
        """Words with more tokens than fit a row, which are truncated."""
        self.cut: list[int] = []
        """Indices of the sentences that have such words."""
        self.long = 0
        """Sentences in more than one row."""
        if self.room < LEAST:
            raise UserError(f"rows of {length} tokens have no room for words", hint="give a longer data.context")

    def chunks(self, texts: Sequence[tuple[str, Sequence[Span]]]) -> list[Chunk]:
        """Return the rows of sentences, given as texts and the spans of their words."""
        chunks: list[Chunk] = []
        for index, pieces in enumerate(self._pieces(texts)):
            self.without_pieces += sum(not ids for ids in pieces)
            if words := sum(len(ids) > self.room for ids in pieces):
                self.cut_words += words
                self.cut.append(index)
            rows = spans([min(len(ids), self.room) for ids in pieces], room=self.room, overlap=self.room // 4)
            self.long += len(rows) > 1
            chunks += [self._row(index, pieces, *row) for row in rows]
        return chunks

    def _row(self, index: int, pieces: Sequence[Sequence[int]], first: int, last: int, own: int, end: int) -> Chunk:
        ids = list(self.before)
        words, at = [], []
        for word in range(first, last):
            if own <= word < end and pieces[word]:
                words.append(word)
                at.append(len(ids))
            ids += pieces[word][: self.room]
        return Chunk(index=index, ids=(*ids, *self.after), words=tuple(words), at=tuple(at))

    def _pieces(self, texts: Sequence[tuple[str, Sequence[Span]]]) -> list[list[Sequence[int]]]:
        """Return the tokens of every word, with or without a space before it; each different word is encoded once."""
        keys = [
            [(text[start:end] if not start else (" " * text[start - 1].isspace()) + text[start:end], start > 0)
             for start, end in words]
            for text, words in texts
        ]  # fmt: skip
        unique = list(dict.fromkeys(key for row in keys for key in row))
        arrays = self.codec.encode_arrays([text for text, _ in unique], continuing=[behind for _, behind in unique])
        known = {key: ids.tolist() for key, ids in zip(unique, arrays, strict=True)}
        return [[known[key] for key in row] for row in keys]


def spans(lengths: Sequence[int], *, room: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Return (first, last, first own, last own) of rows over words of ``lengths`` tokens, at most ``room`` each.

    Ends are exclusive. Each word is one row's own, with context on both sides where neighboring rows share words.
    """
    rows: list[tuple[int, int]] = []
    first = 0
    while True:
        last, pieces = first, 0
        while last < len(lengths) and pieces + lengths[last] <= room:
            pieces += lengths[last]
            last += 1
        rows.append((first, last))
        if last == len(lengths):
            break
        shared, begin = 0, last
        while begin - 1 > first and shared + lengths[begin - 1] <= min(overlap, room - lengths[last]):
            begin -= 1
            shared += lengths[begin]
        first = begin
    cuts = [0, *((b[0] + a[1]) // 2 for a, b in itertools.pairwise(rows)), len(lengths)]
    return [(*row, cuts[index], cuts[index + 1]) for index, row in enumerate(rows)]
