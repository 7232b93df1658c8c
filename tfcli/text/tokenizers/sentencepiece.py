"""The tokenizer: SentencePiece (Kudo and Richardson 2018), used without loss.

``decode(encode(text)) == text`` for every string, by identity normalization, byte fallback, no dummy prefix and
preserved spaces. Two cases need care: SentencePiece writes a space as U+2581, so that character itself is encoded as
bytes here; and it is slow on long strings, so text is encoded a few lines at a time, split where no piece can cross.
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
"""SentencePiece's symbol for a space."""
MASK = "[MASK]"
"""The control piece of a masked token. It replaces the spaces before it too, since pieces begin with their spaces."""
SENTINEL = "<extra_id_{}>"
"""The control pieces that stand for masked spans, by their number, as in T5."""
SPACE_BYTES = tuple(SPACE.encode())
GROUP = 512
"""Approximate characters encoded at once: enough for speed, few enough for the processor's cache."""
LONG = 1 << 16
"""A line longer than this is split before a word."""
FEW = 1 << 14
"""Fewer characters than this are encoded by one thread."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type


class StreamDecoder:
    """Turns ids into text one at a time and never returns half a character; see ``TextStream``.

    Bytes that are not UTF-8 become U+FFFD. ``bytes_of`` returns the bytes of an id; ``first`` changes those of the
    first id that has any.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], *, first: Callable[[bytes], bytes] | None = None) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = first

    def push(self, id: int) -> str:
        """Return the text that this id completes, often all of its piece, sometimes ""."""
        data = self._bytes_of(id)
        if self._first and data:
            data, self._first = self._first(data), None
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Return what remains at the end: U+FFFD for an incomplete character, else ""."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class Tokenizer:
    """A SentencePiece model and the ids of its special pieces; see ``Codec``.

    ``dummy_prefix`` is true if the model puts a space before a text (as for Llama and Mistral), ``lossless`` if
    decoding restores every text. A model with the piece [MASK] is an encoder's: its texts stand between beginning and
    end of text. A model without byte fallback loads too. ``prefix_ids``, ``suffix_ids``, ``eos_ids`` and
    ``chat_template`` come from the other files of the SentencePiece model's directory.
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
        """The ids of the pieces for masked spans, () if there are none."""
        if self.mask_id is not None and self.bos_id is not None and not (prefix_ids or suffix_ids):
            self.prefix_ids, self.suffix_ids = (self.bos_id,), (self.eos_id,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, *eos_ids)))
        self.first_id: int = (*self.prefix_ids, self.eos_id)[0]
        for id in (*self.eos_ids, *prefix_ids, *suffix_ids):
            self.id_bytes(id)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a ``tokenizer.model`` file, or the one in a directory. Raises UserError for anything else."""
        path = Path(path)
        if path.is_dir():
            if not (path / FILE_NAME).is_file():
                raise UserError(f"no tokenizer in {path}", hint=f"expected a file {FILE_NAME} in it")
            path /= FILE_NAME
        try:
            return cls(path.read_bytes(), name=str(path))
        except FileNotFoundError:
            hint = "name a tokenizer.model file or a model directory"
            raise UserError(f"no such tokenizer: {path}", hint=hint) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        options = {key: getattr(self, key) for key in ("name", "prefix_ids", "suffix_ids", "eos_ids", "chat_template")}
        return functools.partial(type(self), self.model_bytes, **options), ()

    def save(self, path: str | Path) -> None:
        """Write the model file, byte for byte as loaded or trained; if that fails, nothing changes."""
        disk.write(Path(path), self.model_bytes)

    def proto(self) -> Any:
        """Parse the model as SentencePiece's ``ModelProto``. Raises UserError if the bytes are not one."""
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
            return UserError(f"{self.name} is JSON, expected a SentencePiece model", hint="name a tokenizer.model file")
        return UserError(f"{self.name} is not a SentencePiece model, or it is damaged", hint="make one: tokenize train")

    def _processor_of(self, proto: Any) -> Any:
        import sentencepiece

        if self.identity and self.dummy_prefix:
            proto.normalizer_spec.add_dummy_prefix = (
                False  # added in encode_arrays: only the first part of a text gets it
            )
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
        """Which pieces are a single byte, (V,)."""
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
        """The number of UTF-8 bytes of each piece, (V,); 0 for control pieces."""
        self.byte_ids = tuple(int(id) for id in np.flatnonzero(self.is_byte))
        self.lossless = self.identity and len(self.byte_ids) == 256
        sp = self._processor
        self.unk_id: int = sp.unk_id()
        self.bos_id: int | None = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_id: int = sp.eos_id()
        self.pad_id: int = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
        if self.eos_id < 0:
            raise UserError(f"{self.name} has no end-of-text piece", hint="train one with eos_id left as it is")
        # Find where text can be split so that no piece crosses the split.
        breaks = [text for text in texts if "\n" in text]
        self._cut: re.Pattern[str] | None = None  # nowhere
        if self.identity and not any("\n" in text.rstrip("\n") for text in breaks):
            runs = any("\n\n" in text for text in breaks)
            self._cut = re.compile(r"[^\n]*\n+|[^\n]+" if runs else r"[^\n]*\n|[^\n]+")
        self._words_apart = not any(" " in text.lstrip(" ") for text in texts)

    # Text to ids.

    def encode(self, text: str) -> list[int]:
        """Encode a text, without any beginning- or end-of-text id. Raises UserError for a lone surrogate."""
        ids: list[int] = self.encode_arrays([text])[0].tolist()
        return ids

    def encode_special(self, text: str) -> list[int]:
        """Encode a text in which names of control pieces, such as <|endoftext|>, give their ids.

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
        """Encode each text with ``threads`` threads; equal to ``[encode(text) for text in texts]``."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads=threads)]

    def pieces(self, text: str) -> list[str]:
        """Return the pieces of a text as SentencePiece writes them: a space as U+2581, a byte as <0x0A>."""
        return [self.piece(id) for id in self.encode(text)]

    def piece(self, id: int) -> str:
        """Return a piece as SentencePiece writes it. Raises UserError for an unknown id."""
        self.id_bytes(id)
        piece: str = self._processor.id_to_piece(int(id))
        return piece

    def encode_arrays(
        self, texts: Sequence[str], *, continuing: Sequence[bool] | None = None, threads: int | None = None
    ) -> list[IntArray]:
        """Encode each text as an int32 array; where ``continuing[i]`` is true, texts[i] gets no dummy prefix."""
        segments: list[str] = []
        bounds = [0]
        for index, text in enumerate(texts):
            if text:
                if self.dummy_prefix and self.identity and not (continuing and continuing[index]):
                    text = " " + text
                segments.extend(self._segments(text))
            bounds.append(len(segments))
        arrays = self._encode_segments(segments, threads)
        if bounds == list(range(len(texts) + 1)):
            return arrays
        empty = [np.empty(0, np.int32)]
        return [np.concatenate(arrays[start:end] or empty) for start, end in itertools.pairwise(bounds)]

    def _encode_segments(self, segments: list[str], threads: int | None) -> list[IntArray]:
        if not segments:
            return []
        few = len(segments) == 1 or (len(segments) < 64 and sum(map(len, segments)) < FEW)
        try:
            arrays: list[IntArray] = self._processor.encode_as_numpy(segments, num_threads=1 if few else threads or -1)
        except (UnicodeEncodeError, TypeError):
            raise not_text(segments) from None
        if self.lossless:
            sign = np.array([self.byte_ids[byte] for byte in SPACE_BYTES], np.int32)
            return [sign if text == SPACE else ids for text, ids in zip(segments, arrays, strict=True)]
        return list(arrays)

    def _segments(self, text: str) -> Iterable[str]:
        """Split ``text`` into parts that give the same ids as the whole."""
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
        # A unigram segmentation sums float32 scores along its text (Viterbi), so its ties depend on where it begins:
        # always encode one line. BPE merges do not depend on their surroundings: encode a few lines at once.
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
        """Decode ids; control pieces have no text, bytes that are not UTF-8 become U+FFFD.

        ``continuing`` keeps the space that a model with ``dummy_prefix`` puts before a text. Raises UserError for an
        unknown id.
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
        """Return the UTF-8 bytes of an id, b"" for a control piece. Raises UserError for an unknown id."""
        if not 0 <= id < self.vocab_size:
            raise UserError(f"{id} is not an id of {self.name}", hint=f"its ids are 0 to {self.vocab_size - 1}")
        return self._table[id]

    def stream(self, *, continuing: bool = False) -> StreamDecoder:
        """Return a decoder for ids that come one at a time."""
        strip = self.dummy_prefix and not continuing
        return StreamDecoder(self.id_bytes, first=_without_space if strip else None)


def _without_space(data: bytes) -> bytes:
    return data.removeprefix(b" ")
