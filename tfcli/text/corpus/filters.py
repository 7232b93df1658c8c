"""Lines of text to lines of ids and back, as a shell filter: bounded memory, prompt on a slow pipe, fast in bulk.

A line ends at "\\n" and nothing else, so that every other character, "\\r" included, comes back as it went in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Literal

from tfcli.errors import UserError
from tfcli.text.tokenizers.sentencepiece import Tokenizer

BLOCK = 1 << 20
"""Bytes read at most at once; a pipe gives what it has."""


def line_batches(stream: BinaryIO) -> Iterator[list[bytes]]:
    """The lines of ``stream`` without their "\\n", as many at once as have arrived."""
    read = getattr(stream, "read1", stream.read)  # one system call: what is there, without waiting for more
    rest: list[bytes] = []
    while data := read(BLOCK):
        head, found, tail = data.rpartition(b"\n")
        if found:
            yield b"".join((*rest, head)).split(b"\n")
            rest = []
        if tail:
            rest.append(tail)
    if rest:
        yield [b"".join(rest)]


def encode_lines(
    batches: Iterable[list[bytes]],
    tokenizer: Tokenizer,
    *,
    errors: Literal["strict", "replace"] = "strict",
    pieces: bool = False,
    as_json: bool = False,
    threads: int | None = None,
) -> Iterator[bytes]:
    """For each batch of lines, its lines of ids (or pieces) separated by spaces, or as {"ids": [...]} objects.

    With ``as_json`` a line that is an object with a string "text" stands for that string, which may have line breaks.
    Raises UserError, with the line number, for invalid UTF-8 and for JSON that is nested too deeply.
    """
    names = display_pieces(tokenizer) if pieces else [str(id) for id in range(tokenizer.vocab_size)]
    key = "pieces" if pieces else "ids"
    number = 1
    for batch in batches:
        texts = [_text(line, number + index, errors, as_json) for index, line in enumerate(batch)]
        out: list[str] = []
        for array in tokenizer.encode_arrays(texts, threads=threads):
            ids = array.tolist()
            if as_json:
                out.append(json.dumps({key: [names[id] for id in ids] if pieces else ids}, ensure_ascii=False))
            else:
                out.append(" ".join([names[id] for id in ids]))
        out.append("")
        yield "\n".join(out).encode()
        number += len(batch)


def _text(line: bytes, number: int, errors: Literal["strict", "replace"], as_json: bool) -> str:
    try:
        text = line.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"line {number} is not valid UTF-8: byte 0x{line[error.start]:02x} at its offset {error.start}",
            hint="replace what is invalid: --errors replace",
        ) from None
    if as_json and text.startswith("{"):
        try:
            row = json.loads(text)
        except RecursionError:
            raise UserError(f"line {number} is JSON that is nested too deeply to be read") from None
        except ValueError:  # not JSON, or a number of more digits than Python takes
            return text
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            return str(row["text"])
    return text


def display_pieces(tokenizer: Tokenizer) -> list[str]:
    """Each piece in one word: a space as U+2581, a byte or a line break as <0x0A>."""
    return [tokenizer.piece(id).replace("\n", "<0x0A>").replace(" ", "\u2581") for id in range(tokenizer.vocab_size)]


def decode_lines(
    batches: Iterable[list[bytes]], tokenizer: Tokenizer, *, pieces: bool = False, as_json: bool = False
) -> Iterator[bytes]:
    """For each batch of lines of ids (or pieces), or of {"ids": [...]} objects, its lines of text.

    ``as_json`` gives {"text": ...} objects. Raises UserError, with the line number, for what is not an id or a piece.
    """
    known = {name: id for id, name in reversed(list(enumerate(display_pieces(tokenizer))))} if pieces else {}

    def of_word(word: str) -> int:
        if not pieces:
            return int(word)
        return known[word]

    number = 1
    for batch in batches:
        out: list[str] = []
        for index, line in enumerate(batch):
            text = tokenizer.decode(_ids(line, number + index, of_word, tokenizer))
            out.append(json.dumps({"text": text}, ensure_ascii=False) if as_json else text)
        out.append("")
        yield "\n".join(out).encode()
        number += len(batch)


def _ids(line: bytes, number: int, of_word: Callable[[str], int], tokenizer: Tokenizer) -> list[int]:
    try:
        text = line.decode()
        if text.startswith("{"):
            row = json.loads(text)
            ids = _whole_numbers(row["ids"]) if "ids" in row else [of_word(word) for word in row["pieces"]]
        else:
            ids = [of_word(word) for word in text.strip("\r\n ").split(" ") if word]
    except (ValueError, KeyError, TypeError, RecursionError):
        shown = line[:40].decode("utf-8", "replace") + ("..." if len(line) > 40 else "")
        raise UserError(
            f"line {number} is not a line of ids: {shown}",
            hint='expected numbers separated by spaces, or {"ids": [...]}; pieces need --pieces',
        ) from None
    for id in ids:
        if not 0 <= id < tokenizer.vocab_size:
            raise UserError(
                f"line {number}: {id} is not an id of {tokenizer.name}",
                hint=f"its ids are 0 to {tokenizer.vocab_size - 1}",
            )
    return ids


def _whole_numbers(values: object) -> list[int]:
    """``values`` if they are a list of whole numbers, which true and 1.0 are not; else ValueError."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("not whole numbers")
    return values
