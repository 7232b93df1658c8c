"""The tokenizer: SentencePiece (Kudo and Richardson 2018) used so that text is never changed.

``decode(encode(text)) == text`` for every string, by identity normalisation, byte fallback, no dummy prefix and
spaces kept. Two corners need care: SentencePiece writes a space as U+2581, so that character in a text is given its
bytes here; and it is slow on long strings, so text is encoded a few lines at a time, cut where no piece can cross.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tfcli import disk
from tfcli.errors import UserError
from tfcli.text.tokenizers.codec import IntArray as IntArray
from tfcli.text.tokenizers.codec import not_text

FILE_NAME = "tokenizer.model"
SPACE = "\u2581"
"""SentencePiece's sign for a space."""
MASK = "[MASK]"
"""The control piece that stands for what an encoder is to guess. It takes the place of the spaces before it as well, as
pieces begin with theirs."""
SENTINEL = "<extra_id_{}>"
"""The control pieces that stand for hidden spans, by their number; T5's names."""
SPACE_BYTES = tuple(SPACE.encode())
GROUP = 512
"""Characters that are encoded at once, about: long enough for speed, short enough for the processor's cache."""
LONG = 1 << 16
"""A line longer than this is cut before a word."""
FEW = 1 << 14
"""Characters that are not worth a second thread."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type


class StreamDecoder:
    """Turns ids into text one at a time, and never gives out half a character.

    Bytes that cannot be UTF-8 become U+FFFD, once that is certain. The concatenation of all that ``push`` and ``flush``
    return is what the tokenizer's ``decode`` returns for the same ids. ``bytes_of`` gives the bytes of an id, ``first``
    changes those of the first id that has any.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], *, first: Callable[[bytes], bytes] | None = None) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = first

    def push(self, id: int) -> str:
        """The text that became certain with this id, often all of its piece, sometimes ""."""
        data = self._bytes_of(id)
        if self._first and data:
            data, self._first = self._first(data), None
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What remains at the end: U+FFFD where a character is incomplete, else ""."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class Tokenizer:
    """A SentencePiece model with the ids that its special pieces have.

    ``dummy_prefix`` says that the model puts a space before a text (Llama and Mistral do); ``lossless`` that text comes
    back as it went in. A model with the piece [MASK] is an encoder's: a text stands between its beginning and end of
    text. Without byte fallback a model still loads. ``prefix_ids``, ``suffix_ids``, ``eos_ids`` and
    ``chat_template`` are what a model's files say beside the SentencePiece model, as ``Codec`` has them.
    """

    def __init__(
        self,
        model_bytes: bytes,
        *,
        name: str = "the tokenizer",
        prefix_ids: tuple[int, ...] = (),
        suffix_ids: tuple[int, ...] = (),
        eos_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
    ) -> None:
        self.name = name
        self.model_bytes = model_bytes
        self.prefix_ids = prefix_ids
        self.suffix_ids = suffix_ids
        self.chat_template = chat_template
        self.hash = hashlib.sha256(model_bytes).hexdigest()
        proto = self.proto()
        spec = proto.normalizer_spec
        self.vocab_size = len(proto.pieces)
        self.identity = not (spec.precompiled_charsmap or spec.remove_extra_whitespaces) and spec.escape_whitespaces
        self.dummy_prefix: bool = spec.add_dummy_prefix
        self._unigram = proto.trainer_spec.model_type == 1
        self._processor = self._processor_of(proto)
        self._read_pieces(proto)
        self.mask_id: int | None = self._named.get(MASK)
        numbered = (self._named.get(SENTINEL.format(number)) for number in itertools.count())
        self.sentinel_ids = tuple(id for id in itertools.takewhile(lambda id: id is not None, numbered) if id)
        """Of pieces that stand for hidden spans; () in a vocabulary that was not made for them."""
        if self.mask_id is not None and self.bos_id is not None and not (prefix_ids or suffix_ids):
            self.prefix_ids, self.suffix_ids = (self.bos_id,), (self.eos_id,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, *eos_ids)))
        for id in (*self.eos_ids, *prefix_ids, *suffix_ids):
            self.id_bytes(id)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The tokenizer in a ``tokenizer.model`` file, or in a directory that holds one; UserError if it is not one."""
        path = Path(path)
        if path.is_dir():
            if not (path / FILE_NAME).is_file():
                raise UserError(f"no tokenizer in {path}", hint=f"expected a file {FILE_NAME} in it")
            path /= FILE_NAME
        try:
            return cls(path.read_bytes(), name=str(path))
        except FileNotFoundError:
            raise UserError(
                f"no such tokenizer: {path}", hint="name a tokenizer.model file or a model directory"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    @classmethod
    def from_bytes(cls, model_bytes: bytes) -> Self:
        """The tokenizer in the bytes of a ``tokenizer.model`` file."""
        return cls(model_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        made = functools.partial(
            type(self),
            self.model_bytes,
            name=self.name,
            prefix_ids=self.prefix_ids,
            suffix_ids=self.suffix_ids,
            eos_ids=self.eos_ids,
            chat_template=self.chat_template,
        )
        return made, ()

    @property
    def first_id(self) -> int:
        """The id that a text begins after: its beginning of text where it has one, else its end of text."""
        return (self.prefix_ids or (self.eos_id,))[0]

    def save(self, path: str | Path) -> None:
        """Write the model file, byte for byte what was loaded or trained; where that fails, nothing is changed."""
        disk.write(Path(path), self.model_bytes)

    def proto(self) -> Any:
        """The model as SentencePiece's own ``ModelProto`` message; UserError if the bytes are not one."""
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as model_pb2

        proto = model_pb2.ModelProto()
        try:
            proto.ParseFromString(self.model_bytes)
        except DecodeError:
            raise self._not_a_model() from None
        if not proto.pieces or not proto.HasField("trainer_spec"):
            raise self._not_a_model()
        return proto

    def _not_a_model(self) -> UserError:
        if self.model_bytes[:1] == b"{":
            return UserError(
                f"{self.name} is JSON, expected a SentencePiece model", hint="it is called tokenizer.model"
            )
        return UserError(f"{self.name} is not a SentencePiece model, or it is damaged", hint="make one: tokenize train")

    def _processor_of(self, proto: Any) -> Any:
        import sentencepiece

        if self.identity and self.dummy_prefix:
            proto.normalizer_spec.add_dummy_prefix = False  # a text may come in parts; only its first gets the prefix
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except (RuntimeError, ValueError):
            raise self._not_a_model() from None

    def _read_pieces(self, proto: Any) -> None:
        self._table: list[bytes] = []
        texts: list[str] = []
        self._named: dict[str, int] = {}
        unk_surface = proto.trainer_spec.unk_surface.encode()
        self.is_byte = np.zeros(self.vocab_size, bool)
        """[V] whether a piece is a single byte."""
        for id, piece in enumerate(proto.pieces):
            if piece.type in (CONTROL, UNKNOWN):
                self._named[piece.piece] = id
            if piece.type == BYTE:
                self._table.append(bytes([int(piece.piece[3:-1], 16)]))
                self.is_byte[id] = True
            elif piece.type in (CONTROL, UNUSED):
                self._table.append(b"")
            elif piece.type == UNKNOWN:
                self._table.append(unk_surface)
            else:
                text = piece.piece.replace(SPACE, " ")
                texts.append(text)
                self._table.append(text.encode())
        sizes = np.fromiter(map(len, self._table), np.int64, self.vocab_size)
        self.piece_bytes: npt.NDArray[np.int64] = sizes
        """[V] UTF-8 bytes that a piece stands for; 0 for control pieces."""
        self.byte_ids = tuple(int(id) for id in np.flatnonzero(self.is_byte))
        self.lossless = self.identity and len(self.byte_ids) == 256
        sp = self._processor
        self.unk_id: int = sp.unk_id()
        self.bos_id: int | None = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_id: int = sp.eos_id()
        self.pad_id: int = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
        if self.eos_id < 0:
            raise UserError(f"{self.name} has no end-of-text piece", hint="train one with eos_id left as it is")
        # Where can text be cut so that no piece crosses the cut?
        breaks = [text for text in texts if "\n" in text]
        self._cut: re.Pattern[str] | None = None  # nowhere
        if self.identity and not any("\n" in text.rstrip("\n") for text in breaks):
            runs = any("\n\n" in text for text in breaks)
            self._cut = re.compile(r"[^\n]*\n+|[^\n]+" if runs else r"[^\n]*\n|[^\n]+")
        self._words_apart = not any(" " in text.lstrip(" ") for text in texts)

    # Text to ids.

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any beginning- or end-of-text id; UserError for a lone surrogate."""
        ids: list[int] = self.encode_arrays([text])[0].tolist()
        return ids

    def encode_special(self, text: str) -> list[int]:
        """As ``encode``, but the name of a control piece, as <|endoftext|>, gives its id.

        A model with ``dummy_prefix`` gets its space after each of them too, as in llama.cpp.
        """
        names = "|".join(
            (r"\s*" if name == MASK else "") + re.escape(name)
            for name in sorted(self._named, key=len, reverse=True)
            if name
        )
        ids: list[int] = []
        for index, part in enumerate(re.split(f"({names})", text) if names else [text]):
            ids += [self._named[part.lstrip()]] if index % 2 else self.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """The ids of each text, by ``threads`` threads; equal to ``[encode(text) for text in texts]``."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads=threads)]

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text as SentencePiece writes them: a space as U+2581, a byte as <0x0A>."""
        return [self.piece(id) for id in self.encode(text)]

    def piece(self, id: int) -> str:
        """The piece with this id as SentencePiece writes it; UserError where there is none."""
        self.id_bytes(id)
        piece: str = self._processor.id_to_piece(int(id))
        return piece

    def encode_arrays(
        self, texts: Sequence[str], *, continuing: Sequence[bool] | None = None, threads: int | None = None
    ) -> list[IntArray]:
        """The ids of each text, as arrays of int32.

        ``continuing[i]`` says that texts[i] goes on from what came before, so that it gets no dummy prefix.
        """
        segments: list[str] = []
        counts: list[int] = []
        for index, text in enumerate(texts):
            before = len(segments)
            if text:
                if self.dummy_prefix and self.identity and not (continuing and continuing[index]):
                    text = " " + text
                segments.extend(self._segments(text))
            counts.append(len(segments) - before)
        arrays = self._encode_segments(segments, threads)
        if len(arrays) == len(texts) and all(count == 1 for count in counts):
            return arrays
        results: list[IntArray] = []
        start = 0
        for count in counts:
            results.append(_joined(arrays[start : start + count]))
            start += count
        return results

    def _encode_segments(self, segments: list[str], threads: int | None) -> list[IntArray]:
        if not segments:
            return []
        few = len(segments) == 1 or (len(segments) < 64 and sum(map(len, segments)) < FEW)
        try:
            arrays: list[IntArray] = list(
                self._processor.encode_as_numpy(segments, num_threads=1 if few else threads or -1)
            )
        except (UnicodeEncodeError, TypeError):
            raise not_text(segments) from None
        if self.lossless:
            sign = np.array([self.byte_ids[byte] for byte in SPACE_BYTES], np.int32)
            arrays = [sign if text == SPACE else ids for text, ids in zip(segments, arrays, strict=True)]
        return arrays

    def _segments(self, text: str) -> Iterable[str]:
        """``text`` in parts that are encoded on their own with the same result as the whole."""
        if self.lossless and SPACE in text:
            return [
                part
                for whole in re.split(f"({SPACE})", text)
                if whole
                for part in ([whole] if whole == SPACE else self._lines(whole))
            ]
        return self._lines(text)

    def _lines(self, text: str) -> Iterable[str]:
        if self._cut is None or (len(text) <= GROUP and not self._unigram):
            return [text]
        # A unigram segmentation sums float32 scores along its text (Viterbi), so that its ties depend on where it
        # begins: the unit is always one line. BPE merges do not depend on what surrounds them: a few lines at once.
        parts = self._cut.findall(text) if self._unigram else self._groups(text)
        return [cut for part in parts for cut in self._words(part)] if len(text) > LONG else parts

    def _groups(self, text: str) -> Iterator[str]:
        start, size = 0, len(text)
        while size - start > GROUP:
            end = text.find("\n", start + GROUP) + 1
            while 0 < end < size and text[end] == "\n":
                end += 1
            if not 0 < end < size:
                break
            yield text[start:end]
            start = end
        yield text[start:]

    def _words(self, line: str) -> Iterator[str]:
        while self._words_apart and len(line) > LONG:
            end = line.find(" ", LONG)
            while end > 0 and line[end - 1] == " ":
                end -= 1
            if end <= 0:
                break
            yield line[:end]
            line = line[end:]
        yield line

    # Ids to text.

    def decode(self, ids: Iterable[int], *, continuing: bool = False) -> str:
        """The text of ids; control pieces have none, bytes that are not UTF-8 become U+FFFD.

        ``continuing`` keeps the space that a model with ``dummy_prefix`` puts before a text. UserError for an id that
        is not in the vocabulary.
        """
        table, size = self._table, self.vocab_size
        listed = [int(id) for id in ids]
        if listed and not (min(listed) >= 0 and max(listed) < size):
            self.id_bytes(next(id for id in listed if not 0 <= id < size))
        data = b"".join([table[id] for id in listed])
        if self.dummy_prefix and not continuing:
            data = _without_space(data)
        return data.decode("utf-8", "replace")

    def id_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that an id stands for, b"" for control pieces; UserError for an id out of range."""
        if not 0 <= id < self.vocab_size:
            raise UserError(f"{id} is not an id of {self.name}", hint=f"its ids are 0 to {self.vocab_size - 1}")
        return self._table[id]

    def stream(self, *, continuing: bool = False) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        strip = self.dummy_prefix and not continuing
        return StreamDecoder(self.id_bytes, first=_without_space if strip else None)


def _without_space(data: bytes) -> bytes:
    return data.removeprefix(b" ")


def _joined(arrays: list[IntArray]) -> IntArray:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)
