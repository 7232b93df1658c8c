"""Token shards: a header and the ids of a text, memory-mapped, written once and read many times.

Layout, little endian: magic 8 bytes, version u32, bytes per id u32, vocabulary size u64, tokens u64, documents u64,
UTF-8 bytes of the text u64, CRC-32 of the ids u32, 4 bytes of zeros, SHA-256 of the tokenizer model 32 bytes, zeros up
to 128 bytes; then the ids as uint16, or uint32 for a vocabulary of more than 65536.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tfcli import disk
from tfcli.errors import RunError, UserError

MAGIC = b"TFSHARD\0"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQQI4x32s")
HEADER_BYTES = 128


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The ids of one text and the content of the header."""

    path: Path
    ids: npt.NDArray[Any]
    """(tokens,) uint16 or uint32, memory-mapped read-only."""
    tokenizer_hash: str
    """SHA-256 of the tokenizer's model bytes, hex."""
    vocab_size: int
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of the text that the ids stand for."""
    checksum: int
    """CRC-32 of the ids."""

    @classmethod
    def open(cls, path: str | Path, tokenizer_hash: str | None = None) -> Shard:
        """Map the shard at ``path``.

        Raises UserError for a file that is not a shard, is truncated, or was made with a tokenizer other than
        ``tokenizer_hash``.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"the shard {path} cannot be read: {error.strerror}") from None
        if not header.startswith(MAGIC) or len(header) < HEADER_BYTES:
            raise UserError(f"{path} is not a token shard", hint="expected a .bin file that tfcli wrote")
        _, version, width, vocab_size, tokens, documents, num_bytes, checksum, digest = HEADER.unpack_from(header)
        if version != VERSION or width not in (2, 4):
            raise UserError(f"{path} is a token shard of version {version}, expected {VERSION}", hint="make it again")
        expected = HEADER_BYTES + tokens * width
        if size != expected:
            raise UserError(f"{path} has {size} bytes, expected {expected}: it is truncated", hint="make it again")
        if tokenizer_hash is not None and digest.hex() != tokenizer_hash:
            raise UserError(
                f"{path} was made with another tokenizer",
                hint=f"expected {tokenizer_hash[:12]}, found {digest.hex()[:12]}: make the shard again",
            )
        dtype = np.dtype("<u2" if width == 2 else "<u4")
        ids: npt.NDArray[Any] = (
            np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=(tokens,)) if tokens else np.empty(0, dtype)
        )
        return cls(
            path=path,
            ids=ids,
            tokenizer_hash=digest.hex(),
            vocab_size=vocab_size,
            tokens=tokens,
            documents=documents,
            bytes=num_bytes,
            checksum=checksum,
        )

    def verify(self) -> None:
        """Read all ids and compare their checksum. Raises UserError for a damaged file."""
        checksum = 0
        for start in range(0, self.tokens, 1 << 22):
            checksum = zlib.crc32(self.ids[start : start + (1 << 22)].tobytes(), checksum)
        if checksum != self.checksum:
            raise UserError(f"{self.path} is damaged: its checksum is wrong", hint="make it again")


class ShardWriter:
    """Writes a shard aside and puts it in place, synced, when its block ends without an error.

    >>> with ShardWriter(path, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size) as writer:
    ...     writer.write(ids)
    ...     writer.count(documents=1, bytes=len(text.encode()))

    Raises RunError, naming the directory, when the disk is full; nothing is left behind then.
    """

    def __init__(self, path: str | Path, *, tokenizer_hash: str, vocab_size: int) -> None:
        self.path = Path(path)
        self.tokens = self.documents = self.bytes = 0
        self._digest = bytes.fromhex(tokenizer_hash)
        self._vocab_size = vocab_size
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._checksum = 0

    def __enter__(self) -> ShardWriter:
        with self._failures():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self._file = stack.enter_context(disk.whole_file(self.path))
                self._file.write(bytes(HEADER_BYTES))
                self._stack = stack.pop_all()
        return self

    def write(self, ids: npt.NDArray[Any]) -> None:
        """Append ids."""
        data = ids.astype(self._dtype, copy=False).tobytes()
        self._checksum = zlib.crc32(data, self._checksum)
        self.tokens += len(ids)
        with self._failures():
            self._file.write(data)

    def count(self, *, documents: int = 0, bytes: int = 0) -> None:
        """Add to the header's totals of the text."""
        self.documents += documents
        self.bytes += bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._failures():
            if kind is not None:
                self._stack.__exit__(kind, error, trace)
                return
            with self._stack:
                totals = self._vocab_size, self.tokens, self.documents, self.bytes, self._checksum
                self._file.seek(0)
                self._file.write(HEADER.pack(MAGIC, VERSION, self._dtype.itemsize, *totals, self._digest))

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = disk.is_full(error)
            what = "the disk is full" if full else (error.strerror or str(error))
            raise RunError(
                f"token shards cannot be written to {self.path.parent}: {what}",
                hint="make room there, or choose another directory" if full else None,
            ) from None
