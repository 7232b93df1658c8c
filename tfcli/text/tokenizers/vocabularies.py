"""Vocabularies of other formats as the ``tokenizer.json`` that gives the same ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfcli.text.tokenizers.pretokenizers import PreTokenizer

CLS, SEP, PAD, UNK, MASK = "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"
"""BERT's special pieces."""


def added_token(piece: str, id: int, *, special: bool) -> dict[str, Any]:
    """Return an added token: it is matched before all other pieces, a special one only on request."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": piece, **flags, "special": special}


def byte_level(
    vocab: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    rules: PreTokenizer,
    *,
    added: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return a byte-level BPE like GPT-2's (Radford et al. 2019)."""
    return {
        **_head(added),
        "normalizer": rules.normalizer(),
        "pre_tokenizer": rules.pre_tokenizer(),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules.whole,
            "vocab": dict(vocab),
            "merges": list(merges),
        },
    }


def word_piece(
    vocab: Mapping[str, int],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese_apart: bool = True,
    unk: str = UNK,
    cls: str = CLS,
    sep: str = SEP,
    added: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return a WordPiece like BERT's (Devlin et al. 2019); texts get [CLS] and [SEP] if the vocabulary has them."""
    ends = None
    if cls in vocab and sep in vocab:
        single = [_step("SpecialToken", cls), _step("Sequence", "A"), _step("SpecialToken", sep)]
        ends = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, _step("Sequence", "B", 1), _step("SpecialToken", sep, 1)],
            "special_tokens": {piece: {"id": piece, "ids": [vocab[piece]], "tokens": [piece]} for piece in (cls, sep)},
        }
    return {
        **_head(added),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": chinese_apart,
            "strip_accents": strip_accents,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": ends,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unk,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": dict(vocab),
        },
    }


def _head(added: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added)}


def _step(kind: str, id: str, type_id: int = 0) -> dict[str, Any]:
    return {kind: {"id": id, "type_id": type_id}}
