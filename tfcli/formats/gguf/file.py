"""GGUF files, version 2 and 3: untrusted when read, written whole or not at all.

A file is a header (metadata, names, shapes and types of tensors) and the tensors' bytes, each at an offset given in the
header. Specification: ggml's docs/gguf.md. Reading checks every length and offset against the file before anything is
allocated, and maps the tensors instead of copying them.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfcli import disk
from tfcli.errors import UserError
from tfcli.formats.gguf import blocks
from tfcli.formats.gguf.blocks import TYPES, Bytes, Floats
from tfcli.text.read import files

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "b1", 10: "u8", 11: "i8", 12: "f8"}
"""{type of a metadata value: numpy's name}."""
STRING, ARRAY = 8, 9
LARGEST_HEADER = 1 << 28
MOST_VALUES = 1 << 22
"""Values in all arrays of a header together: several vocabularies of half a million."""
MOST_ENTRIES = 1 << 16
"""Largest number of metadata keys, and of tensors."""
LONGEST_KEY, LONGEST_NAME, MOST_DIMENSIONS = 65535, 63, 4
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Types that are not read, for messages."""
AT_ONCE = 1 << 20
"""Numbers quantized per call."""
AGAIN = "convert the original model with a current llama.cpp"
OLDER = (b"lmgg", b"fmgg", b"tjgg", b"algg")
"""ggml, ggmf, ggjt and ggla: the formats that GGUF replaced."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GgufTensor:
    """One tensor of an open file; its bytes are read from the file when they are accessed."""

    name: str
    shape: tuple[int, ...]
    """Outermost first: (rows, cols) of a matrix."""
    type: str
    """A key of ``blocks.TYPES``."""
    data: Bytes = field(repr=False)
    """(rows, bytes of a row), read-only."""
    offset: int = field(repr=False)
    """Position of the first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return self.data.nbytes

    def dequantize(self) -> Floats:
        """Return the numbers in fp32."""
        return blocks.dequantize(self.type, self.data).reshape(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GgufFile:
    """An open file: its metadata as plain Python values and its tensors, in the order of the file."""

    path: Path
    version: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GgufTensor] = field(repr=False)
    mapped: mmap.mmap = field(repr=False)

    def release(self, tensor: GgufTensor) -> None:
        """Release the memory that a tensor takes; accessing it again reads it from the file again."""
        if hasattr(mmap, "MADV_DONTNEED"):  # POSIX
            start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.mapped.madvise(mmap.MADV_DONTNEED, start, tensor.offset + tensor.nbytes - start)


def open_gguf(path: str | Path) -> GgufFile:
    """Check a file and map it. Raises UserError for anything but a complete GGUF file of supported types."""
    path = Path(path)
    mapped = _map(path)
    header = _Header(mapped, path)
    version = header.version()
    tensor_count, key_count = header.number("Q"), header.number("Q")
    header.check_count("tensors", tensor_count, 8 + 4 + 8 + 4 + 8)
    header.check_count("metadata keys", key_count, 8 + 1 + 4 + 1)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = header.text(LONGEST_KEY, "the name of a metadata key")
        if not key or key in metadata:
            raise header.wrong(f"it has the metadata key {key[:64]!r} twice" if key else "a key has no name")
        metadata[key] = header.value(key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise header.wrong(f"general.alignment is {str(alignment)[:64]}, expected a power of two")
    entries: dict[str, _Entry] = {}
    for _ in range(tensor_count):
        name, entry = header.tensor(alignment)
        if name in entries:
            raise header.wrong(f"it has the tensor {name!r} twice")
        entries[name] = entry
    return GgufFile(
        path=path, version=version, metadata=metadata, tensors=_place(header, entries, alignment), mapped=mapped
    )


def _map(path: Path) -> mmap.mmap:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory, expected a GGUF file", hint="name the .gguf file in it")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file, expected a GGUF file", hint="save it to a file first")
        with path.open("rb") as file:
            head = file.read(files.SNIFF)
            if not head.startswith(MAGIC):
                raise _other_format(path, head)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _other_format(path: Path, head: bytes) -> UserError:
    hint = "a GGUF file begins with the four letters GGUF; download it again if it should"
    if head.startswith(OLDER):
        what, hint = "a ggml file from before GGUF", AGAIN
    elif head.startswith(b"version https://git-lfs"):
        what, hint = "a Git LFS pointer", "fetch what it points to: git lfs pull"
    else:
        try:
            codecs.utf_8_decode(head, "strict", False)
            what = (files.what_it_is(head) or "text") if head else "empty"
        except UnicodeDecodeError:
            what = files.what_it_is(head) or "binary data of another kind"
    return UserError(f"{path} is {what}, expected a GGUF file", hint=hint)


@dataclass(frozen=True, slots=True)
class _Entry:
    """The header's entry of one tensor."""

    shape: tuple[int, ...]
    type: str
    offset: int
    """Relative to the start of the data."""
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


class _Header:
    """A cursor over the header; reading past the end of the file is an error."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0
        self.end = min(len(data), LARGEST_HEADER)
        self.listed = 0

    def wrong(self, what: str) -> UserError:
        hint = "download or convert it again; it was cut short or changed"
        return UserError(f"{self.path} is a damaged GGUF file: {what}", hint=hint)

    def ahead(self, size: int, what: str) -> int:
        """Return the position, after checking that ``size`` bytes follow and advancing past them."""
        start = self.at
        if size > self.end - start:
            if self.end < len(self.data):
                raise self.wrong(f"its header is larger than {LARGEST_HEADER} bytes")
            raise self.wrong(f"{what} ends after byte {start + size}, the file has {len(self.data)} bytes")
        self.at = start + size
        return start

    def number(self, code: Literal["I", "Q"] = "I") -> int:
        layout = struct.Struct("<" + code)
        value: int = layout.unpack_from(self.data, self.ahead(layout.size, "its header"))[0]
        return value

    def text(self, longest: int, what: str) -> str:
        size = self.number("Q")
        if size > longest:
            raise self.wrong(f"{what} has {size} bytes, expected at most {longest}")
        start = self.ahead(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8") from None

    def version(self) -> int:
        self.ahead(len(MAGIC), "its header")
        version = self.number()
        if version in VERSIONS:
            return version
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
            hint = "take the file for x86 and ARM machines, or convert it: gguf_convert_endian.py FILE little"
            raise UserError(f"{self.path} is a big-endian GGUF file, expected little-endian", hint=hint)
        hint = AGAIN
        raise UserError(f"{self.path} is GGUF version {version}, expected {' or '.join(map(str, VERSIONS))}", hint=hint)

    def check_count(self, what: str, count: int, size: int) -> None:
        """Check a count; ``size`` is the least number of bytes that one takes."""
        if count > (len(self.data) - self.at) // size:
            raise self.wrong(f"it says that it has {count} {what}, which its {len(self.data)} bytes cannot hold")
        if count > MOST_ENTRIES:
            raise self.wrong(f"it says that it has {count} {what}, expected at most {MOST_ENTRIES}")

    def value(self, key: str) -> Any:
        kind = self.number()
        if kind != ARRAY:
            return self.items(kind, 1, f"the value of {key[:64]!r}")[0]
        kind, count = self.number(), self.number("Q")
        self.listed += count
        if self.listed > MOST_VALUES:
            raise self.wrong(f"the list of {key[:64]!r} has {count} values; {MOST_VALUES} are read from a file")
        return self.items(kind, count, f"the list of {key[:64]!r}")

    def items(self, kind: int, count: int, what: str) -> list[Any]:
        if kind == STRING:
            return [self.text(LARGEST_HEADER, what) for _ in range(count)]
        if kind not in SCALARS:
            raise self.wrong(f"{what} is of {'lists' if kind == ARRAY else f'the unknown type {kind}'}")
        dtype = np.dtype("<" + SCALARS[kind])
        return np.frombuffer(self.data, dtype, count, self.ahead(count * dtype.itemsize, what)).tolist()

    def tensor(self, alignment: int) -> tuple[str, _Entry]:
        name = self.text(LONGEST_NAME, "the name of a tensor")
        count = self.number()
        if not 1 <= count <= MOST_DIMENSIONS:
            raise self.wrong(f"the tensor {name!r} has {count} dimensions, expected 1 to {MOST_DIMENSIONS}")
        shape = tuple(self.number("Q") for _ in range(count))[::-1]
        kind, offset = self.number(), self.number("Q")
        type = next((known for known, described in TYPES.items() if described.id == kind), None)
        if type is None:
            raise UserError(
                f"{self.path}: the tensor {name!r} is of type {OTHER_TYPES.get(kind, kind)}, which tfcli does not read",
                hint=f"it reads {', '.join(TYPES)}",
            )
        if 0 in shape or shape[-1] % TYPES[type].block:
            raise self.wrong(f"the tensor {name!r} has the shape {shape}, not whole blocks of {type}")
        if offset % alignment:
            raise self.wrong(f"the tensor {name!r} is at {offset}, not a multiple of {alignment}")
        return name, _Entry(shape, type, offset, TYPES[type].row_bytes(shape[-1]))


def _place(header: _Header, entries: dict[str, _Entry], alignment: int) -> dict[str, GgufTensor]:
    """Return the mapped tensors, after checking that each is inside the file and none overlaps another."""
    base = -(-header.at // alignment) * alignment
    size = len(header.data)
    last, end = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            raise header.wrong(f"the tensors {last!r} and {name!r} overlap")
        last, end = name, entry.offset + entry.nbytes
        if base + end > size:
            raise header.wrong(f"the tensor {name!r} ends after byte {base + end}, the file has {size} bytes")
    return {
        name: GgufTensor(
            name=name,
            shape=entry.shape,
            type=entry.type,
            offset=base + entry.offset,
            data=np.frombuffer(header.data, np.uint8, entry.nbytes, base + entry.offset).reshape(-1, entry.row_bytes),
        )
        for name, entry in entries.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NewTensor:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    """Outermost first."""
    type: str
    """A key of ``blocks.TYPES``; numbers are quantized only to those in ``blocks.WRITES``."""
    data: NDArray[Any] | Callable[[], NDArray[Any]]
    """Numbers of that shape, or the type's own bytes as uint8; a callable is called when the tensor is written."""


def write_gguf(path: str | Path, metadata: Mapping[str, Any], tensors: Iterable[NewTensor]) -> None:
    """Write a file (version 3), aside first, then synced and renamed; the same input gives the same bytes.

    Metadata values are strings, bools, ints (as uint32; int32 below zero; 64 bits where those are too small), floats
    (as float32) or lists of them (ints as int32); a numpy scalar or array keeps its own type. One tensor is in memory
    at a time. Raises UserError for numbers that a type cannot represent or a place that cannot be written, RunError for
    a full disk.
    """
    path = Path(path)
    listed = list(tensors)
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    header = _header(metadata, listed, alignment)
    with _whole(path) as file:
        file.write(header + bytes(-len(header) % alignment))
        for tensor in listed:
            for block in _blocks(tensor):
                file.write(block.data)
            file.write(bytes(-_nbytes(tensor) % alignment))


def _header(metadata: Mapping[str, Any], tensors: Sequence[NewTensor], alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(key, value)]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors have the same name")
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode()
        if len(name) > LONGEST_NAME or not 1 <= len(tensor.shape) <= MOST_DIMENSIONS or 0 in tensor.shape:
            raise ValueError(f"{tensor.name!r} of shape {tensor.shape} cannot be in a GGUF file")
        parts += [_text(tensor.name), struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])]
        parts.append(struct.pack("<IQ", TYPES[tensor.type].id, offset))
        offset += _nbytes(tensor)
        offset += -offset % alignment
    return b"".join(parts)


def _nbytes(tensor: NewTensor) -> int:
    return prod(tensor.shape[:-1]) * TYPES[tensor.type].row_bytes(tensor.shape[-1])


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """Encode type and value of one metadata entry."""
    items: Any = value if isinstance(value, list | tuple | np.ndarray) else [value]
    if all(isinstance(item, str) for item in items):
        kind, data = STRING, b"".join(map(_text, items))
    else:
        dtype = _dtype(key, items, items is value)
        kind = next(kind for kind, name in SCALARS.items() if np.dtype(name) == dtype)
        data = np.asarray(items, dtype.newbyteorder("<")).tobytes()
    return struct.pack("<IIQ", ARRAY, kind, len(items)) + data if items is value else struct.pack("<I", kind) + data


def _dtype(key: str, items: Sequence[Any], listed: bool) -> np.dtype[Any]:
    first = items[0] if isinstance(items[0], np.generic) else items
    if isinstance(first, np.ndarray | np.generic) and first.dtype.str[1:] in SCALARS.values():
        return first.dtype
    kinds = {type(item) for item in items}
    if kinds == {bool}:
        return np.dtype("b1")
    if kinds == {int}:
        low, high = min(items), max(items)
        if not listed and low >= 0:
            return np.dtype("u4" if high < 1 << 32 else "u8")
        return np.dtype("i4" if low >= -(1 << 31) and high < 1 << 31 else "i8" if high < 1 << 63 else "u8")
    if kinds <= {int, float}:
        return np.dtype("f4")
    raise TypeError(f"{key}: {' and '.join(sorted(kind.__name__ for kind in kinds))} has no type in a GGUF file")


def _blocks(tensor: NewTensor) -> Iterator[Bytes]:
    """Yield the tensor's bytes, some rows at a time."""
    data = tensor.data if isinstance(tensor.data, np.ndarray) else tensor.data()
    if data.dtype == np.uint8:
        if data.nbytes != _nbytes(tensor):
            raise ValueError(f"{tensor.name} has {data.nbytes} bytes, its shape and type {_nbytes(tensor)}")
        yield np.ascontiguousarray(data)
        return
    if data.shape != tensor.shape:
        raise ValueError(f"{tensor.name} has the shape {data.shape}, expected {tensor.shape}")
    rows = data.reshape(-1, tensor.shape[-1])
    step = max(1, AT_ONCE // tensor.shape[-1])
    for start in range(0, len(rows), step):
        try:
            yield blocks.quantize(tensor.type, rows[start : start + step])
        except UserError as error:
            raise UserError(f"the tensor {tensor.name} cannot be written: {error.message}", hint=error.hint) from None


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write that becomes ``path`` when it is complete and on the disk."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory", hint="name a file to write, ending in .gguf")
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        disk.sweep(path.resolve().parent)
        with disk.telling_full(f"{path} was not written"), disk.whole_file(path) as file:
            yield file
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise UserError(f"{path} cannot be written: {error.strerror}", hint="choose another place") from None
        raise
