"""From sources to token shards: scan the text, train a tokenizer on its training part, encode it, write its report.

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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tfcli import disk
from tfcli.config.options import HELD_OUT_BYTES, DataOptions, TokenizerOptions
from tfcli.config.resolve import to_dict
from tfcli.errors import RunError, UserError
from tfcli.text.corpus import encoding
from tfcli.text.corpus.shards import VERSION, Shard, ShardWriter
from tfcli.text.data_report import FORM, DataReport, Part, changes_json
from tfcli.text.data_report import Source as SourceReport
from tfcli.text.read.files import Counts, changes
from tfcli.text.read.sources import Chunk, Source, find, read, spooling
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.sentencepiece import Tokenizer

Progress = Callable[[str, int, int], None]
"""Told (stage: scan, train or encode; bytes done; bytes in all)."""
Note = Callable[[str], None]

BLOCK = 1 << 14
"""Bytes of a block of the tokenizer's sample, about."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Encoded text: what is trained on, what is held out, how it was made and with which tokenizer."""

    train: Shard
    val: Shard
    data_report: dict[str, Any]
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
    hashes: npt.NDArray[np.uint64]
    """Of each document."""
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
    return Scan(
        sources=sources,
        counts=counts,
        bytes=done,
        sizes=sizes,
        hashes=np.frombuffer(hashes, np.uint64),
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
    """What decides the ids and the data report but for the names of files, as a name for their directory."""
    how = tokenizer.hash if isinstance(tokenizer, Tokenizer) else {**to_dict(tokenizer), "vocab_size": size}
    scans = [text, held] if held else [text]
    read_from = [
        [one.content_hash, [[c.bytes, c.documents, c.empty, c.replaced, c.boms] for c in one.counts.sources]]
        for one in scans
    ]
    parts = [VERSION, FORM, read_from, cut, how, begin]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _as_read(corpus: Corpus, text: Scan, held: Scan | None) -> Corpus:
    """A corpus that was found, with the files in its data report called as they are now."""
    counts = [count for one in (text, held) if one for count in one.counts.sources]
    rows = [{**row, "name": count.name} for row, count in zip(corpus.data_report["sources"], counts, strict=True)]
    now = {"sources": rows, **changes_json(changes(counts))}
    return replace(corpus, data_report={**corpus.data_report, **now})


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
        data_report = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        if not isinstance(data_report, dict) or not isinstance(data_report.get("sources"), list):
            raise ValueError(f"{folder / 'data.json'} is not a data report")
    except (UserError, OSError, ValueError) as error:
        note(f"encoding the text again: {error}")
        return None
    return Corpus(train=train, val=val, data_report=data_report, tokenizer=tokenizer)


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
    """Encode the text into ``folder``: shards, tokenizer, and last the data report."""
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
    split = {"rule": "given"} if held else {"rule": "end of text", "fraction": (text.bytes - cut) / text.bytes}
    data_report = _data_report(scans, cut, split, train, val, encoder, tokenizer)
    try:
        tokenizer.save(folder / "tokenizer.model")
        disk.write(folder / "data.json", (json.dumps(data_report, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}", hint="make room there") from None
    return Corpus(
        train=Shard.open(folder / "train.bin", tokenizer.hash),
        val=Shard.open(folder / "val.bin", tokenizer.hash),
        data_report=data_report,
        tokenizer=tokenizer,
    )


def _data_report(
    scans: Sequence[tuple[Scan, dict[int, int]]],
    cut: int,
    split: dict[str, Any],
    train: ShardWriter,
    val: ShardWriter,
    encoder: encoding.Encoder,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """The content of data.json; ``scans`` come with the tokens of each of their sources."""
    tokens = max(1, train.tokens + val.tokens)
    within, across = _duplicates(scans[0][0], scans[1][0] if len(scans) > 1 else None, cut)
    return DataReport(
        task="pretrain",
        unit="documents",
        sources=list(_sources(scans, cut)),
        split=split,
        train=Part(documents=train.documents, tokens=train.tokens, bytes=train.bytes),
        val=Part(documents=val.documents, tokens=val.tokens, bytes=val.bytes),
        changes=changes([count for one, _ in scans for count in one.counts.sources]),
        within_train=within,
        across_splits=across,
        byte_fallback_rate=encoder.byte_tokens / tokens,
        unknown_rate=encoder.unknown_tokens / tokens,
        content_hash=scans[0][0].content_hash,
        tokenizer_hash=tokenizer.hash,
        details={"vocab_size": tokenizer.vocab_size},
    ).as_json()


def _sources(scans: Sequence[tuple[Scan, dict[int, int]]], cut: int) -> Iterator[SourceReport]:
    for number, (one, tokens) in enumerate(scans):
        done = 0
        for index, count in enumerate(one.counts.sources):
            done += count.bytes
            part: Literal["train", "val", "both"] = "both"
            if number or done - count.bytes >= cut:
                part = "val"
            elif done <= cut:
                part = "train"
            yield SourceReport(
                name=count.name,
                part=part,
                bytes=count.bytes,
                documents=count.documents,
                tokens=tokens.get(index, 0),
            )


def _duplicates(text: Scan, held: Scan | None, cut: int) -> tuple[int, int]:
    """Documents of the training part that are equal to an earlier one, and held-out ones that are in it too."""
    learnt = len(text.sizes)
    if held is None:  # a document that is cut into two counts as trained on
        learnt = int(np.searchsorted(np.cumsum(np.asarray(text.sizes, np.int64)), cut)) + 1
    train, val = text.hashes[:learnt], text.hashes[learnt:] if held is None else held.hashes
    return len(train) - len(np.unique(train)), int(np.isin(val, train).sum())
