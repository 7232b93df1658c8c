"""A SentencePiece model written as Hugging Face's ``tokenizer.json``: the same ids for the same text.

transformers 5 reads that file and not a bare ``tokenizer.model``. One corner case differs: U+2581 in a text, which
SentencePiece's form cannot distinguish from a space (tfcli encodes it as its bytes).
"""

from __future__ import annotations

import base64
from typing import Any

from tfcli.errors import UserError
from tfcli.text.tokenizers.sentencepiece import BYTE, CONTROL, MASK, SPACE, UNKNOWN, USER_DEFINED, Tokenizer

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
HIDDEN = (UNKNOWN, CONTROL, BYTE)
"""Types of pieces whose names are not matched in a text."""


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``. Raises UserError for a model that is neither BPE nor unigram."""
    proto = tokenizer.proto()
    kind = proto.trainer_spec.model_type
    if kind not in (UNIGRAM, BPE):
        raise UserError("only BPE and unigram SentencePiece models can be written as tokenizer.json")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto),
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": _apart(proto) if kind == UNIGRAM and proto.trainer_spec.byte_fallback else None,
        "post_processor": _around(tokenizer),
        "decoder": _decoder(proto.normalizer_spec),
        "model": _bpe(proto, tokenizer.unk_id) if kind == BPE else _unigram(proto, tokenizer.unk_id),
    }


def _around(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the post-processor that adds the ids before and after every text."""
    around = {id: tokenizer.piece(id) for id in (*tokenizer.prefix_ids, *tokenizer.suffix_ids)}
    if not around:
        return None

    def special(ids: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": around[id], "type_id": 0}} for id in ids]

    whole = [*special(tokenizer.prefix_ids), {"Sequence": {"id": "A", "type_id": 0}}, *special(tokenizer.suffix_ids)]
    return {
        "type": "TemplateProcessing",
        "single": whole,
        "pair": [*whole, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {piece: {"id": piece, "ids": [id], "tokens": [piece]} for id, piece in around.items()},
    }


def _added_tokens(proto: Any) -> list[dict[str, Any]]:
    """Return the special control pieces and the user symbols, which are matched before anything else.

    SentencePiece never matches a symbol with a space: by then the text has U+2581 there.
    """
    return [
        {
            "id": id,
            "content": piece.piece,
            "single_word": False,
            "lstrip": piece.piece == MASK and piece.type == CONTROL,
            "rstrip": False,
            "normalized": piece.type == USER_DEFINED,
            "special": piece.type != USER_DEFINED,
        }
        for id, piece in enumerate(proto.pieces)
        if piece.type in (UNKNOWN, CONTROL) or (piece.type == USER_DEFINED and " " not in piece.piece)
    ]


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bpe(proto: Any, unk_id: int) -> dict[str, Any]:
    pieces = list(proto.pieces)
    skipped = {piece.piece for piece in pieces if piece.type in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)}
    vocab = {piece.piece: id for id, piece in enumerate(pieces)}
    ordinary = vocab.keys() - skipped
    merges: list[tuple[str, str]] = []
    # SentencePiece joins the pair whose piece has the highest score, the leftmost first.
    for piece in sorted((p for p in pieces if p.piece in ordinary), key=lambda p: -p.score):
        text = piece.piece
        cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
        merges += [pair for pair in cuts if pair[0] in ordinary and pair[1] in ordinary]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [list(pair) for pair in merges],
    }


def _unigram(proto: Any, unk_id: int) -> dict[str, Any]:
    pieces = list(proto.pieces)
    ordinary = [piece.score for piece in pieces if piece.type not in (*HIDDEN, USER_DEFINED)]
    # The library would match control and byte pieces in literal text ("<0x41>"): they get a score that never wins
    # against the pieces of their characters.
    never = 100.0 * min(ordinary, default=-1.0) - 100.0
    return {
        "type": "Unigram",
        "unk_id": unk_id,
        "vocab": [[piece.piece, never if piece.type in HIDDEN else piece.score] for piece in pieces],
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
    }


def _apart(proto: Any) -> dict[str, Any] | None:
    """Return a pre-tokenizer that isolates characters of the names of control and byte pieces in no ordinary piece.

    No piece joins them to others, so the only effect is that the names are not matched in literal text.
    """
    named = set("".join(piece.piece for piece in proto.pieces if piece.type in HIDDEN))
    named -= set("".join(piece.piece for piece in proto.pieces if piece.type not in (*HIDDEN, USER_DEFINED)))
    if not named:
        return None
    pattern = "[" + "".join("\\" + char if not char.isalnum() else char for char in sorted(named)) + "]"
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
