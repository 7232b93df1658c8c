"""What the rest of tfcli asks of a tokenizer, whoever made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tfcli.errors import UserError

IntArray = npt.NDArray[np.int32]


class TextStream(Protocol):
    """Turns ids into text one at a time.

    The concatenation of all that ``push`` and ``flush`` return is what ``Codec.decode`` returns for the same ids.
    """

    def push(self, id: int) -> str:
        """The text that became certain with this id: never half a character, sometimes ""."""
        ...

    def flush(self) -> str:
        """What remains at the end."""
        ...


class Codec(Protocol):
    """Text to ids and back.

    ``encode`` gives the ids of a text alone. What a model is fed is ``prefix_ids + ids + suffix_ids``, or
    ``(eos_id,)`` where all of that is empty.
    """

    @property
    def name(self) -> str:
        """Where it came from, for messages."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the ids, in hexadecimal."""
        ...

    @property
    def vocab_size(self) -> int:
        """The highest id and one."""
        ...

    @property
    def eos_id(self) -> int:
        """The id between documents, and at the end of a text."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text or a turn of a chat, ``eos_id`` first."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id at the beginning of a text, where there is one."""
        ...

    @property
    def pad_id(self) -> int | None:
        """The id that fills up rows, where there is one."""
        ...

    @property
    def unk_id(self) -> int | None:
        """The id of what has no piece, where there is one."""
        ...

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids that come before every text that a model is fed, such as Llama's beginning of text."""
        ...

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """The ids that come after it, such as BERT's [SEP]."""
        ...

    @property
    def first_id(self) -> int:
        """The id that a text begins after: the first of ``prefix_ids`` where there are any, else ``eos_id``."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into a text for ``encode_special``."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text; the names of special pieces in it are text. UserError for a lone surrogate."""
        ...

    def encode_special(self, text: str) -> list[int]:
        """As ``encode``, but the names of special pieces, as <|im_start|>, give their ids."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """``encode`` of each text, by several threads."""
        ...

    def encode_arrays(
        self, texts: Sequence[str], *, continuing: Sequence[bool] | None = None, threads: int | None = None
    ) -> list[IntArray]:
        """``encode`` of each text, as arrays of int32; ``continuing[i]``: texts[i] goes on from what came before."""
        ...

    def decode(self, ids: Iterable[int], *, continuing: bool = False) -> str:
        """The text of ids, special pieces left out; ``continuing``: after other text. UserError for no id of this."""
        ...

    def stream(self, *, continuing: bool = False) -> TextStream:
        """A decoder for ids that come one at a time."""
        ...

    def id_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that an id adds to a text, b"" for special pieces; UserError for an id out of range."""
        ...

    def piece(self, id: int) -> str:
        """How the vocabulary writes a piece; UserError for an id out of range."""
        ...


def not_text(texts: Sequence[object]) -> UserError:
    """The error for texts that a library could not encode: a lone surrogate, or no text at all."""
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
