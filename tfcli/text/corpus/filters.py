"""Lines of text to lines of ids and back, as a shell filter: bounded memory, prompt on a slow pipe, fast in bulk.

A line ends at "\\n" only, so that every other character, "\\r" included, is preserved.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Literal

from tfcli.errors import UserError
from tfcli.text.tokenizers.sentencepiece import Tokenizer

BLOCK = 1 << 20
"""The most bytes read at once; a pipe gives what it has."""


def line_batches(stream: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the lines of ``stream`` without their "\\n", as many at once as have arrived."""
    read = getattr(stream, "read1", stream.read)  # one system call: what has arrived, without waiting for more
    rest: list[bytes] = []
    while data := read(BLOCK):
        head, newline, tail = data.rpartition(b"\n")
        if newline:
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
    """Yield for each batch of lines its lines of ids (or pieces) separated by spaces, or as {"ids": [...]} objects.

    With ``as_json``, a line that is an object with a string "text" stands for that string, which may have line breaks.
    Raises UserError, with the line number, for invalid UTF-8 and for JSON that is nested too deeply.
    """
    names = display_pieces(tokenizer) if pieces else [str(id) for id in range(tokenizer.vocab_size)]
    key = "pieces" if pieces else "ids"
    numbers = itertools.count(1)
    for batch in batches:
        texts = [_text(line, next(numbers), errors, as_json) for line in batch]
        out: list[str] = []
        for array in tokenizer.encode_arrays(texts, threads=threads):
            ids = array.tolist()
            if as_json:
                out.append(json.dumps({key: [names[id] for id in ids] if pieces else ids}, ensure_ascii=False))
            else:
                out.append(" ".join([names[id] for id in ids]))
        out.append("")
        yield "\n".join(out).encode()


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
    """Return each piece as one word: a space as U+2581, a byte or a line break as <0x0A>."""
    return [tokenizer.piece(id).replace("\n", "<0x0A>").replace(" ", "\u2581") for id in range(tokenizer.vocab_size)]


def decode_lines(
    batches: Iterable[list[bytes]], tokenizer: Tokenizer, *, pieces: bool = False, as_json: bool = False
) -> Iterator[bytes]:
    """Yield for each batch of lines of ids (or pieces), or of {"ids": [...]} objects, its lines of text.

    ``as_json`` gives {"text": ...} objects. Raises UserError, with the line number, for an unknown id or piece.
    """
    known = {name: id for id, name in reversed(list(enumerate(display_pieces(tokenizer))))} if pieces else {}
    of_word: Callable[[str], int] = known.__getitem__ if pieces else int
    numbers = itertools.count(1)
    for batch in batches:
        out = [tokenizer.decode(_ids(line, next(numbers), of_word, tokenizer)) for line in batch]
        if as_json:
            out = [json.dumps({"text": text}, ensure_ascii=False) for text in out]
        out.append("")
        yield "\n".join(out).encode()


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
    """Return a list of integers as it is. Raises ValueError for anything else, true and 1.0 included."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("not whole numbers")
    return values
