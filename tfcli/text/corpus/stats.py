"""Statistics of a tokenizer on a text: bytes per token, byte fallback and unknown pieces, in all and by script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from tfcli.text.corpus.encoding import batches, fallback_pieces, parts
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers.sentencepiece import IntArray, Tokenizer

SCRIPTS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType({
    "Latin": (
        (0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6),
        (0xF8, 0x2AF), (0x1E00, 0x1EFF), (0xA720, 0xA7FF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A),
    ),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0xA640, 0xA69F)),
    "Armenian": ((0x531, 0x58F),),
    "Hebrew": ((0x591, 0x5F4),),
    "Arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)),
    "Devanagari": ((0x900, 0x97F),),
    "Bengali": ((0x980, 0x9FF),),
    "Gurmukhi": ((0xA00, 0xA7F),),
    "Gujarati": ((0xA80, 0xAFF),),
    "Tamil": ((0xB80, 0xBFF),),
    "Telugu": ((0xC00, 0xC7F),),
    "Kannada": ((0xC80, 0xCFF),),
    "Malayalam": ((0xD00, 0xD7F),),
    "Sinhala": ((0xD80, 0xDFF),),
    "Thai": ((0xE01, 0xE7F),),
    "Lao": ((0xE80, 0xEFF),),
    "Tibetan": ((0xF00, 0xFFF),),
    "Myanmar": ((0x1000, 0x109F),),
    "Georgian": ((0x10A0, 0x10FF),),
    "Hangul": ((0x1100, 0x11FF), (0x3131, 0x318E), (0xAC00, 0xD7FF)),
    "Ethiopic": ((0x1200, 0x139F),),
    "Khmer": ((0x1780, 0x17FF),),
    "Mongolian": ((0x1800, 0x18AF),),
    "Han": (
        (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
    ),
    "Hiragana": ((0x3041, 0x309F),),
    "Katakana": ((0x30A1, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D)),
})  # fmt: skip
"""Character ranges of the scripts that most text is written in (Unicode 15, Blocks.txt and Scripts.txt)."""
SHARED = ((0x0, 0x36F), (0x2000, 0x2BFF), (0x3000, 0x303F), (0xFE00, 0xFE6F), (0xFF00, 0xFFFF), (0x1F000, 0x1FAFF),
          (0xE0000, 0xE0FFF))  # fmt: skip
"""Ranges in which characters of no script above are punctuation, digits, marks and signs that all scripts share."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Totals over a text."""

    bytes: int
    documents: int
    tokens: int
    byte_tokens: int
    """Byte pieces of characters without a piece of their own; line breaks and tabs are not counted."""
    unknown_tokens: int
    pieces_used: int
    longest: tuple[str, ...]
    """The longest pieces that occur."""
    scripts: dict[str, tuple[int, int, int]]
    """{script: (bytes, tokens, byte tokens)}, by the first character of a token; {} for a lossy tokenizer."""

    def to_json(self, vocab_size: int) -> dict[str, Any]:
        """Return plain values for --json; rates are shares of the tokens."""
        return {
            "bytes": self.bytes,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes / max(1, self.tokens),
            "byte_fallback_rate": self.byte_tokens / max(1, self.tokens),
            "unknown_rate": self.unknown_tokens / max(1, self.tokens),
            "vocab_size": vocab_size,
            "pieces_used": self.pieces_used,
            "longest_pieces": list(self.longest),
            "scripts": {
                name: {
                    "bytes": size,
                    "tokens": tokens,
                    "bytes_per_token": size / max(1, tokens),
                    "byte_fallback_rate": fallback / max(1, tokens),
                }
                for name, (size, tokens, fallback) in self.scripts.items()
            },
        }


def stats(chunks: Iterable[Chunk], tokenizer: Tokenizer, *, threads: int | None = None, longest: int = 10) -> Stats:
    """Encode ``chunks`` and count; memory is bounded by one batch and the vocabulary."""
    script_of, names = script_table()
    fallback = fallback_pieces(tokenizer)
    spaced = np.array(
        [data.startswith(b" ") and len(data) > 1 for data in map(tokenizer.id_bytes, range(len(fallback)))]
    )
    used = np.zeros(tokenizer.vocab_size, np.int64)
    table = np.zeros((3, len(names)), np.int64)
    total = documents = 0
    for batch in batches(parts(chunks, 0)):
        arrays = tokenizer.encode_arrays(
            [part.text for part in batch], continuing=[not part.begins for part in batch], threads=threads
        )
        for part, ids in zip(batch, arrays, strict=True):
            total += part.bytes
            documents += part.ends
            used += np.bincount(ids, minlength=len(used)) if len(ids) * 8 > len(used) else 0
            if len(ids) * 8 <= len(used):
                np.add.at(used, ids, 1)
            if tokenizer.lossless:
                prefix = " " if tokenizer.dummy_prefix and part.begins else ""
                scripts = _scripts_of(prefix + part.text, ids, tokenizer, spaced, script_of)
                for row, weights in enumerate((tokenizer.piece_bytes[ids], None, fallback[ids])):
                    table[row] += np.bincount(scripts, weights, minlength=len(names)).astype(np.int64)
    order = sorted(
        np.flatnonzero(used).tolist(), key=lambda id: (-len(tokenizer.id_bytes(id).decode(errors="replace")), id)
    )
    ranked = sorted(range(len(names)), key=lambda index: -table[0, index])
    return Stats(
        bytes=total,
        documents=documents,
        tokens=int(used.sum()),
        byte_tokens=int(used[fallback].sum()),
        unknown_tokens=int(used[tokenizer.unk_id]),
        pieces_used=int(np.count_nonzero(used)),
        longest=tuple(tokenizer.piece(id) for id in order[:longest]),
        scripts={
            names[index]: (int(table[0, index]), int(table[1, index]), int(table[2, index]))
            for index in ranked
            if table[1, index]
        },
    )


def script_table() -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Return the script of each character, (0x110000,), as an index into the names returned with it."""
    names = ["Common", "Other", *SCRIPTS]
    script_of = np.full(0x110000, 1, np.uint8)
    for index, ranges in enumerate([SHARED, (), *SCRIPTS.values()]):
        for first, last in ranges:
            script_of[first : last + 1] = index
    return script_of, names


def _scripts_of(
    text: str, ids: IntArray, tokenizer: Tokenizer, spaced: npt.NDArray[np.bool_], script_of: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Return the script of each token: that of its first character after a leading space."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    script_of_byte: npt.NDArray[np.uint8] = np.repeat(script_of[codes], sizes)
    lengths = tokenizer.piece_bytes[ids]
    starts = np.cumsum(lengths) - lengths
    scripts: npt.NDArray[np.uint8] = script_of_byte[starts + spaced[ids]]
    return scripts
