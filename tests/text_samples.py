"""Made-up text, and tokenizers trained on it."""

from __future__ import annotations

import random

from tfcli.config.options import TokenizerOptions
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers.sentencepiece import Tokenizer
from tfcli.text.tokenizers.training import train

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "was",
    "he",
    "for",
    "with",
    "as",
    "his",
    "they",
    "this",
    "from",
    "have",
]


def prose(lines: int, seed: int = 0) -> str:
    """Lines of made-up prose, some empty, some indented, some with accents."""
    draw = random.Random(seed)
    made = []
    for number in range(lines):
        words = [draw.choice(WORDS) + draw.choice(("", "", "s", "ing", "é", "'s")) for _ in range(draw.randrange(12))]
        made.append("    " * (number % 7 == 0) + " ".join(words).capitalize() + draw.choice((".", "!", ",", "", " 42")))
    return "\n".join(made) + "\n"


def trained(kind: str, **settings: object) -> Tokenizer:
    options = TokenizerOptions(type=kind, **settings)  # type: ignore[arg-type]
    return train([Chunk(prose(2000), True)], options, threads=1, vocab_size=400)
