"""Token shards: a header and the ids of a text, memory-mapped, made once and read many times.

Layout, little endian: magic 8 bytes, version u32, bytes per id u32, vocabulary size u64, tokens u64, documents u64,
UTF-8 bytes of the text u64, CRC-32 of the ids u32, 4 bytes of zeros, SHA-256 of the tokenizer model 32 bytes, zeros up
to 128 bytes; then the ids as uint16, or uint32 for a vocabulary of more than 65536.
"""

from __future__ import annotations

import os
import struct
import zlib
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
    """The ids of one text, and what the header says about it."""

    path: Path
    ids: npt.NDArray[Any]
    """[tokens] uint16 or uint32, memory-mapped read-only."""
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
                hint=f"{digest.hex()[:12]} made it, {tokenizer_hash[:12]} was given: make the shard again",
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
        """Read all ids and compare their checksum; UserError where the file was damaged."""
        checksum = 0
        for start in range(0, self.tokens, 1 << 22):
            checksum = zlib.crc32(self.ids[start : start + (1 << 22)].tobytes(), checksum)
        if checksum != self.checksum:
            raise UserError(f"{self.path} is damaged: its checksum is wrong", hint="make it again")


class ShardWriter:
    """Writes a shard aside and, when its block ends without an error, syncs it and puts it in place.

    >>> with ShardWriter(path, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size) as writer:
    ...     writer.write(ids)
    ...     writer.count(documents=1, bytes=len(text.encode()))

    Raises RunError, naming the directory, when the disk is full; then nothing is left behind.
    """

    def __init__(self, path: str | Path, *, tokenizer_hash: str, vocab_size: int) -> None:
        self.path = Path(path)
        self.tokens = self.documents = self.bytes = 0
        self._aside = disk.aside(self.path)
        self._digest = bytes.fromhex(tokenizer_hash)
        self._vocab_size = vocab_size
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._checksum = 0

    def __enter__(self) -> ShardWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._aside.open("wb")
            self._file.write(bytes(HEADER_BYTES))
        except OSError as error:
            raise self._failed(error) from None
        return self

    def write(self, ids: npt.NDArray[Any]) -> None:
        """Append ids."""
        data = ids.astype(self._dtype, copy=False).tobytes()
        self._checksum = zlib.crc32(data, self._checksum)
        self.tokens += len(ids)
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from None

    def count(self, *, documents: int = 0, bytes: int = 0) -> None:
        """Add to what the header says about the text."""
        self.documents += documents
        self.bytes += bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                self._abandon()
        except OSError as failure:
            self._abandon()
            raise self._failed(failure) from None

    def _finish(self) -> None:
        header = HEADER.pack(
            MAGIC,
            VERSION,
            self._dtype.itemsize,
            self._vocab_size,
            self.tokens,
            self.documents,
            self.bytes,
            self._checksum,
            self._digest,
        )
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._aside.replace(self.path)

    def _abandon(self) -> None:
        """Close and remove what is half-written; closing can fail as well, on a full disk."""
        try:
            self._file.close()
        except OSError:
            pass
        finally:
            self._aside.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> RunError:
        full = disk.is_full(error)
        what = "the disk is full" if full else (error.strerror or str(error))
        return RunError(
            f"token shards cannot be written to {self.path.parent}: {what}",
            hint="make room there, or choose another directory" if full else None,
        )
