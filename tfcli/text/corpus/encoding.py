"""Documents to ids at full speed: large batches, all threads, reading while the tokenizer works.

This module alone decides where beginnings and ends of text go; training, evaluation and compression use it. The
documents of a stream are concatenated, each followed by the end-of-text id, the last one too. If a model's texts begin
with ids of their own (``Codec.prefix_ids``), they precede each document but the first, since a stream is read after
``Codec.first_id``. An encoder reads windows that have such ids around them, so its stream has none (``begin=False``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tfcli.text.corpus.shards import ShardWriter
from tfcli.text.read.sources import Chunk, utf8_length
from tfcli.text.tokenizers.codec import Codec, IntArray
from tfcli.text.tokenizers.sentencepiece import Tokenizer

BATCH = 1 << 22
"""Approximate characters of text encoded in one call."""
NOWHERE = 1 << 62
"""The cut of a text without held-out data."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a document on its way to a shard."""

    text: str
    bytes: int
    begins: bool
    """True if the document begins here in its shard."""
    ends: bool
    """True if the end-of-text id follows."""
    held_out: bool
    source: int


def parts(chunks: Iterable[Chunk], cut: int) -> Iterator[Part]:
    """Yield the chunks, split at byte ``cut`` of the text, or just before it if that is within a character."""
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
    """Group parts until they have about BATCH characters."""
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


def joined(
    items: Iterable[Part], codec: Codec, *, begin: bool, threads: int | None = None
) -> Iterator[list[tuple[Part, list[IntArray]]]]:
    """Yield batches of parts, each with the arrays of ids that it adds to its stream: beginning, text and end.

    There are two streams, held out and not. ``begin`` is False for an encoder. While a batch is tokenized, the caller
    has the one before it and the next one is read.
    """
    before, after = np.array(codec.prefix_ids, np.int32), np.array([codec.eos_id], np.int32)
    begun: set[bool] = set()

    def encoded(batch: list[Part]) -> list[tuple[Part, list[IntArray]]]:
        texts, continuing = [part.text for part in batch], [not part.begins for part in batch]
        results: list[tuple[Part, list[IntArray]]] = []
        for part, ids in zip(batch, codec.encode_arrays(texts, continuing=continuing, threads=threads), strict=True):
            arrays = [before, ids] if begin and len(before) and part.begins and part.held_out in begun else [ids]
            results.append((part, [*arrays, after] if part.ends else arrays))
            begun.add(part.held_out)
        return results

    waiting = None
    with ThreadPoolExecutor(1) as pool:  # SentencePiece releases the GIL: reading goes on meanwhile
        for batch in batches(items):
            future = pool.submit(encoded, batch)
            if waiting:
                yield waiting.result()
            waiting = future
        if waiting:
            yield waiting.result()


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Documents as one stream of ids (N,), the number of ids of each, and the UTF-8 bytes of their text."""

    ids: IntArray
    lengths: list[int]
    bytes: int

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.lengths)


def encode(
    chunks: Iterable[Chunk], codec: Codec, *, begin: bool, threads: int | None = None, file: Path | None = None
) -> Encoded:
    """Encode all documents of ``chunks``, in memory or memory-mapped in a new ``file``; see ``joined``."""
    tokens = size = 0
    lengths: list[int] = []
    held: list[IntArray] = []
    with nullcontext() if file is None else file.open("wb") as out:
        for batch in joined(parts(chunks, NOWHERE), codec, begin=begin, threads=threads):
            for part, arrays in batch:
                held += arrays
                tokens += sum(map(len, arrays))
                size += part.bytes
                if part.ends:
                    lengths.append(tokens)
                    tokens = 0
            if out is not None and held:
                out.write(np.concatenate(held).tobytes())
                held = []
    if file is not None and size:
        return Encoded(ids=np.memmap(file, np.int32, mode="r"), lengths=lengths, bytes=size)
    ids = np.concatenate(held) if held else np.empty(0, np.int32)
    return Encoded(ids=ids, lengths=lengths, bytes=size)


@dataclass(kw_only=True, slots=True)
class Encoder:
    """Encodes documents into shards and counts what the data report needs.

    ``byte_tokens`` counts single-byte pieces other than line breaks and tabs, ``unknown_tokens`` the unknown piece.
    ``progress`` is called with (bytes done, ``total``).
    """

    tokenizer: Tokenizer
    begin: bool
    threads: int | None
    total: int
    progress: Callable[[int, int], None] | None
    done: int = 0
    byte_tokens: int = 0
    unknown_tokens: int = 0

    def run(self, chunks: Iterable[Chunk], train: ShardWriter, val: ShardWriter, cut: int) -> dict[int, int]:
        """Encode what is before byte ``cut`` into ``train`` and the rest into ``val``; return the tokens per source."""
        tokens: dict[int, int] = {}
        fallback = fallback_pieces(self.tokenizer)
        for batch in joined(parts(chunks, cut), self.tokenizer, begin=self.begin, threads=self.threads):
            for held_out, writer in ((False, train), (True, val)):
                arrays: list[IntArray] = []
                for part, of_part in batch:
                    if part.held_out == held_out:
                        arrays += of_part
                        tokens[part.source] = tokens.get(part.source, 0) + sum(map(len, of_part))
                        writer.count(documents=int(part.begins), bytes=part.bytes)
                        self.done += part.bytes
                if arrays:
                    ids = np.concatenate(arrays)
                    self.byte_tokens += int(np.count_nonzero(fallback[ids]))
                    self.unknown_tokens += int(np.count_nonzero(ids == self.tokenizer.unk_id))
                    writer.write(ids)
            if self.progress:
                self.progress(self.done, self.total)
        return tokens


def fallback_pieces(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Return which pieces (V,) are single bytes of characters without a piece; line breaks and tabs are not counted."""
    fallback = tokenizer.is_byte.copy()
    for id in tokenizer.byte_ids:
        if tokenizer.id_bytes(id) in (b"\n", b"\r", b"\t"):
            fallback[id] = False
    return fallback
