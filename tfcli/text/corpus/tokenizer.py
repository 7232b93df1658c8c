"""The tokenizer as the library has it: trained on files, used on texts, measured on files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tfcli.config.options import DataOptions, TokenizerOptions
from tfcli.errors import UserError
from tfcli.runtime import cpu_threads
from tfcli.text.corpus import prepare
from tfcli.text.corpus.stats import Stats, stats
from tfcli.text.read.sources import find, read, spooling
from tfcli.text.tokenizers import sentencepiece, training

MEASURED_BYTES = 4_000_000
"""Bytes of the training text that a new tokenizer is measured on at most."""


class Tokenizer(sentencepiece.Tokenizer):
    """Text to ids and back without loss: ``decode(encode(text)) == text`` for every Unicode string.

    ``Tokenizer.load(path)`` is the one of a tokenizer.model file or a model directory, ``Tokenizer.train(corpus)`` a
    new one. ``encode(text)`` gives ids, ``encode_batch(texts)`` those of several texts, ``decode(ids)`` the text; none
    adds a beginning or end of text. Needs no torch.

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
        """A tokenizer trained on files, directories or globs; see ``train``."""
        return train(corpus, options, data=data, threads=threads, on_note=on_note).tokenizer

    def stats(
        self,
        corpus: str | Path | Sequence[str | Path],
        *,
        data: DataOptions | None = None,
        threads: int | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Stats:
        """How well it fits a text: tokens, byte fallback, and each script's share. Raises UserError for no text."""
        specs = _specs(corpus)
        with spooling() as spool:
            chunks = read(find(specs, spool=spool, on_note=on_note), data or DataOptions())
            result = stats(chunks, self, threads=threads or cpu_threads())
        if not result.bytes:
            raise UserError(f"there is no text in {', '.join(specs)}", hint="expected UTF-8 text")
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A new tokenizer, and the text that it was trained on."""

    tokenizer: Tokenizer
    bytes: int
    """Of the text's UTF-8 form."""
    documents: int
    bytes_per_token: float
    """On a sample of the text."""


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

    Of a text beyond ``options.sample_bytes`` a sample is taken, the same one every time. ``on_progress`` is told (scan
    or train, bytes done, bytes in all). Raises UserError for bad input, and for a vocabulary that was asked for and
    that the text has no room for.
    """
    options, threads = options or TokenizerOptions(), threads or cpu_threads()
    sample = prepare.Sample(options.sample_bytes)
    with spooling() as spool:
        sources = find(_specs(corpus), spool=spool, on_note=on_note)
        text = prepare.scan(sources, data or DataOptions(), sample=sample, on_progress=on_progress)
        made = training.train(
            sample.chunks(text.bytes),
            options,
            threads=threads,
            progress=None if on_progress is None else lambda done, total: on_progress("train", done, total),
            on_note=on_note,
        )
    measured = [chunk.text for chunk in sample.chunks(min(text.bytes, MEASURED_BYTES))]
    tokens = sum(map(len, made.encode_arrays(measured, threads=threads)))
    return Trained(
        tokenizer=Tokenizer(made.model_bytes),
        bytes=text.bytes,
        documents=len(text.sizes),
        bytes_per_token=sum(len(each.encode()) for each in measured) / max(1, tokens),
    )


def _specs(corpus: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(spec) for spec in ([corpus] if isinstance(corpus, str | Path) else corpus)]
