"""Pre-tokenizers, which split text into words before byte-level BPE merges, by their names in GGUF files.

The expressions are those of the models' own tokenizer.json files; llama.cpp knows them by these names
(``tokenizer.ggml.pre``, its src/llama-vocab.cpp).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's."""
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
"""English contractions in either case."""
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
"""Punctuation with the line breaks after it, and whitespace."""
MARKS_O200K = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
LLAMA3 = SHORT + LETTERS + r"\p{N}{1,3}|" + MARKS
QWEN2 = SHORT + LETTERS + r"\p{N}|" + MARKS
QWEN35 = SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CAPITALS, SMALL = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+"
TEKKEN = rf"{SMALL}|{CAPITALS}|\p{{N}}|{MARKS_O200K}"
GPT4O = rf"{SMALL}{SHORT}?|{CAPITALS}{SHORT}?|\p{{N}}{{1,3}}|{MARKS_O200K}"
CASED = (
    "(?![\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8a\u2d00-\u2d2d\ua790-\uab68\U00010570-\U000105bc\U00010d50-\U00010d85"
    "\U00016e40-\U0001e8ff])[\\p{Lu}\\p{Ll}\\p{Lt}]"
)
"""Letters with case, except Armenian, Georgian and those added to Unicode after version 11."""
CJK = "[一-龥\u0800-一가-\ud7ff]+"
DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES
)
SENTENCES = r" ?[^(\s|.,!?…。，、।۔،)]+"
"""Bloom's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreTokenizer:
    """Regular expressions applied in order, each to the parts that the ones before it left.

    ``nfc``: the text is normalized first (llama.cpp skips that). ``whole``: a word that is a piece is not merged from
    its bytes. ``bos``: a text begins with the beginning-of-text id unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    names: tuple[str, ...]
    nfc: bool = False
    whole: bool = False
    bos: bool = False

    def normalizer(self) -> dict[str, Any] | None:
        """Return the normalizer for a tokenizer.json."""
        return {"type": "NFC"} if self.nfc else None

    def pre_tokenizer(self) -> dict[str, Any]:
        """Return the pre-tokenizer for a tokenizer.json."""
        splits = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [*splits, level]}


GPT2 = PreTokenizer(
    names=(
        "gpt-2", "phi-2", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion", "granite-docling", "jina-es",
        "jina-de", "jina-v2-es", "jina-v2-de",
    ),
    patterns=(WORDS,),
)  # fmt: skip
QWEN = PreTokenizer(names=("qwen2", "megrez"), patterns=(QWEN2,), nfc=True)
KNOWN = (
    GPT2,
    PreTokenizer(names=("mpt", "olmo", "modern-bert"), patterns=(WORDS,), nfc=True),
    PreTokenizer(
        names=(
            "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
        ),
        patterns=(LLAMA3,),
        whole=True,
        bos=True,
    ),
    PreTokenizer(names=("glm4", "glm5"), patterns=(LLAMA3,), whole=True),
    PreTokenizer(names=("dbrx", "smaug-bpe", "chatglm-bpe"), patterns=(LLAMA3,)),
    QWEN,
    PreTokenizer(
        names=("deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        patterns=(QWEN2,),
    ),
    PreTokenizer(names=("qwen35",), patterns=(QWEN35,), nfc=True),
    PreTokenizer(
        names=("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        patterns=(r"\p{N}", WORDS),
    ),
    PreTokenizer(names=("tekken",), patterns=(TEKKEN,), whole=True, bos=True),
    PreTokenizer(names=("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), patterns=(GPT4O,)),
    PreTokenizer(
        names=("deepseek-llm",),
        patterns=(r"[\r\n]", rf"\s?(?:{CASED})+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, r"\p{N}+"),
    ),
    PreTokenizer(names=("deepseek-coder",), patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")),
    PreTokenizer(
        names=("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        patterns=(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_WORDS),
    ),
    PreTokenizer(names=("falcon",), patterns=(r"[\p{P}\$\+<=>\^~\|`]+", WORDS, "[0-9][0-9][0-9]")),
    PreTokenizer(names=("default",), patterns=(r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    PreTokenizer(names=("bloom", "poro-chat", "gpt3-finnish"), patterns=(SENTENCES,)),
    PreTokenizer(names=("viking",), patterns=(SENTENCES, r"\p{N}")),
    PreTokenizer(names=("seed-coder",), patterns=(SHORT + LETTERS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES,)),
    PreTokenizer(
        names=("bailingmoe", "bailingmoe2", "llada-moe"),
        patterns=(r"'(?i:[sdmt]|ll|ve|re)" + LETTERS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    PreTokenizer(names=("minicpm5",), patterns=(r"\p{N}{1,3}", SHORT + LETTERS + r"\p{N}+|" + MARKS), whole=True),
)  # fmt: skip


def by_name(name: str) -> PreTokenizer | None:
    """Return the pre-tokenizer that GGUF files call ``name``, None if it is unknown."""
    return next((entry for entry in KNOWN if name in entry.names), None)


def name_of(normalizers: list[dict[str, Any]], pre_tokenizers: list[dict[str, Any]], *, whole: bool) -> str | None:
    """Return the first name with the same expressions as the steps of a tokenizer.json, None if there is none.

    ``whole`` is its model's "ignore_merges".
    """
    if any(step["type"] != "NFC" for step in normalizers):
        return None
    patterns: list[str] = []
    for step in pre_tokenizers:
        match step:
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": pattern}:
                patterns.append(pattern.get("Regex") or re.escape(pattern["String"]))
            case {"type": "Digits", "individual_digits": individual}:
                patterns.append(r"\p{N}" if individual else r"\p{N}+")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex} if step is pre_tokenizers[-1]:
                patterns += [WORDS] * bool(regex)
            case _:
                return None
    same = [entry for entry in KNOWN if entry.patterns == tuple(patterns) and entry.whole == whole]
    same.sort(key=lambda entry: entry.nfc != bool(normalizers))
    return same[0].names[0] if same and pre_tokenizers[-1]["type"] == "ByteLevel" else None
