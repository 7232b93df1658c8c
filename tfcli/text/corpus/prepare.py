"""From sources to token shards: scan the text, train a tokenizer on its training part, encode it, write the receipt.

Three passes, each with bounded memory: what is read is checked before anything is written, and shards are found again
by the hash of their text, tokenizer and split.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tfcli import disk
from tfcli.config.options import DataOptions, TokenizerOptions
from tfcli.config.resolve import to_dict
from tfcli.errors import RunError, UserError
from tfcli.text.corpus import encoding
from tfcli.text.corpus.shards import VERSION, Shard, ShardWriter
from tfcli.text.read.files import Counts
from tfcli.text.read.sources import Chunk, Source, find, read, spooling
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.sentencepiece import Tokenizer

Progress = Callable[[str, int, int], None]
"""Told (stage: scan, train or encode; bytes done; bytes in all)."""
Note = Callable[[str], None]

HELD_OUT_BYTES = 500_000
"""The held-out part's size at most, unless its fraction was given."""
BLOCK = 1 << 14
"""Bytes of a block of the tokenizer's sample, about."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Encoded text: what is trained on, what is held out, how it was made and with which tokenizer."""

    train: Shard
    val: Shard
    receipt: dict[str, Any]
    """The content of data.json."""
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one reading of the sources found."""

    sources: list[Source]
    counts: Counts
    bytes: int
    sizes: Sequence[int]
    """UTF-8 bytes of each document."""
    duplicates: int
    """Documents that are equal to an earlier one."""
    content_hash: str


def scan(
    sources: list[Source], options: DataOptions, *, sample: Sample | None = None, on_progress: Progress | None = None
) -> Scan:
    """Read everything once: check it, count it, hash it and fill the tokenizer's sample; 16 bytes of memory a document.

    Raises UserError for bad input, and where there is no text at all.
    """
    counts = Counts()
    content = hashlib.blake2b(digest_size=16)
    document = hashlib.blake2b(digest_size=16)
    sizes, hashes = array("Q"), array("Q")
    total = sum(source.path.stat().st_size for source in sources if source.path.exists())
    done = size = 0
    blank = True
    for chunk in read(sources, options, counts):
        data = chunk.text.encode()
        document.update(data)
        blank = blank and chunk.text.isspace()
        if sample:
            sample.add(done, chunk.text, len(data))
        done += len(data)
        size += len(data)
        if chunk.end:
            digest = document.digest()
            content.update(digest)
            sizes.append(size)
            hashes.append(int.from_bytes(digest[:8], "little"))
            document, size = hashlib.blake2b(digest_size=16), 0
        if on_progress:
            on_progress("scan", done, max(total, done))
    if blank:
        names = ", ".join(source.name for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
        raise UserError(f"there is no text in {names}", hint="empty, or nothing but white space")
    unique = len(np.unique(np.frombuffer(hashes, np.uint64)))
    return Scan(
        sources=sources,
        counts=counts,
        bytes=done,
        sizes=sizes,
        duplicates=len(hashes) - unique,
        content_hash=content.hexdigest(),
    )


@dataclass
class Sample:
    """A fair sample of a text that is read once: blocks, each with the same chance (Vitter's algorithm R, 1985).

    The draw is seeded: the same text gives the same sample. Blocks remember where in the text they begin.
    """

    budget: int
    """Bytes held at most, about."""
    _blocks: list[tuple[int, list[str]]] = field(default_factory=list)
    _open: tuple[int, list[str]] | None = None
    _open_bytes: int = 0
    _seen: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, offset: int, text: str, size: int) -> None:
        """Offer text that begins at byte ``offset`` and has ``size`` bytes."""
        if size < BLOCK:  # small documents share a block
            if self._open is None:
                self._open, self._open_bytes = (offset, []), 0
            self._open[1].append(text)
            self._open_bytes += size
            if self._open_bytes >= BLOCK:
                self._close()
            return
        self._close()
        step = max(1, BLOCK * len(text) // size)
        start = 0
        while start < len(text):
            end = text.find("\n", start + step, start + 2 * step) + 1 or start + 2 * step
            part = text[start:end]
            self._offer((offset, [part]))
            offset += len(part) if size == len(text) else len(part.encode())
            start = end

    def _close(self) -> None:
        if self._open:
            self._offer(self._open)
            self._open = None

    def _offer(self, block: tuple[int, list[str]]) -> None:
        self._seen += 1
        if len(self._blocks) < max(1, self.budget // BLOCK):
            self._blocks.append(block)
            return
        slot = self._random.randrange(self._seen)
        if slot < len(self._blocks):
            self._blocks[slot] = block

    def chunks(self, cut: int) -> Iterator[Chunk]:
        """The sampled text before byte ``cut`` of the whole, in order."""
        self._close()
        for offset, texts in sorted(self._blocks):
            for text in texts:
                data = text.encode()
                if offset + len(data) > cut:
                    text = data[: max(0, cut - offset)].decode("utf-8", "ignore")
                if text:
                    yield Chunk(text, True)
                offset += len(data)


def split_point(sizes: Sequence[int], fraction: float, *, capped: bool) -> int:
    """The byte of the text at which the held-out part begins.

    One document, or too few for ``fraction`` to hold out a whole one, is cut within its text; else the last documents
    are held out. ``capped`` limits the part to HELD_OUT_BYTES.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the held-out fraction is {fraction}", hint="it is at least 0 and below 1")
    ends = np.cumsum(np.asarray(sizes, np.int64))
    total = int(ends[-1])
    last = int(len(sizes) * fraction)
    if len(sizes) == 1 or (not last and fraction):
        cut = int(total * (1 - fraction))
    else:
        cut = int(ends[len(sizes) - last - 1])
    if capped and total - cut > HELD_OUT_BYTES:
        cut = total - HELD_OUT_BYTES
        start = int(np.searchsorted(ends, cut))  # the document that ends at the cut, or behind it
        if ends[start] < total:
            cut = int(ends[start])
    return cut


def prepare(
    specs: Sequence[str],
    *,
    options: DataOptions,
    tokenizer: Tokenizer | TokenizerOptions,
    cache: Path,
    threads: int | None = None,
    vocab_size_for: Callable[[int], int] | None = None,
    explicit_val_fraction: bool = False,
    begin: bool = True,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> Corpus:
    """The text that ``specs`` name as shards under ``cache``, made now or found there from an earlier time.

    A tokenizer is trained on the training part where ``tokenizer`` are options; ``vocab_size_for`` gives its size from
    the bytes of that part. ``begin`` is False for an encoder (see ``encoding``). ``on_note`` is told in a line each
    what a person should know, first what is held out.
    Raises UserError for bad input, RunError where ``cache`` cannot be written.
    """
    note: Note = on_note or (lambda line: None)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the directory {cache} cannot be made: {error.strerror}") from None
    disk.sweep(cache)
    with spooling(cache) as spool:
        sources = find(specs, spool=spool, on_note=note)
        sample = Sample(tokenizer.sample_bytes) if isinstance(tokenizer, TokenizerOptions) else None
        text = scan(sources, options, sample=sample, on_progress=on_progress)
        held = scan(find([options.val], spool=spool, on_note=note), options) if options.val is not None else None
        capped = not explicit_val_fraction
        cut = text.bytes if held else split_point(text.sizes, options.val_fraction, capped=capped)
        if not cut:
            raise UserError("nothing is left to train on", hint="hold out a smaller fraction")
        note(_held_out(text, held, cut))
        size = tokenizer.vocab_size
        if size is None and vocab_size_for is not None:
            size = vocab_size_for(cut)
        key = _key(text, held, cut, tokenizer, size, begin)
        folder = cache / key
        left = found(folder, note)
        if left:
            return _as_read(left, text, held)
        if isinstance(tokenizer, TokenizerOptions):
            assert sample is not None
            tokenizer = training.train(
                sample.chunks(cut),
                tokenizer,
                threads=threads,
                vocab_size=size,
                progress=_stage(on_progress, "train"),
                on_note=note,
            )
        return _make(folder, text, held, cut, options, tokenizer, begin, threads, on_progress)


def _stage(on_progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    report = on_progress
    return lambda done, total: report(stage, done, total)


def _held_out(text: Scan, held: Scan | None, cut: int) -> str:
    if held:
        names = ", ".join(source.name for source in held.sources[:3])
        return f"held out for validation: {names} ({held.bytes:,} bytes)"
    size = text.bytes - cut
    if not size:
        return "held out for validation: nothing"
    ends = np.cumsum(np.asarray(text.sizes, np.int64))
    documents = int((ends > cut).sum())
    whole = bool((ends == cut).any())
    of = f" ({documents} of {len(ends)} documents)" if whole else ""
    return f"held out for validation: the last {size:,} bytes of the text, {size / text.bytes:.1%}{of}"


def _key(
    text: Scan, held: Scan | None, cut: int, tokenizer: Tokenizer | TokenizerOptions, size: int | None, begin: bool
) -> str:
    """What decides the ids and the receipt but for the names of files, as a name for their directory."""
    how = tokenizer.hash if isinstance(tokenizer, Tokenizer) else {**to_dict(tokenizer), "vocab_size": size}
    scans = [text, held] if held else [text]
    read_from = [[one.content_hash, [vars(replace(count, name="")) for count in one.counts.sources]] for one in scans]
    parts = [VERSION, read_from, cut, how, begin]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _as_read(corpus: Corpus, text: Scan, held: Scan | None) -> Corpus:
    """A corpus that was found, with the files in its receipt called as they are now."""
    names = [count.name for one in (text, held) if one for count in one.counts.sources]
    rows = [{**row, "name": name} for row, name in zip(corpus.receipt["sources"], names, strict=True)]
    return replace(corpus, receipt={**corpus.receipt, "sources": rows})


def found(folder: Path, note: Note) -> Corpus | None:
    """The corpus that an earlier time left in ``folder``, None where it is not there whole."""
    if not folder.is_dir():
        return None
    try:
        tokenizer = Tokenizer.load(folder)
        train = Shard.open(folder / "train.bin", tokenizer.hash)
        val = Shard.open(folder / "val.bin", tokenizer.hash)
        train.verify()
        val.verify()
        receipt = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        if not isinstance(receipt, dict) or not isinstance(receipt.get("sources"), list):
            raise ValueError(f"{folder / 'data.json'} is not a receipt")
    except (UserError, OSError, ValueError) as error:
        note(f"encoding the text again: {error}")
        return None
    return Corpus(train=train, val=val, receipt=receipt, tokenizer=tokenizer)


def _make(
    folder: Path,
    text: Scan,
    held: Scan | None,
    cut: int,
    options: DataOptions,
    tokenizer: Tokenizer,
    begin: bool,
    threads: int | None,
    on_progress: Progress | None,
) -> Corpus:
    """Encode the text into ``folder``: shards, tokenizer, and last the receipt."""
    total = text.bytes + (held.bytes if held else 0)
    disk.sweep(folder)
    with (
        ShardWriter(folder / "train.bin", tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size) as train,
        ShardWriter(folder / "val.bin", tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size) as val,
    ):
        progress = _stage(on_progress, "encode")
        encoder = encoding.Encoder(tokenizer, begin=begin, threads=threads, total=total, progress=progress)
        tokens = encoder.run(read(text.sources, options), train, val, cut)
        if held:
            val_tokens = encoder.run(read(held.sources, options), val, val, held.bytes)
        if train.bytes + val.bytes != total:
            raise RunError("the text changed while it was read", hint="run it again when nothing writes to the text")
    scans = [(text, tokens)] + ([(held, val_tokens)] if held else [])
    receipt = _receipt(scans, train, val, encoder, tokenizer)
    try:
        tokenizer.save(folder / "tokenizer.model")
        disk.write(folder / "data.json", (json.dumps(receipt, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}", hint="make room there") from None
    return Corpus(
        train=Shard.open(folder / "train.bin", tokenizer.hash),
        val=Shard.open(folder / "val.bin", tokenizer.hash),
        receipt=receipt,
        tokenizer=tokenizer,
    )


def _receipt(
    scans: Sequence[tuple[Scan, dict[int, int]]],
    train: ShardWriter,
    val: ShardWriter,
    encoder: encoding.Encoder,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """The content of data.json; ``scans`` come with the tokens of each of their sources."""
    rows = [
        {"name": count.name, "bytes": count.bytes, "documents": count.documents, "tokens": numbers.get(index, 0)}
        for one, numbers in scans
        for index, count in enumerate(one.counts.sources)
    ]
    counted = [count for one, _ in scans for count in one.counts.sources]
    tokens = max(1, train.tokens + val.tokens)
    return {
        "sources": rows,
        "bytes": train.bytes + val.bytes,
        "documents": sum(count.documents for count in counted),
        "tokens": train.tokens + val.tokens,
        "train": {"bytes": train.bytes, "documents": train.documents, "tokens": train.tokens},
        "val": {
            "bytes": val.bytes,
            "documents": val.documents,
            "tokens": val.tokens,
            "share": val.bytes / max(1, train.bytes + val.bytes),
            "from": "files" if len(scans) > 1 else "the end of the text",
        },
        "dropped": {
            "empty_documents": sum(count.empty for count in counted),
            "byte_order_marks": sum(count.boms for count in counted),
        },
        "cut": 0,
        "replaced": sum(count.replaced for count in counted),
        "byte_fallback_rate": encoder.byte_tokens / tokens,
        "unknown_rate": encoder.unknown_tokens / tokens,
        "exact_duplicates": sum(one.duplicates for one, _ in scans),
        "content_hash": scans[0][0].content_hash,
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
    }
