"""A Hugging Face ``tokenizer.json``, run by the tokenizers library, with the same ids as transformers.

The library encodes. Decoding is done here by the bytes of each piece if they are known (byte-level BPE, SentencePiece
with or without byte fallback), so that a stream yields whole characters, and by the library otherwise (WordPiece).
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfcli.errors import UserError
from tfcli.text.tokenizers.codec import IntArray, TextStream, not_text
from tfcli.text.tokenizers.json_parts import no_prefix, part, pieces_to_bytes, puts_prefix, template_ids
from tfcli.text.tokenizers.sentencepiece import StreamDecoder

MOST_BYTES = 1 << 28
"""A larger tokenizer.json is refused; the largest known have about 35 MB."""
MOST_GAPS = 1 << 20
"""The most ids without a piece in a vocabulary."""
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")
"""Names of end-of-text pieces, tried if the files do not name one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The settings for a tokenizer.json from the other files in its directory.

    ``bos``, ``eos``, ``pad``, ``unk`` and ``others`` name special pieces, which are added if the vocabulary lacks them;
    ``more_eos`` are further ids that end a text. ``add_bos`` and ``add_eos`` say whether a text gets them; None leaves
    that to tokenizer.json. ``below`` is the number of ids of the model: added pieces at or above it are left out, and
    ids below it without a piece have no text.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    others: tuple[str, ...] = ()
    more_eos: tuple[int, ...] = ()
    add_bos: bool | None = None
    add_eos: bool | None = None
    below: int | None = None
    chat_template: str | None = None


class JsonTokenizer:
    """The tokenizer in the text of a tokenizer.json; see ``Codec`` for its attributes and methods.

    Raises UserError for a text that the tokenizers library cannot read, and if no piece ends a text.
    """

    def __init__(self, text: str, *, name: str = "the tokenizer", roles: Roles | None = None) -> None:
        self.name = name
        self.text = text
        self.roles = roles or Roles()
        self.hash = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self.chat_template = self.roles.chat_template
        self._lock = threading.Lock()
        self.backend: Any = _backend(_cut(text, self.roles.below), name)
        self._add_roles()
        self._read_pieces()
        self._read_roles()

    @classmethod
    def from_file(cls, path: str | Path, *, roles: Roles | None = None) -> JsonTokenizer:
        """Load a tokenizer.json file. Raises UserError for one that cannot be read."""
        path = Path(path)
        try:
            if path.stat().st_size > MOST_BYTES:
                raise UserError(f"{path} has {path.stat().st_size} bytes, at most {MOST_BYTES} are read")
            return cls(path.read_text(encoding="utf-8"), name=str(path), roles=roles)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text", hint="copy it again") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(JsonTokenizer, self.text, name=self.name, roles=self.roles), ()

    def _add_roles(self) -> None:
        """Mark the named pieces as special, adding those that the vocabulary lacks."""
        from tokenizers import AddedToken

        roles, backend = self.roles, self.backend
        named = [name for name in (roles.bos, roles.eos, roles.pad, roles.unk, *roles.others) if name]
        if roles.below is not None:
            named = [name for name in named if backend.token_to_id(name) is not None]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in named])
        backend.encode_special_tokens = True

    def _read_pieces(self) -> None:
        vocab: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"{self.name} has no pieces")
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > len(vocab) + MOST_GAPS:
            raise UserError(f"{self.name} has {len(vocab)} pieces and an id {self.vocab_size - 1}: it is damaged")
        if self.vocab_size < (self.roles.below or 0) <= len(vocab) + MOST_GAPS:
            self.vocab_size = self.roles.below or 0
        self._pieces = [""] * self.vocab_size
        for piece, id in vocab.items():
            self._pieces[id] = piece
        self.added: dict[int, bool] = {
            id: token.special for id, token in self.backend.get_added_tokens_decoder().items()
        }
        """{id: whether it is special} of the added pieces, which are matched before all others."""
        self._textless = frozenset(id for id, piece in enumerate(self._pieces) if not piece or self.added.get(id))
        of_piece, self._first = pieces_to_bytes(part(self.backend.decoder))
        self._table: list[bytes] | None = None
        if of_piece:
            self._table = [b"" if id in self._textless else of_piece(text) for id, text in enumerate(self._pieces)]
        self._continuing = self if not puts_prefix(self.backend) else None

    def _read_roles(self) -> None:
        roles = self.roles
        self.bos_id = self._id(roles.bos)
        self.pad_id = self._id(roles.pad)
        self.unk_id = self._id(roles.unk or getattr(self.backend.model, "unk_token", None))
        before, after = template_ids(part(self.backend.post_processor))
        ends = [self._id(roles.eos), *roles.more_eos, *after, *map(self._id, ENDS)]
        known = [id for id in ends if id is not None]
        if not known:
            raise UserError(
                f"{self.name} does not say which piece ends a text",
                hint='give "eos_token" in tokenizer_config.json',
            )
        self.eos_id: int = known[0]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, *roles.more_eos)))
        if roles.add_bos is not None or roles.add_eos is not None:
            before = (self.bos_id,) if roles.add_bos and self.bos_id is not None else ()
            after = (self.eos_id,) if roles.add_eos and roles.eos else ()
        self.prefix_ids: tuple[int, ...] = before
        self.suffix_ids: tuple[int, ...] = after
        self.first_id: int = (*before, self.eos_id)[0]
        for id in (*self.eos_ids, *before, *after):
            self._check(id)

    def _id(self, piece: str | None) -> int | None:
        return None if piece is None else self.backend.token_to_id(piece)

    # Text to ids.

    def encode(self, text: str) -> list[int]:
        """Encode a text; names of special pieces in it are plain text."""
        return self._encode([text], threads=1)[0]

    def encode_special(self, text: str) -> list[int]:
        """Encode a text in which names of special pieces give their ids, as in a rendered chat template."""
        return self._encode([text], threads=1, special=True)[0]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Encode each text; ``threads=1`` uses one thread, else the tokenizers library chooses."""
        return self._encode(texts, threads=threads)

    def encode_arrays(
        self, texts: Sequence[str], *, continuing: Sequence[bool] | None = None, threads: int | None = None
    ) -> list[IntArray]:
        """Encode each text as int32; where ``continuing[i]`` is true, texts[i] gets no space before it."""
        if self._continuing is not self and continuing and any(continuing):
            parts = zip(texts, continuing, strict=True)
            lists = [(self._without_prefix() if goes_on else self).encode(text) for text, goes_on in parts]
        else:
            lists = self._encode(texts, threads=threads)
        return [np.array(ids, dtype=np.int32) for ids in lists]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Encode each text; return its ids and, for each id, the characters it comes from, as the library reports."""
        with self._lock:
            try:
                encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                raise not_text(texts) from None
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def _encode(self, texts: Sequence[str], *, threads: int | None, special: bool = False) -> list[list[int]]:
        with self._lock:  # encode_special_tokens is a state of the library's object
            if special:
                self.backend.encode_special_tokens = False
            try:
                if threads == 1 or len(texts) < 2:
                    groups = [self.backend.encode_batch_fast([text], add_special_tokens=False) for text in texts]
                else:
                    groups = [self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
            except (TypeError, UnicodeEncodeError):
                raise not_text(texts) from None
            finally:
                self.backend.encode_special_tokens = True
        return [encoding.ids for group in groups for encoding in group]

    def _without_prefix(self) -> JsonTokenizer:
        """Return this tokenizer without the space before a text, made at the first use."""
        if self._continuing is None:
            text = json.dumps(no_prefix(json.loads(self.text)), ensure_ascii=False)
            self._continuing = JsonTokenizer(text, name=self.name, roles=self.roles)
        return self._continuing

    # Ids to text.

    def decode(self, ids: Iterable[int], *, continuing: bool = False) -> str:
        """Decode ids without special pieces; bytes that are not UTF-8 become U+FFFD."""
        listed = [int(id) for id in ids]
        for id in {min(listed), max(listed)} if listed else ():
            self._check(id)
        if self._table is None:
            return self._decode(listed, continuing=continuing)
        parts = [data for data in map(self._table.__getitem__, listed) if data]
        if parts and self._first and not continuing:
            parts[0] = self._first(parts[0])
        return b"".join(parts).decode("utf-8", "replace")

    def _decode(self, ids: list[int], *, continuing: bool) -> str:
        """Decode with the library; a continuing text is decoded after a word, which is removed again."""
        before = [self._word] if continuing and self._word is not None else []
        whole: str = self.backend.decode(before + ids, skip_special_tokens=True)
        return whole[len(self.backend.decode(before)) :] if before else whole

    @functools.cached_property
    def _word(self) -> int | None:
        """Any ordinary word of the vocabulary."""
        texts = ((id, piece) for id, piece in enumerate(self._pieces) if id not in self._textless)
        return next((id for id, piece in texts if piece.isalnum()), None)

    def stream(self, *, continuing: bool = False) -> TextStream:
        """Return a decoder for ids that come one at a time."""
        if self._table is None:
            first = [self._word] if continuing and self._word is not None else []
            return _Window(self.backend.decode, self._check, self._textless, first)
        return StreamDecoder(self.id_bytes, first=None if continuing else self._first)

    def id_bytes(self, id: int) -> bytes:
        """Return the UTF-8 bytes of an id; for WordPiece, of the text it adds after another word."""
        self._check(id)
        return self._decode([id], continuing=True).encode() if self._table is None else self._table[id]

    def piece(self, id: int) -> str:
        """Return the piece as tokenizer.json writes it, "" for an id that has none."""
        self._check(id)
        return self._pieces[id]

    def _check(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise UserError(f"{id} is not an id of {self.name}", hint=f"its ids are 0 to {self.vocab_size - 1}")


class _Window:
    """Streams the library's decoding: each id adds what it changes in the text of the last few ids."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        check: Callable[[int], None],
        textless: frozenset[int],
        first: list[int],
    ) -> None:
        self._decode, self._check, self._textless = decode, check, textless
        self._ids = first
        self._shown = len(first)  # the text of these ids has been returned

    def push(self, id: int) -> str:
        self._check(id)
        if id in self._textless:
            return ""
        self._ids.append(id)
        text = self._decode(self._ids)
        return "" if text.endswith("\ufffd") else self._fresh(text)

    def flush(self) -> str:
        return self._fresh(self._decode(self._ids)) if len(self._ids) > self._shown else ""

    def _fresh(self, text: str) -> str:
        fresh = text[len(self._decode(self._ids[: self._shown])) :]
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return fresh


def _backend(text: str, name: str) -> Any:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        raise UserError(
            f"{name} is not a tokenizer.json that the tokenizers library reads: {str(error)[:200]}",
            hint="copy it again, or save it anew with transformers",
        ) from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _cut(text: str, below: int | None) -> str:
    """Remove the added pieces that the model has no ids for from a tokenizer.json."""
    if below is None:
        return text
    try:
        data = json.loads(text)
        kept = [token for token in data["added_tokens"] if token["id"] < below]
        if len(kept) == len(data["added_tokens"]):
            return text
    except (ValueError, KeyError, TypeError, RecursionError):
        return text  # the library reports what is wrong with it
    return json.dumps({**data, "added_tokens": kept}, ensure_ascii=False)
