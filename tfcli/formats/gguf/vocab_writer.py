"""A tokenizer written as GGUF metadata, so that llama.cpp gives the same ids: the inverse of ``gguf_vocab``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tfcli.errors import UserError
from tfcli.formats.gguf.vocab import ENDS, PREFIX
from tfcli.text.tokenizers import pretokenizers
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer
from tfcli.text.tokenizers.json_parts import part, steps
from tfcli.text.tokenizers.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NEVER = -1e6
"""The score of a piece that merges do not make."""


def to_gguf(codec: Codec, *, vocab_size: int | None = None) -> dict[str, Any]:
    """The metadata ``tokenizer.*`` of a tokenizer: plain Python values, and numpy arrays where a type matters.

    ``vocab_size`` is the number of the model's ids: the vocabulary is filled up to it. SentencePiece BPE becomes
    "llama", SentencePiece unigram "t5", byte-level BPE "gpt2" and BPE with byte fallback "llama". Raises UserError for
    a tokenizer that llama.cpp has no like for; ``differences`` says what is not exact.
    """
    if isinstance(codec, Tokenizer):
        described = _sentencepiece(codec)
    elif isinstance(codec, JsonTokenizer):
        described = _json(codec)
    else:
        raise _no_like(codec, "it is neither a SentencePiece model nor a tokenizer.json")
    _fill_up(described, vocab_size or codec.vocab_size, codec)
    named = {f"{PREFIX}{key}": value for key, value in (described | _roles(codec)).items() if value is not None}
    return named | ({"tokenizer.chat_template": codec.chat_template} if codec.chat_template else {})


def differences(codec: Codec) -> list[str]:
    """What llama.cpp does otherwise with the vocabulary of ``to_gguf``, a sentence each; [] where ids are equal.

    U+2581 in a text, which llama.cpp takes for a space, is not worth a sentence.
    """
    said = []
    if isinstance(codec, Tokenizer):
        pieces = codec.proto().pieces
        if codec.proto().trainer_spec.model_type == UNIGRAM:
            if codec.byte_ids:
                said.append("a character without a piece becomes <unk>, not its bytes")
            said.append("where two ways to cut a text score the same, the other may be taken")
        else:
            texts = {piece.piece for piece in pieces}
            names = [piece.piece for piece in pieces if piece.type in (UNKNOWN, CONTROL, BYTE)]
            made = [name for name in names if _can_be_merged(name, texts)]
            if made:
                said.append(f"the text {made[0]!r} may become that special piece")
    elif isinstance(codec, JsonTokenizer):
        shaping = steps(part(codec.backend.normalizer)) + steps(part(codec.backend.pre_tokenizer))
        if any(step["type"] == "NFC" for step in shaping):
            said.append("a text is not normalised to NFC first")
        schemes = {step.get("prepend_scheme", "always") for step in shaping if step["type"] == "Metaspace"}
        if schemes - {"never"}:
            said.append("a text that begins with a space gets another before it")
        if "first" in schemes:
            said.append("a text after a special piece gets a space before it")
    return said


def _can_be_merged(name: str, texts: set[str]) -> bool:
    halves = ((name[:at], name[at:]) for at in range(1, len(name)))
    return any(all(len(half) == 1 or half in texts for half in pair) for pair in halves)


def _no_like(codec: Codec, why: str) -> UserError:
    return UserError(f"{codec.name} cannot be written into a GGUF file: {why}")


def _roles(codec: Codec) -> dict[str, Any]:
    """Ids and what stands before and after a text."""
    before, after = codec.prefix_ids, codec.suffix_ids
    if len(before) > 1 or len(after) > 1 or (after and after[0] != codec.eos_id):
        raise _no_like(codec, f"it puts the ids {before} before a text and {after} after it")
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
    """Give each of the model's ids an entry."""
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
        raise _no_like(codec, "it is neither BPE nor unigram")
    if kind == BPE and (spec.precompiled_charsmap or spec.remove_extra_whitespaces):
        raise _no_like(codec, "llama.cpp would not normalise its text")
    if kind == BPE and len(codec.byte_ids) < 256:
        raise _no_like(codec, "it has no byte pieces")
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
    """Pieces that are found in the text itself have spaces, the others ▁."""
    return [
        piece.replace(SPACE, " ") if type == USER_DEFINED else piece for piece, type in zip(pieces, types, strict=True)
    ]


def _json(codec: JsonTokenizer) -> dict[str, Any]:
    model = json.loads(codec.text)["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _no_like(codec, "it is no BPE")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    normalizers, cutters = (steps(part(part_)) for part_ in (codec.backend.normalizer, codec.backend.pre_tokenizer))
    pieces = [codec.piece(id) or f"[PAD{id}]" for id in range(codec.vocab_size)]
    if any(step["type"] == "ByteLevel" for step in cutters):
        pre = pretokenizers.name_of(normalizers, cutters, whole=bool(model.get("ignore_merges")))
        if pre is None:
            raise _no_like(codec, "llama.cpp has no name for how it cuts text into words")
        return {
            "model": "gpt2",
            "pre": pre,
            "tokens": pieces,
            "token_type": [_type(codec, id) for id in range(codec.vocab_size)],
            "merges": [" ".join(merge) for merge in merges],
        }
    return _spaced_bpe(codec, merges, pieces, normalizers, cutters, fallback=bool(model.get("byte_fallback")))


def _spaced_bpe(
    codec: JsonTokenizer,
    merges: list[tuple[str, ...]],
    pieces: list[str],
    normalizers: list[dict[str, Any]],
    cutters: list[dict[str, Any]],
    *,
    fallback: bool,
) -> dict[str, Any]:
    """A SentencePiece BPE that became a tokenizer.json: the order of its merges stands for the scores."""
    known = [step for step in normalizers if step["type"] in ("Prepend", "Replace")]
    whole = [step for step in cutters if step["type"] == "Metaspace" and not step.get("split", True)]
    no_ops = [step for step in cutters if step["type"] == "Split" and step["pattern"] == {"String": " "}]
    if not fallback or len(known) != len(normalizers) or len(whole) + len(no_ops) != len(cutters):
        raise _no_like(codec, "llama.cpp has no like for how it cuts text into words")
    types = [_type(codec, id) for id in range(codec.vocab_size)]
    for id, piece in enumerate(pieces):
        if types[id] == NORMAL and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            types[id] = BYTE
    if codec.unk_id is not None:
        types[codec.unk_id] = UNKNOWN
    if types.count(BYTE) < 256:
        raise _no_like(codec, "it has no byte pieces")
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
