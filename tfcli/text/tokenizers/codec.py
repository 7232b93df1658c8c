"""The interface of every tokenizer, whatever file it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tfcli.errors import UserError

IntArray = npt.NDArray[np.int32]


class TextStream(Protocol):
    """A decoder that turns ids into text one at a time.

    The concatenation of all that ``push`` and ``flush`` return is what ``Codec.decode`` returns for the same ids.
    """

    def push(self, id: int) -> str:
        """Return the text that this id completes: never half a character, sometimes ""."""

    def flush(self) -> str:
        """Return what remains at the end."""


class Codec(Protocol):
    """A tokenizer: text to ids and back.

    ``encode`` gives the ids of a text alone. What a model reads is ``prefix_ids + ids + suffix_ids``, or
    ``(eos_id,)`` where all of that is empty.
    """

    @property
    def name(self) -> str:
        """The file it came from, for messages."""

    @property
    def hash(self) -> str:
        """The SHA-256 of everything that determines the ids, in hexadecimal."""

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""

    @property
    def eos_id(self) -> int:
        """The id between documents, and at the end of a text."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text or a turn of a chat, ``eos_id`` first."""

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-text id, or None."""

    @property
    def pad_id(self) -> int | None:
        """The padding id, or None."""

    @property
    def unk_id(self) -> int | None:
        """The id of text that has no piece, or None."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids before every text that a model reads, such as Llama's beginning of text."""

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """The ids after every text, such as BERT's [SEP]."""

    @property
    def first_id(self) -> int:
        """The id before a text: the first of ``prefix_ids`` if there are any, else ``eos_id``."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into a text for ``encode_special``."""

    def encode(self, text: str) -> list[int]:
        """Encode a text; names of special pieces in it are plain text. Raises UserError for a lone surrogate."""

    def encode_special(self, text: str) -> list[int]:
        """Encode a text in which names of special pieces, such as <|im_start|>, give their ids."""

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Encode each text, with several threads."""

    def encode_arrays(
        self, texts: Sequence[str], *, continuing: Sequence[bool] | None = None, threads: int | None = None
    ) -> list[IntArray]:
        """Encode each text as an int32 array; where ``continuing[i]`` is true, texts[i] continues an earlier text."""

    def decode(self, ids: Iterable[int], *, continuing: bool = False) -> str:
        """Decode ids without special pieces, ``continuing`` an earlier text. Raises UserError for an unknown id."""

    def stream(self, *, continuing: bool = False) -> TextStream:
        """Return a decoder for ids that come one at a time."""

    def id_bytes(self, id: int) -> bytes:
        """Return the UTF-8 bytes of an id, b"" for a special piece. Raises UserError for an unknown id."""

    def piece(self, id: int) -> str:
        """Return a piece as the vocabulary writes it. Raises UserError for an unknown id."""


def not_text(texts: Sequence[object]) -> UserError:
    """Return the error for texts that a library cannot encode: a lone surrogate, or not a string."""
    for text in texts:
        if not isinstance(text, str):
            break
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return UserError(
                f"the text has a lone surrogate, {text[error.start]!a}, which is not Unicode text",
                hint="read the text with errors='replace', or leave the surrogate out",
            )
    return UserError("only text can be encoded")
