"""Training of a lossless tokenizer, without skipping any line."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tfcli.config.options import DEFAULT_VOCAB_SIZE, TokenizerOptions
from tfcli.errors import UserError, unknown
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers.sentencepiece import MASK, SENTINEL, SPACE, Tokenizer

EOS = "<|endoftext|>"
NUM_BYTES = 256
UNIGRAM_THREADS = 4
"""Unigram training sums float32 counts per thread: a fixed number gives the same pieces on every machine."""
LONGEST = 4096
"""The most characters of a training sentence; SentencePiece's BPE takes words of at most 65535."""
OUR_OPTIONS = {
    "vocab_size": "--vocab-size",
    "model_type": "--type",
    "character_coverage": "--character-coverage",
    "user_defined_symbols": "--user-symbol",
}
ENCODER: Mapping[str, str | int] = {
    "bos_id": 3,
    "bos_piece": "[CLS]",
    "eos_piece": "[SEP]",
    "unk_piece": "[UNK]",
    "pad_piece": "[PAD]",
    "control_symbols": MASK,
}
"""Trainer options for the special pieces of an encoder, named as in BERT."""
NOT_OPTIONS = ("input", "input_format", "model_prefix", "name", "precompiled_charsmap")


def sentinels(count: int) -> dict[str, str]:
    """Return trainer options for ``count`` pieces that stand for masked spans."""
    return {"control_symbols": ",".join(SENTINEL.format(number) for number in range(count))}


def train(
    texts: Iterable[Chunk],
    options: TokenizerOptions,
    *,
    threads: int | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Tokenizer:
    """Train a tokenizer on all of ``texts``, which are held in memory.

    ``vocab_size`` applies if ``options.vocab_size`` is None; it shrinks, with a note, for a text that is too small.
    ``progress`` is called with (characters given to the trainer, all characters). Raises UserError for an unknown
    option, a requested vocabulary size that does not fit the text, and an empty text.
    """
    import sentencepiece

    passed = _passed(options)
    sample = [chunk.text for chunk in texts]
    if not any(text.strip() for text in sample):
        raise UserError("no text to train a tokenizer on", hint="the sample is empty")
    size = vocab_size if options.vocab_size is None else options.vocab_size
    size = DEFAULT_VOCAB_SIZE if size is None else size
    if size < 1:
        raise UserError(f"a vocabulary of {size} pieces cannot be made", hint="give at least 1, in practice hundreds")
    rare, note = _without_piece(sample, size, options)
    if note and on_note:
        on_note(note)
    settings: dict[str, Any] = {
        "model_type": options.type,
        "vocab_size": size,
        "character_coverage": 1.0 if rare else options.character_coverage,
        "user_defined_symbols": [symbol.replace(" ", SPACE) for symbol in options.user_symbols],
        "num_threads": UNIGRAM_THREADS if options.type == "unigram" else threads or 1,
        # Lossless:
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        # For indented text: runs of spaces may become pieces.
        "allow_whitespace_only_pieces": True,
        # Never skip a sentence: those below are short enough.
        "max_sentence_length": 1 << 30,
        "hard_vocab_limit": False,
        "unk_id": 0,
        "eos_id": 1,
        "pad_id": 2,
        "bos_id": -1,
        "eos_piece": EOS,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample, rare, progress), model_writer=model, **{**settings, **passed}
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"SentencePiece cannot train this: {_plain(error)}") from None
    tokenizer = Tokenizer(_without_threads(model.getvalue()))
    if tokenizer.vocab_size < size and not passed.get("hard_vocab_limit"):
        if options.vocab_size is not None:
            raise UserError(
                f"the text is too small for a vocabulary of {size} pieces: it has room for {tokenizer.vocab_size}",
                hint=f"ask for at most {tokenizer.vocab_size}, leave --vocab-size out, or give more text",
            )
        if on_note:
            on_note(f"the vocabulary has {tokenizer.vocab_size} pieces: the text is too small for {size}")
    return tokenizer


def _without_threads(model: bytes) -> bytes:
    """Remove the number of threads from a model, so that its hash depends only on the text and options."""
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    proto = model_pb2.ModelProto.FromString(model)
    proto.trainer_spec.ClearField("num_threads")
    return bytes(proto.SerializeToString(deterministic=True))


def option_names() -> list[str]:
    """Return the names that ``TokenizerOptions.trainer`` takes: SentencePiece's own."""
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    fields = (*model_pb2.TrainerSpec.DESCRIPTOR.fields, *model_pb2.NormalizerSpec.DESCRIPTOR.fields)
    names = {field.name for field in fields} | {"normalization_rule_name"}
    return sorted(names - set(NOT_OPTIONS) - set(OUR_OPTIONS))


def _passed(options: TokenizerOptions) -> dict[str, Any]:
    """Return the trainer options that were set, checked by name."""
    names = option_names()
    for name in options.trainer:
        if name in OUR_OPTIONS:
            raise UserError(f"trainer option {name!r} has its own flag", hint=f"use {OUR_OPTIONS[name]}")
        if name not in names:
            raise unknown("SentencePiece option", name, names)
    for symbol in options.user_symbols:
        if not symbol or symbol in (EOS, "<unk>", "<pad>") or SPACE in symbol:
            hint = "it is empty, already a special piece, or contains U+2581"
            raise UserError(f"{symbol!r} cannot be a user symbol", hint=hint)
    if len(set(options.user_symbols)) < len(options.user_symbols):
        raise UserError("a user symbol is given twice")
    if not 0.98 <= options.character_coverage <= 1:
        raise UserError(f"character coverage is {options.character_coverage}", hint="SentencePiece takes 0.98 to 1")
    return dict(options.trainer)


def _without_piece(sample: Sequence[str], size: int, options: TokenizerOptions) -> tuple[str, str | None]:
    """Return the rarest characters if single characters would take more than three quarters of the pieces, and a note.

    SentencePiece refuses such a vocabulary, or a coverage below 0.98. Characters without a piece are encoded as bytes.
    """
    counts = np.zeros(0x110000, np.int64)
    for text in _grouped(sample):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        counts += np.bincount(codes, minlength=len(counts))
    counts[[ord(char) for char in "\n\t\0 \u2581\u2585"]] = 0
    order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    controls = [name for name in str(options.trainer.get("control_symbols", "")).split(",") if name]
    # <unk>, end of text, <pad>, and the space
    room = size - NUM_BYTES - 3 - len(options.user_symbols) - len(controls) - 1
    if room < 1:
        least = f"256 bytes and the special pieces need at least {size - room + 1}"
        raise UserError(f"a vocabulary of {size} pieces is too small", hint=least)
    share = np.cumsum(counts[order]) / max(1, counts.sum())
    wanted = min(int(np.searchsorted(share, options.character_coverage)) + 1, len(order))
    most = max(1, room * 3 // 4)
    if wanted <= most:
        return "", None
    note = (
        f"{most} of {len(order)} characters ({share[most - 1]:.2%} of the text) have a piece of their own; the others "
        f"are encoded as bytes, because a vocabulary of {size} has no room for them"
    )
    return "".join(map(chr, order[most:])), note


def _grouped(sample: Sequence[str], size: int = 1 << 22) -> Iterator[str]:
    group: list[str] = []
    held = 0
    for text in sample:
        group.append(text)
        held += len(text)
        if held >= size:
            yield "".join(group)
            group, held = [], 0
    yield "".join(group)


def _sentences(sample: Sequence[str], rare: str, progress: Callable[[int, int], None] | None) -> Iterator[str]:
    """Yield the lines of the sample, split at ``rare`` characters too and, if long, before a word."""
    breaks = re.compile(f"[\n\t\0\u2581\u2585{re.escape(rare)}]+")
    # Characters of no piece: U+2581 is SentencePiece's space, U+2585 and the tab are reserved, NUL is skipped.
    total, done = sum(map(len, sample)), 0
    for text in sample:
        for line in breaks.split(text):
            start = 0
            while len(line) - start > LONGEST:
                end = line.rfind(" ", start + 1, start + LONGEST)
                end = end if end > start else start + LONGEST
                yield line[start:end]
                start = end
            if start < len(line):
                yield line[start:]
        done += len(text)
        if progress:
            progress(done, total)


def _plain(error: Exception) -> str:
    """Return SentencePiece's message without the location in its source."""
    return re.sub(r"^[A-Z_]+: (src/\S+ \[.*?\] ?)?", "", str(error)) or str(error)
