"""The tokenizer in a GGUF file's metadata, as llama.cpp writes and reads it (its src/llama-vocab.cpp).

Four kinds: "llama" (SentencePiece BPE), "t5" (SentencePiece unigram), "gpt2" (byte-level BPE) and "bert" (WordPiece).
The first two become a SentencePiece model again, the others a tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tfcli.errors import UserError
from tfcli.text.tokenizers import pretokenizers, vocabularies
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer, Roles
from tfcli.text.tokenizers.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer

PREFIX = "tokenizer.ggml."
KINDS = {"llama": 2, "t5": 1}
"""{kind that is a SentencePiece model: its TrainerSpec.ModelType}."""
LISTS: dict[str, set[type]] = {"strings": {str}, "integers": {int}, "numbers": {int, float}}
MOST_PIECES = 1 << 22
BEGINS = "a text begins with the beginning-of-text piece"
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
    "gpt2": {},
    "bert": {"cls": 101, "unknown": 100, "seperator": 102, "padding": 0, "mask": 103},
}
"""Default ids ("seperator" is how the format spells it)."""
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
"""Names of special pieces that end a text or a turn; llama.cpp uses these names too."""


def from_gguf(metadata: Mapping[str, Any], *, name: str) -> Codec:
    """Return the tokenizer that ``metadata`` (plain Python values) describes; ``name`` is the file, for messages.

    Raises UserError for an unknown kind or pre-tokenizer, for lists of different lengths, and for ids without a piece.
    """
    vocab = _Vocab.read(metadata, name)
    if vocab.kind in KINDS:
        return _sentencepiece(vocab)
    return _byte_level(vocab) if vocab.kind == "gpt2" else _word_piece(vocab)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Vocab:
    """The metadata of a tokenizer, checked."""

    metadata: Mapping[str, Any]
    name: str
    kind: str
    pieces: list[str]
    types: list[int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any], name: str) -> _Vocab:
        kind = metadata.get(PREFIX + "model")
        if kind is None:
            raise UserError(f"{name} has no tokenizer", hint=f"its metadata lack {PREFIX}model")
        if kind not in DEFAULTS:
            hint = f"it reads {', '.join(DEFAULTS)}"
            raise UserError(f"{name} has a tokenizer of kind {str(kind)[:40]!r}, which tfcli does not read", hint=hint)
        bare = cls(metadata=metadata, name=name, kind=kind, pieces=[], types=[])
        pieces = bare.listed("tokens", "strings")
        if not 0 < len(pieces) <= MOST_PIECES:
            raise UserError(f"{name} has a vocabulary of {len(pieces)} pieces")
        types = [NORMAL] * len(pieces)
        if kind in KINDS or PREFIX + "token_type" in metadata:
            types = [type or NORMAL for type in bare.listed("token_type", "integers", len(pieces))]
            if not set(types) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
                raise UserError(f"{name}: {PREFIX}token_type has a type that is none of 1 to 6")
        for id, piece in enumerate(pieces):
            if not piece:
                pieces[id], types[id] = f"[EMPTY_{id}]", UNUSED
        if len(set(pieces)) < len(pieces):
            twice = next(piece for piece in pieces if pieces.count(piece) > 1)
            raise UserError(f"{name} has the piece {twice[:40]!r} twice in its vocabulary")
        return cls(metadata=metadata, name=name, kind=kind, pieces=pieces, types=types)

    def listed(self, key: str, what: str, count: int | None = None) -> list[Any]:
        """Return a copy of a list of the metadata; ``what`` is a key of LISTS."""
        value = self.metadata.get(PREFIX + key)
        if value is None:
            raise UserError(f"{self.name}: {PREFIX}{key} is missing", hint="the tokenizer in the file is incomplete")
        if not isinstance(value, list | tuple) or not {type(entry) for entry in value} <= LISTS[what]:
            raise UserError(f"{self.name}: {PREFIX}{key} is not a list of {what}")
        if count is not None and len(value) != count:
            raise UserError(f"{self.name} has {count} pieces, but {len(value)} entries in {PREFIX}{key}")
        return list(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(PREFIX + key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.name}: {PREFIX}{key} is {value!r}", hint="it must be true or false")
        return value

    def id(self, role: str) -> int | None:
        """Return the id with this role, None if there is none or the default exceeds the vocabulary."""
        key = f"{PREFIX}{role}_token_id"
        if key not in self.metadata:
            default = DEFAULTS[self.kind].get(role)
            return default if default is not None and default < len(self.pieces) else None
        value = self.metadata[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self.pieces):
            hint = f"the vocabulary's ids are 0 to {len(self.pieces) - 1}"
            raise UserError(f"{self.name}: {key} is {value!r}", hint=hint)
        return value

    def needed(self, role: str, why: str) -> int:
        id = self.id(role)
        if id is None:
            raise UserError(f"{self.name}: {why}, but {PREFIX}{role}_token_id is missing")
        return id

    def ends(self) -> tuple[int, ...]:
        """Return the ids that end a text or a turn, the end-of-text id first."""
        roles = [self.id("eos"), self.id("eot"), self.id("eom")]
        ids = {piece: id for id, piece in enumerate(self.pieces) if self.types[id] in (CONTROL, USER_DEFINED)}
        ends = [id for id in (*roles, *map(ids.get, ENDS)) if id is not None]
        if not ends:
            hint = f"its metadata lack {PREFIX}eos_token_id"
            raise UserError(f"{self.name} does not say which piece ends a text", hint=hint)
        return tuple(dict.fromkeys(ends))

    def named(self, role: str) -> str | None:
        """Return the piece with this role, None if there is none."""
        id = self.id(role)
        return None if id is None else self.pieces[id]

    def chat_template(self) -> str | None:
        template = self.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise UserError(f"{self.name}: tokenizer.chat_template is not a string")
        return template


def _sentencepiece(vocab: _Vocab) -> Tokenizer:
    """Return the SentencePiece model whose pieces, scores and settings the file lists."""
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    scores = vocab.listed("scores", "numbers", len(vocab.pieces))
    ends = vocab.ends()
    unk_id = vocab.needed("unknown", "it is a SentencePiece model")
    bos_id, pad_id = vocab.id("bos"), vocab.id("padding")
    types = list(vocab.types)
    for id in (bos_id, pad_id, *ends):
        if id is not None:
            types[id] = CONTROL
    types = [CONTROL if type == UNKNOWN else type for type in types]
    types[unk_id] = UNKNOWN
    fallback = types.count(BYTE) == 256
    proto = model_pb2.ModelProto()
    for piece, score, type in zip(vocab.pieces, scores, types, strict=True):
        if type == BYTE and not fallback:
            type = UNUSED
        text = piece.replace(" ", SPACE) if type == USER_DEFINED else piece
        proto.pieces.add(piece=text, score=float(score), type=type)
    trainer = proto.trainer_spec
    trainer.model_type = KINDS[vocab.kind]
    trainer.vocab_size = len(vocab.pieces)
    trainer.byte_fallback = fallback
    trainer.unk_surface = ""
    for role, role_id in (("unk", unk_id), ("bos", bos_id), ("eos", ends[0]), ("pad", pad_id)):
        setattr(trainer, f"{role}_id", -1 if role_id is None else role_id)
        setattr(trainer, f"{role}_piece", "" if role_id is None else vocab.pieces[role_id])
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = vocab.flag("add_space_prefix", vocab.kind == "llama")
    normalizer.remove_extra_whitespaces = vocab.flag("remove_extra_whitespaces", False)
    normalizer.precompiled_charsmap = _charsmap(vocab)
    add_bos = vocab.flag("add_bos_token", vocab.kind == "llama")
    return Tokenizer(
        proto.SerializeToString(deterministic=True),
        name=f"the tokenizer in {vocab.name}",
        prefix_ids=(vocab.needed("bos", BEGINS),) if add_bos else (),
        suffix_ids=(ends[0],) if vocab.flag("add_eos_token", vocab.kind == "t5") else (),
        eos_ids=ends,
        chat_template=vocab.chat_template(),
    )


def _charsmap(vocab: _Vocab) -> bytes:
    """Return SentencePiece's normalization table, b"" for none."""
    key = "precompiled_charsmap"
    if vocab.kind == "llama" or PREFIX + key not in vocab.metadata:
        return b""
    values = vocab.listed(key, "integers")
    if not all(-128 <= value < 256 for value in values):
        raise UserError(f"{vocab.name}: {PREFIX}{key} is not a list of bytes")
    return bytes(value & 0xFF for value in values)


def _byte_level(vocab: _Vocab) -> JsonTokenizer:
    given = vocab.metadata.get(PREFIX + "pre", "default")
    rules = pretokenizers.by_name(str(given))
    if rules is None:
        known = sorted(name for entry in pretokenizers.KNOWN for name in entry.names)
        raise UserError(
            f"{vocab.name} has the pre-tokenizer {str(given)[:40]!r} ({PREFIX}pre), which tfcli does not have",
            hint=f"it has {', '.join(known)}",
        )
    merges: list[tuple[str, str]] = []
    for number, merge in enumerate(vocab.listed("merges", "strings")):
        at = merge.find(" ", 1)
        if at < 0 or at == len(merge) - 1:
            raise UserError(f"{vocab.name}: merge {number} in {PREFIX}merges, {merge[:40]!r}, is not two pieces")
        merges.append((merge[:at], merge[at + 1 :]))
    ids = {piece: id for id, piece in enumerate(vocab.pieces)}
    data = vocabularies.byte_level(ids, merges, rules, added=_added(vocab))
    ends, add_bos = vocab.ends(), vocab.flag("add_bos_token", rules.bos)
    if add_bos:
        vocab.needed("bos", BEGINS)
    roles = Roles(
        bos=vocab.named("bos"),
        eos=vocab.pieces[ends[0]],
        pad=vocab.named("padding"),
        unk=vocab.named("unknown"),
        more_eos=ends,
        add_bos=add_bos,
        add_eos=vocab.flag("add_eos_token", False),
        chat_template=vocab.chat_template(),
    )
    return _json_tokenizer(vocab, data, roles)


def _json_tokenizer(vocab: _Vocab, data: dict[str, Any], roles: Roles) -> JsonTokenizer:
    return JsonTokenizer(json.dumps(data, ensure_ascii=False), name=f"the tokenizer in {vocab.name}", roles=roles)


def _word_piece(vocab: _Vocab) -> JsonTokenizer:
    """Undo the format's marks: ▁ before words and nothing before continuations; BERT's own marks are the reverse."""
    pieces = [_bert_piece(piece, type) for piece, type in zip(vocab.pieces, vocab.types, strict=True)]
    lowercase = vocab.flag("normalizer.lowercase", True)
    cls, sep = vocab.needed("cls", "it is BERT's"), vocab.needed("seperator", "it is BERT's")
    if PREFIX + "cls_token_id" not in vocab.metadata and PREFIX + "bos_token_id" in vocab.metadata:
        cls = vocab.needed("bos", "it is BERT's")
    unk = vocab.needed("unknown", "it is BERT's")
    renamed = replace(vocab, pieces=pieces, types=list(vocab.types))
    for id in (cls, sep, unk, vocab.id("padding"), vocab.id("mask")):
        if id is not None:
            renamed.types[id] = CONTROL
    data = vocabularies.word_piece(
        {piece: id for id, piece in enumerate(pieces)},
        lowercase=lowercase,
        strip_accents=vocab.flag("normalizer.strip_accents", lowercase),
        unk=pieces[unk],
        cls=pieces[cls],
        sep=pieces[sep],
        added=_added(renamed),
    )
    template = vocab.chat_template()
    roles = Roles(eos=pieces[sep], unk=pieces[unk], pad=renamed.named("padding"), chat_template=template)
    return _json_tokenizer(vocab, data, roles)


def _bert_piece(piece: str, type: int) -> str:
    if type in (CONTROL, UNKNOWN, UNUSED) or (piece.startswith("[") and piece.endswith("]")):
        return piece
    return piece.removeprefix(SPACE) if piece.startswith(SPACE) else "##" + piece


def _added(vocab: _Vocab) -> list[dict[str, Any]]:
    """Return the pieces that are matched before pre-tokenization; those without a text are special."""
    return [
        vocabularies.added_token(piece, id, special=type != USER_DEFINED)
        for id, (piece, type) in enumerate(zip(vocab.pieces, vocab.types, strict=True))
        if type in (CONTROL, UNKNOWN, USER_DEFINED, UNUSED)
    ]
