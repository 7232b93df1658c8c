"""A tokenizer written as GGUF metadata, so that llama.cpp gives the same ids: the inverse of ``vocab``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tfcli.errors import UserError
from tfcli.formats.gguf.vocab import ENDS, PREFIX
from tfcli.formats.hf.tokenizer_json import BPE, UNIGRAM
from tfcli.text.tokenizers import pretokenizers
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer
from tfcli.text.tokenizers.json_parts import part, steps
from tfcli.text.tokenizers.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer

NEVER = -1e6
"""The score of a piece that no merge produces."""


def to_gguf(codec: Codec, *, vocab_size: int | None = None) -> dict[str, Any]:
    """Return the metadata ``tokenizer.*`` of a tokenizer: plain Python values, numpy arrays where a type matters.

    ``vocab_size`` is the number of the model's ids, to which the vocabulary is padded. SentencePiece BPE becomes
    "llama", SentencePiece unigram "t5", byte-level BPE "gpt2" and BPE with byte fallback "llama". Raises UserError for
    a tokenizer without an equivalent in llama.cpp; ``differences`` lists what is not exact.
    """
    if isinstance(codec, Tokenizer):
        described = _sentencepiece(codec)
    elif isinstance(codec, JsonTokenizer):
        described = _json(codec)
    else:
        raise _refusal(codec, "it is neither a SentencePiece model nor a tokenizer.json")
    _fill_up(described, vocab_size or codec.vocab_size, codec)
    named = {f"{PREFIX}{key}": value for key, value in (described | _roles(codec)).items() if value is not None}
    return named | ({"tokenizer.chat_template": codec.chat_template} if codec.chat_template else {})


def differences(codec: Codec) -> list[str]:
    """Return how llama.cpp differs with the vocabulary of ``to_gguf``, a sentence each; [] where ids are equal.

    U+2581 in a text, which llama.cpp reads as a space, is not listed.
    """
    sentences = []
    if isinstance(codec, Tokenizer):
        pieces = codec.proto().pieces
        if codec.proto().trainer_spec.model_type == UNIGRAM:
            if codec.byte_ids:
                sentences.append("a character without a piece becomes <unk>, not its bytes")
            sentences.append("of two segmentations with the same score, it may choose the other")
        else:
            texts = {piece.piece for piece in pieces}
            names = [piece.piece for piece in pieces if piece.type in (UNKNOWN, CONTROL, BYTE)]
            merged = [name for name in names if _can_be_merged(name, texts)]
            if merged:
                sentences.append(f"the text {merged[0]!r} may become that special piece")
    elif isinstance(codec, JsonTokenizer):
        shaping = steps(part(codec.backend.normalizer)) + steps(part(codec.backend.pre_tokenizer))
        if any(step["type"] == "NFC" for step in shaping):
            sentences.append("a text is not normalized to NFC first")
        schemes = {step.get("prepend_scheme", "always") for step in shaping if step["type"] == "Metaspace"}
        if schemes - {"never"}:
            sentences.append("a text that begins with a space gets another before it")
        if "first" in schemes:
            sentences.append("a text after a special piece gets a space before it")
    return sentences


def _can_be_merged(name: str, texts: set[str]) -> bool:
    halves = ((name[:at], name[at:]) for at in range(1, len(name)))
    return any(all(len(half) == 1 or half in texts for half in pair) for pair in halves)


def _refusal(codec: Codec, why: str) -> UserError:
    return UserError(f"{codec.name} cannot be written to a GGUF file: {why}")


def _roles(codec: Codec) -> dict[str, Any]:
    """Return special ids and whether they begin and end a text."""
    before, after = codec.prefix_ids, codec.suffix_ids
    if len(before) > 1 or len(after) > 1 or (after and after[0] != codec.eos_id):
        raise _refusal(codec, f"it puts the ids {before} before a text and {after} after it")
    others = (id for id in codec.eos_ids[1:] if codec.piece(id) not in ENDS)
    return {
        "bos_token_id": before[0] if before else codec.eos_id if codec.bos_id is None else codec.bos_id,
        "eos_token_id": codec.eos_id,
        "eot_token_id": next(others, None),
        "unknown_token_id": codec.unk_id,
        "padding_token_id": codec.pad_id,
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
    }


def _fill_up(described: dict[str, Any], size: int, codec: Codec) -> None:
    """Add entries up to the number of the model's ids."""
    missing = range(len(described["tokens"]), size)
    if len(described["tokens"]) > size:
        raise UserError(f"{codec.name} has {len(described['tokens'])} pieces, the model only {size}")
    described["tokens"] += [f"[PAD{id}]" for id in missing]
    described["token_type"] = np.array(described["token_type"] + [UNUSED] * len(missing), np.int32)
    if "scores" in described:
        described["scores"] = np.array(described["scores"] + [NEVER] * len(missing), np.float32)


def _sentencepiece(codec: Tokenizer) -> dict[str, Any]:
    proto = codec.proto()
    kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind not in (UNIGRAM, BPE):
        raise _refusal(codec, "it is neither BPE nor unigram")
    if kind == BPE and (spec.precompiled_charsmap or spec.remove_extra_whitespaces):
        raise _refusal(codec, "llama.cpp would not normalize its text")
    if kind == BPE and len(codec.byte_ids) < 256:
        raise _refusal(codec, "it has no byte pieces")
    types = [NORMAL if piece.type == USER_DEFINED and " " in piece.piece else piece.type for piece in proto.pieces]
    charsmap = np.frombuffer(spec.precompiled_charsmap, np.uint8)
    return {
        "model": "llama" if kind == BPE else "t5",
        "pre": "default",
        "tokens": _spaced((piece.piece for piece in proto.pieces), types),
        "scores": [float(piece.score) for piece in proto.pieces],
        "token_type": types,
        "add_space_prefix": bool(spec.add_dummy_prefix),
        "remove_extra_whitespaces": bool(spec.remove_extra_whitespaces),
        "precompiled_charsmap": charsmap if len(charsmap) else None,
    }


def _spaced(pieces: Iterable[str], types: Sequence[int]) -> list[str]:
    """Return the pieces, user-defined ones with spaces, as they are matched in the text itself, the others with ▁."""
    return [
        piece.replace(SPACE, " ") if type == USER_DEFINED else piece for piece, type in zip(pieces, types, strict=True)
    ]


def _json(codec: JsonTokenizer) -> dict[str, Any]:
    model = json.loads(codec.text)["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _refusal(codec, "it is not BPE")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    normalizers, cutters = (steps(part(part_)) for part_ in (codec.backend.normalizer, codec.backend.pre_tokenizer))
    types = [_type(codec, id) for id in range(codec.vocab_size)]
    pieces = [codec.piece(id) or f"[PAD{id}]" for id in range(codec.vocab_size)]
    if any(step["type"] == "ByteLevel" for step in cutters):
        pre = pretokenizers.name_of(normalizers, cutters, whole=bool(model.get("ignore_merges")))
        if pre is None:
            raise _refusal(codec, "llama.cpp does not have its pre-tokenizer")
        return {
            "model": "gpt2",
            "pre": pre,
            "tokens": pieces,
            "token_type": types,
            "merges": [" ".join(merge) for merge in merges],
        }
    # A SentencePiece BPE in a tokenizer.json: the ranks of its merges become the scores.
    known = [step for step in normalizers if step["type"] in ("Prepend", "Replace")]
    whole = [step for step in cutters if step["type"] == "Metaspace" and not step.get("split", True)]
    no_ops = [step for step in cutters if step["type"] == "Split" and step["pattern"] == {"String": " "}]
    if not model.get("byte_fallback") or len(known) != len(normalizers) or len(whole) + len(no_ops) != len(cutters):
        raise _refusal(codec, "llama.cpp has no equivalent of its pre-tokenizer")
    for id, piece in enumerate(pieces):
        if types[id] == NORMAL and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            types[id] = BYTE
    if codec.unk_id is not None:
        types[codec.unk_id] = UNKNOWN
    if types.count(BYTE) < 256:
        raise _refusal(codec, "it has no byte pieces")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    prefixed = any(step["type"] == "Prepend" for step in known) or any(
        step.get("prepend_scheme", "always") != "never" for step in whole
    )
    return {
        "model": "llama",
        "pre": "default",
        "tokens": _spaced(pieces, types),
        "scores": [-float(ranks[piece]) if piece in ranks else NEVER for piece in pieces],
        "token_type": types,
        "add_space_prefix": prefixed,
    }


def _type(codec: JsonTokenizer, id: int) -> int:
    if not codec.piece(id):
        return UNUSED
    if id in codec.added:
        return CONTROL if codec.added[id] else USER_DEFINED
    return NORMAL
