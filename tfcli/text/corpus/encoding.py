"""Encoding a stream of documents at full speed: large batches, all threads, reading while the tokenizer works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tfcli.text.corpus.shards import ShardWriter
from tfcli.text.read.sources import Chunk, utf8_length
from tfcli.text.tokenizers.sentencepiece import IntArray, Tokenizer

BATCH = 1 << 22
"""Characters of text that are encoded in one call, about."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a document on its way to a shard."""

    text: str
    bytes: int
    begins: bool
    """Whether the document begins here in its shard."""
    ends: bool
    """Whether the end-of-text id follows."""
    held_out: bool
    source: int


def parts(chunks: Iterable[Chunk], cut: int) -> Iterator[Part]:
    """The chunks, cut into two at byte ``cut`` of the text, or just before it where that is within a character."""
    done = 0
    begins = True
    for chunk in chunks:
        size = utf8_length(chunk.text)
        if done < cut < done + size:
            data = chunk.text.encode()
            at = cut - done
            while at and data[at] & 0xC0 == 0x80:
                at -= 1
            head = data[:at].decode()
            if head:
                yield Part(head, at, begins, False, False, chunk.source)
            yield Part(chunk.text[len(head) :], size - at, True, chunk.end, True, chunk.source)
        else:
            held_out = done >= cut
            yield Part(chunk.text, size, begins or done == cut, chunk.end, held_out, chunk.source)
        begins = chunk.end
        done += size


def batches(items: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts together until they have about BATCH characters."""
    batch: list[Part] = []
    held = 0
    for item in items:
        batch.append(item)
        held += len(item.text) + 64  # a short document costs something as well
        if held >= BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class Encoder:
    """Encodes documents into shards and counts what the data report needs.

    ``byte_tokens`` counts single-byte pieces other than line breaks and tabs, ``unknown_tokens`` the unknown piece.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, threads: int | None, total: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self._tokenizer = tokenizer
        self._threads = threads
        self._total = total
        self._progress = progress
        self._done = 0
        self._is_fallback = fallback_pieces(tokenizer)
        self._eos = np.array([tokenizer.eos_id], np.int32)
        self.byte_tokens = 0
        self.unknown_tokens = 0

    def run(self, chunks: Iterable[Chunk], train: ShardWriter, val: ShardWriter, cut: int) -> dict[int, int]:
        """Encode ``chunks``: before byte ``cut`` into ``train``, the rest into ``val``; the tokens of each source."""
        tokens: dict[int, int] = {}
        waiting: tuple[list[Part], Future[list[IntArray]]] | None = None
        with ThreadPoolExecutor(1) as pool:  # SentencePiece lets go of the interpreter: reading goes on meanwhile
            for batch in batches(parts(chunks, cut)):
                future = pool.submit(self._encode, batch)
                if waiting:
                    self._write(*waiting, train, val, tokens)
                waiting = batch, future
            if waiting:
                self._write(*waiting, train, val, tokens)
        return tokens

    def _encode(self, batch: list[Part]) -> list[IntArray]:
        return self._tokenizer.encode_arrays(
            [part.text for part in batch], continuing=[not part.begins for part in batch], threads=self._threads
        )

    def _write(
        self,
        batch: list[Part],
        future: Future[list[IntArray]],
        train: ShardWriter,
        val: ShardWriter,
        tokens: dict[int, int],
    ) -> None:
        for held_out, writer in ((False, train), (True, val)):
            arrays: list[IntArray] = []
            for part, ids in zip(batch, future.result(), strict=True):
                if part.held_out != held_out:
                    continue
                arrays.append(ids)
                if part.ends:
                    arrays.append(self._eos)
                tokens[part.source] = tokens.get(part.source, 0) + len(ids) + part.ends
                writer.count(documents=int(part.begins), bytes=part.bytes)
                self._done += part.bytes
            if arrays:
                ids = np.concatenate(arrays)
                self.byte_tokens += int(np.count_nonzero(self._is_fallback[ids]))
                self.unknown_tokens += int(np.count_nonzero(ids == self._tokenizer.unk_id))
                writer.write(ids)
        if self._progress:
            self._progress(self._done, self._total)


def fallback_pieces(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """[V] whether a piece is a byte of a character that has no piece; line breaks and tabs are not counted."""
    fallback = tokenizer.is_byte.copy()
    for id in tokenizer.byte_ids:
        if tokenizer.id_bytes(id) in (b"\n", b"\r", b"\t"):
            fallback[id] = False
    return fallback
