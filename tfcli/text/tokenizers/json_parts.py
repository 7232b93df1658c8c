"""The effects of the parts of a ``tokenizer.json``, read from the JSON that the tokenizers library keeps of each."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from tfcli.text.tokenizers.sentencepiece import SPACE


def part(component: Any) -> dict[str, Any]:
    """Return the JSON of a part of the library's tokenizer, {} for None."""
    state: dict[str, Any] = json.loads(component.__getstate__()) if component is not None else {}
    return state


def steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a Sequence, or the part itself."""
    if state.get("type") != "Sequence":
        return [state] if state else []
    inner: list[dict[str, Any]] = next((value for value in state.values() if isinstance(value, list)), [])
    return [deeper for step in inner for deeper in steps(step)]


def template_ids(state: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a post-processor puts before and after a text."""
    before: list[int] = []
    after: list[int] = []
    for step in steps(state):
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            before, after = [step["cls"][1], *before], [*after, step["sep"][1]]
        elif step["type"] == "TemplateProcessing":
            pieces = [(entry.get("SpecialToken") or {}).get("id") for entry in step["single"]]
            ids = [step["special_tokens"][piece]["ids"] if piece else None for piece in pieces]
            middle = ids.index(None) if None in ids else len(ids)
            before = [id for group in ids[:middle] for id in group or ()] + before
            after = after + [id for group in ids[middle + 1 :] for id in group or ()]
    return tuple(before), tuple(after)


def byte_letters() -> dict[str, int]:
    """Return {letter: byte} of byte-level BPE (GPT-2): printable bytes are themselves, the others follow U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


def pieces_to_bytes(decoder: dict[str, Any]) -> tuple[Callable[[str], bytes] | None, Callable[[bytes], bytes] | None]:
    """Return functions for the bytes of a piece and for changing those of the first; (None, None) if there are none.

    The library replaces a run of byte pieces that is not UTF-8 as a whole; here each invalid sequence becomes U+FFFD.
    """
    parts = steps(decoder)
    kinds = [step["type"] for step in parts]
    if kinds == ["ByteLevel"]:
        return functools.partial(_letters_to_bytes, byte_letters()), None
    if not kinds or not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None, None
    first: Callable[[bytes], bytes] | None = None
    for step in parts:
        if step["type"] == "Replace" and (step["pattern"], step["content"]) != ({"String": SPACE}, " "):
            return None, None
        if step["type"] == "Strip":
            if step["content"] != " " or step["stop"] or "Fuse" not in kinds:
                return None, None
            first = functools.partial(_without_spaces, most=step["start"])
        if step["type"] == "Metaspace":
            if step["replacement"] != SPACE:
                return None, None
            first = _no_spaces if step.get("prepend_scheme", "always") != "never" else first
    return functools.partial(_spaced_to_bytes, fallback="ByteFallback" in kinds), first


def _letters_to_bytes(letters: dict[str, int], piece: str) -> bytes:
    try:
        return bytes(map(letters.__getitem__, piece))
    except KeyError:
        return piece.encode()


def _spaced_to_bytes(piece: str, *, fallback: bool) -> bytes:
    if fallback and len(piece) == 6 and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE, " ").encode()


def _without_spaces(data: bytes, *, most: int) -> bytes:
    return data[min(most, len(data) - len(data.lstrip(b" "))) :]


def _no_spaces(data: bytes) -> bytes:
    return data.replace(b" ", b"")


def puts_prefix(backend: Any) -> bool:
    """Return whether a space is put before a text."""
    parts = steps(part(backend.normalizer)) + steps(part(backend.pre_tokenizer))
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        or (step["type"] == "ByteLevel" and step.get("add_prefix_space"))
        for step in parts
    )


def no_prefix(data: Any) -> Any:
    """Return a tokenizer.json that puts no space before a text."""
    if isinstance(data, list):
        return [no_prefix(entry) for entry in data if not (isinstance(entry, dict) and entry.get("type") == "Prepend")]
    if not isinstance(data, dict):
        return data
    if data.get("type") == "Prepend":
        return None
    changed = {
        key: value if key in ("model", "added_tokens", "decoder") else no_prefix(value) for key, value in data.items()
    }
    if data.get("type") == "Metaspace":
        changed |= {"prepend_scheme": "never"}
        changed.pop("add_prefix_space", None)
    if data.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed
