"""The tokenizer in a model directory, in whichever of the known files it is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tfcli.errors import UserError
from tfcli.formats.hf.settings import json_object
from tfcli.text.tokenizers import pretokenizers, vocabularies
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import MOST_BYTES, MOST_GAPS, JsonTokenizer, Roles
from tfcli.text.tokenizers.sentencepiece import FILE_NAME, UNUSED, Tokenizer

TOKENIZER_JSON = "tokenizer.json"
END = "<|endoftext|>"
"""GPT-2's only special piece."""
NAMED = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
"""Roles of special pieces in tokenizer_config.json, as in ``"bos_token"``."""


def load_tokenizer(
    directory: str | Path, *, vocab_size: int | None = None, hf_config: Mapping[str, Any] | None = None
) -> Codec:
    """Load the tokenizer of a model directory.

    ``tokenizer.model`` where config.json says that tfcli wrote it, else ``tokenizer.json``, ``tokenizer.model``
    (SentencePiece), ``vocab.json`` with ``merges.txt`` (GPT-2, Qwen) or ``vocab.txt`` (BERT), in this order.
    ``vocab_size`` is the number of ids that the model has: special pieces beyond it are left out, and ids without a
    piece (rows that pad an embedding) have no text. ``hf_config`` is the content of config.json, where it was read
    already. Raises UserError if there is none, or a damaged one.
    """
    directory = Path(directory)
    hf_config = read_json(directory / "config.json") if hf_config is None else hf_config
    roles = read_roles(directory, below=vocab_size, hf_config=hf_config)
    if "tfcli" in hf_config and (directory / FILE_NAME).is_file():
        return _sentencepiece(directory / FILE_NAME, roles, ours=True)
    if (directory / TOKENIZER_JSON).is_file():
        # The ids before and after a text are in the file itself: transformers 5 ignores the flags too.
        return JsonTokenizer.from_file(directory / TOKENIZER_JSON, roles=replace(roles, add_bos=None, add_eos=None))
    if (directory / FILE_NAME).is_file():
        return _sentencepiece(directory / FILE_NAME, roles, ours=False)
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return _byte_level(directory, roles)
    if (directory / "vocab.txt").is_file():
        return _word_piece(directory, roles)
    hint = f"expected {TOKENIZER_JSON}, {FILE_NAME}, vocab.json with merges.txt, or vocab.txt"
    raise UserError(f"no tokenizer in {directory}", hint=hint)


def read_roles(directory: Path, *, below: int | None = None, hf_config: Mapping[str, Any] | None = None) -> Roles:
    """Read the special pieces from tokenizer_config, special_tokens_map, generation_config and config.json."""
    path = directory / "tokenizer_config.json"
    config = read_json(directory / "special_tokens_map.json") | read_json(path)
    named = {role: _piece(config.get(f"{role}_token"), path) for role in NAMED}
    others = [named[role] for role in ("sep", "cls", "mask")]
    listed = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    others += [_piece(entry, path) for entry in (listed.values() if isinstance(listed, dict) else listed)]
    decoder = config.get("added_tokens_decoder") or {}
    if isinstance(decoder, dict):
        others += [
            _piece(entry, path) for entry in decoder.values() if isinstance(entry, dict) and entry.get("special")
        ]
    return Roles(
        bos=named["bos"],
        eos=named["eos"],
        pad=named["pad"],
        unk=named["unk"],
        others=tuple(dict.fromkeys(piece for piece in others if piece)),
        more_eos=_ends(directory, hf_config),
        add_bos=_flag(config, "add_bos_token", path),
        add_eos=_flag(config, "add_eos_token", path),
        below=below,
        chat_template=_chat_template(directory, config),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} if there is none. Raises UserError for other content."""
    try:
        return json_object(path, read_text(path), hint="copy it again")
    except FileNotFoundError:
        return {}


def read_text(path: Path) -> str:
    """Return the text of a file. Raises FileNotFoundError if there is none, UserError for other content."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text", hint="copy it again") from None


def _piece(value: Any, path: Path) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str):
        raise UserError(f"{path}: {content!r} is given as a special piece", hint="it must be a string")
    return content


def _flag(config: dict[str, Any], key: str, path: Path) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {value!r}", hint="it must be true or false")
    return value


def _ends(directory: Path, hf_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Return eos_token_id of generation_config.json, else of config.json: an id or several."""
    for name, known in (("generation_config.json", None), ("config.json", hf_config)):
        value = (read_json(directory / name) if known is None else known).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
            raise UserError(f"{directory / name}: eos_token_id is {value!r}", hint="it must be an id or a list of ids")
        return tuple(ids)
    return ()


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """Return chat_template.jinja, else the template in tokenizer_config.json: a text, or several with names."""
    try:
        return read_text(directory / "chat_template.jinja")
    except FileNotFoundError:
        value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise UserError(f"{directory / 'tokenizer_config.json'}: chat_template is not a string")
    return value


def _sentencepiece(path: Path, roles: Roles, *, ours: bool) -> Tokenizer:
    """Load a SentencePiece model; other people's begin a text with their bos piece unless a flag says otherwise."""
    plain = Tokenizer.load(path)
    add_bos = roles.add_bos if roles.add_bos is not None else not ours
    prefix = (plain.bos_id,) if add_bos and plain.bos_id is not None else ()
    return Tokenizer(
        plain.model_bytes if ours else _filled(plain, roles.below or 0),
        name=plain.name,
        prefix_ids=prefix,
        suffix_ids=(plain.eos_id,) if roles.add_eos else (),
        eos_ids=roles.more_eos,
        chat_template=roles.chat_template,
    )


def _filled(tokenizer: Tokenizer, size: int) -> bytes:
    """Return the SentencePiece model padded with unused pieces up to ``size``."""
    missing = range(tokenizer.vocab_size, size)
    if not 0 < len(missing) <= MOST_GAPS:
        return tokenizer.model_bytes
    proto = tokenizer.proto()
    for id in missing:
        proto.pieces.add(piece=f"[PAD{id}]", type=UNUSED)
    return bytes(proto.SerializeToString(deterministic=True))


def _byte_level(directory: Path, roles: Roles) -> JsonTokenizer:
    """Load GPT-2's files: a vocabulary and its merges. Qwen's have the same form and another pre-tokenizer."""
    vocab = _ids(directory / "vocab.json")
    merges: list[list[str]] = []
    for number, line in enumerate(read_text(directory / "merges.txt").split("\n"), 1):
        pair = line.split()
        if not pair or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2:
            raise UserError(f"{directory / 'merges.txt'}, line {number}: {line[:60]!r} is not two pieces")
        merges.append(pair)
    config = read_json(directory / "tokenizer_config.json")
    qwen = str(config.get("tokenizer_class")).startswith("Qwen2")
    if not qwen and END in vocab:
        roles = replace(roles, bos=roles.bos or END, eos=roles.eos or END, unk=roles.unk or END)
    added = [vocabularies.added_token(*entry, special=False) for entry in _added(directory, config).items()]
    rules = pretokenizers.QWEN if qwen else pretokenizers.GPT2
    data = vocabularies.byte_level(vocab, merges, rules, added=added)
    return JsonTokenizer(json.dumps(data, ensure_ascii=False), name=str(directory / "vocab.json"), roles=roles)


def _word_piece(directory: Path, roles: Roles) -> JsonTokenizer:
    """Load BERT's file: one piece per line."""
    lines = read_text(directory / "vocab.txt").split("\n")
    if not lines[-1]:
        lines.pop()
    vocab = {piece.rstrip("\r"): id for id, piece in enumerate(lines)}
    path = directory / "tokenizer_config.json"
    config = read_json(path)
    lowercase, apart = _flag(config, "do_lower_case", path), _flag(config, "tokenize_chinese_chars", path)
    unk = roles.unk or vocabularies.UNK
    if unk not in vocab:
        raise UserError(f"{directory / 'vocab.txt'} has no piece {unk}", hint="it must be the vocabulary of a BERT")
    names = (vocabularies.CLS, vocabularies.SEP, vocabularies.MASK)
    roles = replace(
        roles,
        eos=roles.eos or vocabularies.SEP,
        pad=roles.pad or (vocabularies.PAD if vocabularies.PAD in vocab else None),
        unk=unk,
        others=tuple(dict.fromkeys((*roles.others, *(name for name in names if name in vocab)))),
    )
    data = vocabularies.word_piece(
        vocab,
        lowercase=lowercase is not False,
        strip_accents=_flag(config, "strip_accents", path),
        chinese_apart=apart is not False,
        unk=unk,
        cls=_piece(config.get("cls_token"), path) or vocabularies.CLS,
        sep=_piece(config.get("sep_token"), path) or vocabularies.SEP,
    )
    return JsonTokenizer(json.dumps(data, ensure_ascii=False), name=str(directory / "vocab.txt"), roles=roles)


def _ids(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    for piece, id in vocab.items():
        if not isinstance(id, int) or isinstance(id, bool) or id < 0:
            raise UserError(f"{path}: {piece!r} has the id {id!r}", hint="ids are whole numbers from 0")
    return vocab


def _added(directory: Path, config: dict[str, Any]) -> dict[str, int]:
    """Return {piece: id} of the pieces that were added to a vocabulary."""
    added = _ids(directory / "added_tokens.json")
    decoder = config.get("added_tokens_decoder")
    for id, entry in decoder.items() if isinstance(decoder, dict) else ():
        piece = _piece(entry, directory / "tokenizer_config.json")
        if piece and id.isdecimal():
            added[piece] = int(id)
    return added
