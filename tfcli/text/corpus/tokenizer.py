"""The public tokenizer class: trained on files, used on texts, measured on files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tfcli.config.options import DataOptions, TokenizerOptions
from tfcli.errors import UserError
from tfcli.runtime import cpu_threads
from tfcli.text.corpus import prepare
from tfcli.text.corpus.stats import Stats, stats
from tfcli.text.read.sources import find, read, spooling
from tfcli.text.tokenizers import sentencepiece, training

MEASURED_BYTES = 4_000_000
"""The most bytes of the training text that a new tokenizer is measured on."""


class Tokenizer(sentencepiece.Tokenizer):
    """A lossless tokenizer: ``decode(encode(text)) == text`` for every Unicode string.

    ``Tokenizer.load(path)`` loads a tokenizer.model file or that of a model directory, ``Tokenizer.train(corpus)``
    trains a new one. ``encode(text)``, ``encode_batch(texts)`` and ``decode(ids)`` add no beginning or end of text.
    Needs no torch.

    Example:
        >>> import tfcli
        >>> tokenizer = tfcli.Tokenizer.train("corpus.txt", tfcli.TokenizerOptions(vocab_size=400))
        >>> tokenizer.decode(tokenizer.encode("  Füße, 从前\\n")) == "  Füße, 从前\\n"
        True
        >>> tokenizer.save("tokenizer.model")
        >>> tfcli.Tokenizer.load("tokenizer.model").vocab_size
        400
    """

    @classmethod
    def train(
        cls,
        corpus: str | Path | Sequence[str | Path],
        options: TokenizerOptions | None = None,
        *,
        data: DataOptions | None = None,
        threads: int | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Tokenizer:
        """Train a tokenizer on files, directories or globs; see ``train``."""
        return train(corpus, options, data=data, threads=threads, on_note=on_note).tokenizer

    def stats(
        self,
        corpus: str | Path | Sequence[str | Path],
        *,
        data: DataOptions | None = None,
        threads: int | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Stats:
        """Measure how well it fits a text: tokens, byte fallback, scripts. Raises UserError for an empty text."""
        specs = _specs(corpus)
        with spooling() as spool:
            chunks = read(find(specs, spool=spool, on_note=on_note), data or DataOptions())
            result = stats(chunks, self, threads=threads or cpu_threads())
        if not result.bytes:
            raise UserError(f"there is no text in {', '.join(specs)}", hint="expected UTF-8 text")
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A new tokenizer and the text it was trained on."""

    tokenizer: Tokenizer
    bytes: int
    """UTF-8 bytes of the text."""
    documents: int
    bytes_per_token: float
    """Measured on a sample of the text."""


def train(
    corpus: str | Path | Sequence[str | Path],
    options: TokenizerOptions | None = None,
    *,
    data: DataOptions | None = None,
    threads: int | None = None,
    on_note: Callable[[str], None] | None = None,
    on_progress: prepare.Progress | None = None,
) -> Trained:
    """Train a tokenizer on files, directories, globs, hf:NAME:SPLIT or "-", read as ``data`` says.

    A text beyond ``options.sample_bytes`` is sampled, with a fixed seed. ``on_progress`` is called with (scan or train,
    bytes done, bytes in all). Raises UserError for bad input, and for a requested vocabulary that is too large for the
    text.
    """
    options, threads = options or TokenizerOptions(), threads or cpu_threads()
    sample = prepare.Sample(options.sample_bytes)
    with spooling() as spool:
        sources = find(_specs(corpus), spool=spool, on_note=on_note)
        text = prepare.scan(sources, data or DataOptions(), sample=sample, on_progress=on_progress)
        trained = training.train(
            sample.chunks(text.bytes),
            options,
            threads=threads,
            progress=partial(on_progress, "train") if on_progress else None,
            on_note=on_note,
        )
    measured = [chunk.text for chunk in sample.chunks(min(text.bytes, MEASURED_BYTES))]
    tokens = sum(map(len, trained.encode_arrays(measured, threads=threads)))
    return Trained(
        tokenizer=Tokenizer(trained.model_bytes),
        bytes=text.bytes,
        documents=len(text.sizes),
        bytes_per_token=sum(len(each.encode()) for each in measured) / max(1, tokens),
    )


def _specs(corpus: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(spec) for spec in ([corpus] if isinstance(corpus, str | Path) else corpus)]
