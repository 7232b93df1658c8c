"""Sources to token shards: scan the text, train a tokenizer on its training split, encode it, write its data report.

Three passes, each with bounded memory: all input is checked before anything is written. Shards are cached by the hash
of their text, tokenizer and split.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from tfcli.text.read.files import Count, Counts, changes
from tfcli.text.read.sources import Chunk, Source, find, read, spooling
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.sentencepiece import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called with (stage: scan, train or encode; bytes done; bytes in all)."""
Note = Callable[[str], None]

BLOCK = 1 << 14
"""Approximate bytes of a block of the tokenizer's sample."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Encoded text: the training and held-out shards, their tokenizer and their data report."""

    train: Shard
    val: Shard
    data_report: dict[str, Any]
    """The content of data.json."""
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The outcome of reading the sources once."""

    sources: list[Source]
    counts: Counts
    bytes: int
    sizes: Sequence[int]
    """UTF-8 bytes of each document."""
    hashes: npt.NDArray[np.uint64]
    """A hash of each document."""
    content_hash: str

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """The byte at which each document ends, (documents,)."""
        return np.cumsum(np.asarray(self.sizes, np.int64))


def scan(
    sources: list[Source], options: DataOptions, *, sample: Sample | None = None, on_progress: Progress | None = None
) -> Scan:
    """Read everything once to check, count and hash it and fill the tokenizer's sample; takes 16 bytes a document.

    Raises UserError for bad input, and if there is no text at all.
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
        raise UserError(f"there is no text in {names}", hint="it is empty or only whitespace")
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
    """A uniform sample of blocks of a text that is read once (Vitter's algorithm R, 1985).

    The draw is seeded: the same text gives the same sample. Blocks keep their offset in the text.
    """

    budget: int
    """Approximate most bytes held."""
    _blocks: list[tuple[int, list[str]]] = field(default_factory=list)
    _open: tuple[int, list[str]] | None = None
    _open_bytes: int = 0
    _seen: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, offset: int, text: str, size: int) -> None:
        """Offer text of ``size`` bytes that begins at byte ``offset``."""
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
        """Yield the sampled text before byte ``cut`` of the whole, in order."""
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
    """Return the byte of the text at which the held-out split begins.

    The last documents are held out; a single document, or too few for ``fraction`` to hold out a whole one, are split
    within the text. ``capped`` limits the split to HELD_OUT_BYTES.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the held-out fraction is {fraction}", hint="give at least 0 and less than 1")
    ends = np.cumsum(np.asarray(sizes, np.int64))
    total = int(ends[-1])
    last = int(len(sizes) * fraction)
    if len(sizes) == 1 or (not last and fraction):
        cut = int(total * (1 - fraction))
    else:
        cut = int(ends[len(sizes) - last - 1])
    if capped and total - cut > HELD_OUT_BYTES:
        cut = total - HELD_OUT_BYTES
        start = int(np.searchsorted(ends, cut))  # the document that ends at the cut or after it
        if ends[start] < total:
            cut = int(ends[start])
    return cut


@dataclass(frozen=True, kw_only=True)
class _Split:
    """A scanned text and its held-out split: the text ``held``, or else the text from byte ``cut`` on."""

    text: Scan
    held: Scan | None
    cut: int

    @property
    def scans(self) -> list[Scan]:
        return [self.text, self.held] if self.held else [self.text]

    @property
    def counts(self) -> list[Count]:
        return [count for one in self.scans for count in one.counts.sources]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.scans)

    def note(self) -> str:
        """Describe the held-out split in words."""
        if self.held:
            names = ", ".join(source.name for source in self.held.sources[:3])
            return f"held out for validation: {names} ({self.held.bytes:,} bytes)"
        size, ends = self.text.bytes - self.cut, self.text.ends
        if not size:
            return "held out for validation: nothing"
        of = f" ({(ends > self.cut).sum()} of {len(ends)} documents)" if (ends == self.cut).any() else ""
        return f"held out for validation: the last {size:,} bytes of the text, {size / self.text.bytes:.1%}{of}"

    def rule(self) -> dict[str, Any]:
        """Return the rule of the split for data.json."""
        if self.held:
            return {"rule": "given"}
        return {"rule": "end of text", "fraction": (self.text.bytes - self.cut) / self.text.bytes}

    def sources(self, tokens: Sequence[dict[int, int]]) -> Iterator[SourceReport]:
        """Yield the report of each source; ``tokens`` holds {index: tokens} for each scan."""
        for number, one in enumerate(self.scans):
            done = 0
            for index, count in enumerate(one.counts.sources):
                done += count.bytes
                part: Literal["train", "val", "both"] = "both"
                if number or done - count.bytes >= self.cut:
                    part = "val"
                elif done <= self.cut:
                    part = "train"
                yield SourceReport(
                    name=count.name,
                    part=part,
                    bytes=count.bytes,
                    documents=count.documents,
                    tokens=tokens[number].get(index, 0),
                )

    def duplicates(self) -> tuple[int, int]:
        """Count training documents equal to an earlier one, and held-out documents that are also trained on."""
        if self.held:
            train, val = self.text.hashes, self.held.hashes
        else:  # a document that is split in two counts as trained on
            trained = int(np.searchsorted(self.text.ends, self.cut)) + 1
            train, val = self.text.hashes[:trained], self.text.hashes[trained:]
        return len(train) - len(np.unique(train)), int(np.isin(val, train).sum())


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
    """Encode the text that ``specs`` name into shards under ``cache``, or find those of an earlier call there.

    A tokenizer is trained on the training split where ``tokenizer`` are options; ``vocab_size_for`` gives its size from
    the bytes of that split. ``begin`` is False for an encoder (see ``encoding``). ``on_note`` is called with one line
    for each thing the user should know, first the held-out split. Raises UserError for bad input, RunError if ``cache``
    cannot be written.
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
        split = _Split(text=text, held=held, cut=cut)
        note(split.note())
        size = tokenizer.vocab_size
        if size is None and vocab_size_for is not None:
            size = vocab_size_for(cut)
        folder = cache / _key(split, tokenizer, size, begin)
        if earlier := cached(folder, note):
            return _renamed(earlier, split)
        if isinstance(tokenizer, TokenizerOptions):
            assert sample is not None
            progress = partial(on_progress, "train") if on_progress else None
            tokenizer = training.train(
                sample.chunks(cut), tokenizer, threads=threads, vocab_size=size, progress=progress, on_note=note
            )
        progress = partial(on_progress, "encode") if on_progress else None
        encoder = encoding.Encoder(
            tokenizer=tokenizer, begin=begin, threads=threads, total=split.bytes, progress=progress
        )
        return _make(folder, split, options, encoder)


def _key(split: _Split, tokenizer: Tokenizer | TokenizerOptions, size: int | None, begin: bool) -> str:
    """Hash everything that determines the ids and the data report, except the names of files."""
    how = tokenizer.hash if isinstance(tokenizer, Tokenizer) else {**to_dict(tokenizer), "vocab_size": size}
    read_from = [
        [one.content_hash, [[c.bytes, c.documents, c.empty, c.replaced, c.boms] for c in one.counts.sources]]
        for one in split.scans
    ]
    parts = [VERSION, FORM, read_from, split.cut, how, begin]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _renamed(corpus: Corpus, split: _Split) -> Corpus:
    """Return a cached corpus with the current names of the files in its data report."""
    rows = [{**row, "name": count.name} for row, count in zip(corpus.data_report["sources"], split.counts, strict=True)]
    now = {"sources": rows, **changes_json(changes(split.counts))}
    return replace(corpus, data_report={**corpus.data_report, **now})


def cached(folder: Path, note: Note) -> Corpus | None:
    """Return the corpus that an earlier call left in ``folder``, None if it is incomplete."""
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


def _make(folder: Path, split: _Split, options: DataOptions, encoder: encoding.Encoder) -> Corpus:
    """Encode the text into ``folder``: shards, tokenizer, and last the data report."""
    tokenizer = encoder.tokenizer
    writer = partial(ShardWriter, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size)
    disk.sweep(folder)
    with writer(folder / "train.bin") as train, writer(folder / "val.bin") as val:
        tokens = [encoder.run(read(split.text.sources, options), train, val, split.cut)]
        if split.held:
            tokens.append(encoder.run(read(split.held.sources, options), val, val, split.held.bytes))
        if train.bytes + val.bytes != split.bytes:
            raise RunError("the text changed while it was read", hint="run it again when nothing writes to the text")
    total = max(1, train.tokens + val.tokens)
    within, across = split.duplicates()
    data_report = DataReport(
        task="pretrain",
        unit="documents",
        sources=list(split.sources(tokens)),
        split=split.rule(),
        train=Part(documents=train.documents, tokens=train.tokens, bytes=train.bytes),
        val=Part(documents=val.documents, tokens=val.tokens, bytes=val.bytes),
        changes=changes(split.counts),
        within_train=within,
        across_splits=across,
        byte_fallback_rate=encoder.byte_tokens / total,
        unknown_rate=encoder.unknown_tokens / total,
        content_hash=split.text.content_hash,
        tokenizer_hash=tokenizer.hash,
        details={"vocab_size": tokenizer.vocab_size},
    ).as_json()
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
