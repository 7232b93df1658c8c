"""Text from the bytes of files: decompressed by suffix, recognized by content, checked against the encoding."""

from __future__ import annotations

import codecs
import hashlib
import importlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import AnyStr, Literal

from tfcli.errors import UserError, nearest
from tfcli.text.data_report import PLACES, Action, Change

Errors = Literal["strict", "replace"]
"""How invalid bytes are handled."""
BLOCK = 1 << 20
"""Bytes per read."""
SNIFF = 8192
"""Bytes at the start of a file by which text is recognized."""
ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""Byte order marks of UTF-16 and UTF-32; the one of UTF-32-LE begins with that of UTF-16-LE."""
DECOMPRESSORS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
"""Modules of the standard library by suffix; ``.zst`` needs a package."""
MAGICS = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive (or an office document)"),
    (b"\x1f\x8b", "gzip data without the .gz suffix"),
    (b"BZh", "bzip2 data without the .bz2 suffix"),
    (b"\xfd7zXZ", "xz data without the .xz suffix"),
    (b"\x28\xb5\x2f\xfd", "zstandard data without the .zst suffix"),
    (b"PAR1", "a Parquet file without the .parquet suffix"),
    (b"GGUF", "a GGUF model"),
    (b"\x7fELF", "a program"),
)


class Digest:
    """The SHA-256 and the length of a stream of bytes."""

    def __init__(self) -> None:
        self._hash, self.bytes = hashlib.sha256(), 0

    def update(self, data: bytes) -> None:
        """Append ``data``."""
        self._hash.update(data)
        self.bytes += len(data)

    @property
    def sha256(self) -> str:
        """The hash in hexadecimal."""
        return self._hash.hexdigest()


@dataclass(kw_only=True)
class Count:
    """Counts of one source, updated while it is read."""

    name: str
    bytes: int = 0
    """UTF-8 bytes of its text."""
    documents: int = 0
    """Documents with text in them."""
    empty: int = 0
    """Documents without text, dropped."""
    replaced: int = 0
    """Invalid byte sequences (or lone surrogates) replaced by U+FFFD."""
    boms: int = 0
    """Byte order marks at the start of a file, dropped."""
    empty_at: list[str] = field(default_factory=list)
    replaced_at: list[str] = field(default_factory=list)
    """The first few places of each, as "file:line"."""

    def drop(self, where: str) -> None:
        """Count a document without text."""
        self.empty += 1
        if len(self.empty_at) < PLACES:
            self.empty_at.append(where)

    def replace(self, number: int, where: str) -> None:
        """Count ``number`` replacements, the first of them at ``where``."""
        self.replaced += number
        if number and len(self.replaced_at) < PLACES:
            self.replaced_at.append(where)


@dataclass
class Counts:
    """The ``Count`` of each source, in reading order."""

    sources: list[Count] = field(default_factory=list)


def changes(counts: Sequence[Count]) -> dict[Action, list[Change]]:
    """Return what was dropped and repaired while reading, for the data report."""
    empty_at = [where for count in counts for where in count.empty_at]
    boms_at = [count.name for count in counts if count.boms]
    replaced_at = [where for count in counts for where in count.replaced_at]
    empty = Change(reason="empty documents", count=sum(count.empty for count in counts), places=empty_at)
    boms = Change(reason="byte order marks", count=sum(count.boms for count in counts), places=boms_at)
    replaced = sum(count.replaced for count in counts)
    invalid = Change(reason="invalid UTF-8 that became U+FFFD", count=replaced, places=replaced_at)
    return {"dropped": [empty, boms], "repaired": [invalid]}


def stem_suffix(path: Path) -> tuple[str, str]:
    """Return the suffixes of the format and of the compression in lower case, "" for none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in (*DECOMPRESSORS, ".zst") else ""
    return (suffixes[-1] if suffixes else ""), compression


def blocks(path: Path, name: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of ``path`` in blocks; UserError if it is missing, unreadable or corrupt."""
    import lzma

    compression = stem_suffix(path)[1]
    try:
        if compression == ".zst":
            yield from _zstd_blocks(path, name)
            return
        module = DECOMPRESSORS.get(compression)
        with importlib.import_module(module).open(path, "rb") if module else path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
    except FileNotFoundError:
        raise UserError(f"no such file: {name}") from None
    except PermissionError:
        raise UserError(f"{name} cannot be read: permission denied") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _corrupt(name, compression, error) from None
    except OSError as error:
        if compression and error.errno is None:
            raise _corrupt(name, compression, error) from None
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None


def _corrupt(name: str, compression: str, error: object) -> UserError:
    return UserError(
        f"{name} is corrupt or truncated: {error}", hint=f"expected {compression} data; make or download the file again"
    )


def _zstd_blocks(path: Path, name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{name} needs the zstandard package", hint='install it: pip install "tfcli[zstd]", or: zstd -d FILE'
        ) from None
    decoder = zstandard.ZstdDecompressor().decompressobj()
    fresh = False
    with path.open("rb") as file:
        try:
            while data := file.read(BLOCK >> 3):
                while data:
                    if block := decoder.decompress(data):
                        yield block
                    fresh, data = decoder.eof, decoder.unused_data if decoder.eof else b""
                    if decoder.eof:
                        decoder = zstandard.ZstdDecompressor().decompressobj()
        except zstandard.ZstdError as error:
            raise _corrupt(name, ".zst", error) from None
    if not fresh:
        raise _corrupt(name, ".zst", "the data ends within a frame")


def what_it_is(head: bytes) -> str | None:
    """Describe a file that starts with ``head``, such as "a PNG image"; None for UTF-8 text."""
    for magic, description in MAGICS:
        if head.startswith(magic):
            return description
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16 text"
    zeros = head.count(0)
    if zeros and zeros >= len(head) // 3 and (0 in head[0::2]) != (0 in head[1::2]):
        return "UTF-16 text"
    return "binary data (it has NUL bytes)" if zeros else None


def check_encoding(encoding: str) -> None:
    """Raise UserError for an encoding that Python does not have."""
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError):
        raise UserError(f"unknown encoding {encoding!r}", hint="for example: utf-8, latin-1, cp1252, utf-16") from None


def texts(
    path: Path,
    name: str,
    errors: Errors,
    count: Count,
    *,
    encoding: str | None = None,
    seen: Callable[[bytes], object] = lambda block: None,
) -> Iterator[str]:
    """Yield the text of ``path`` in pieces of about a block, without a byte order mark, and update ``count``.

    ``encoding=None`` means UTF-8 in a command without ``--encoding``, which then no hint suggests. ``seen`` gets every
    block of decompressed bytes, for example to hash it.
    Raises UserError for a file that is not text, and with ``errors="strict"`` for invalid bytes, with offset and line.
    """
    asked = encoding or "utf-8"
    check_encoding(asked)
    utf8 = asked.lower().replace("_", "-") in ("utf-8", "utf8")
    rest = b""
    offset = lines = 0
    stream = blocks(path, name)
    block = next(stream, b"")
    seen(block)
    _check_text(block[:SNIFF], name, encoding)
    codec = codecs.lookup(asked).name
    if codec in ("utf-16", "utf-32") and not block.startswith(ORDER_MARKS):
        codec += "-le"
    decoder = codecs.getincrementaldecoder(codec)(errors)
    if utf8 and block.startswith(codecs.BOM_UTF8):
        block, offset, count.boms = block[3:], 3, count.boms + 1
    while True:
        following = next(stream, b"")
        seen(following)
        data = rest + block if rest else block
        try:
            text = decoder.decode(block, not following)
        except UnicodeDecodeError as error:
            line = lines + data.count(b"\n", 0, error.start) + 1
            where = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}, line {line}"
            other = "name its encoding, as --encoding latin-1" if encoding else "convert it (iconv -f latin1 -t utf-8)"
            raise UserError(
                f"{name} is not {asked.upper()}: {where}",
                hint=f"{other}, or replace and count what is invalid: --errors replace",
            ) from None
        rest = decoder.getstate()[0]
        used = len(data) - len(rest)
        if errors == "replace" and "\ufffd" in text:
            line = lines + text.count("\n", 0, text.index("\ufffd")) + 1
            written = data[:used].count(b"\xef\xbf\xbd") if utf8 else 0
            count.replace(text.count("\ufffd") - written, f"{name}:{line}")
        lines += text.count("\n")
        offset += used
        if text:
            yield text
        if not following:
            return
        block = following


def _check_text(head: bytes, name: str, encoding: str | None) -> None:
    content = what_it_is(head)
    utf16 = content == "UTF-16 text"
    if content is None or (utf16 and (encoding or "").lower().replace("_", "-").startswith("utf-16")):
        return
    expected = "UTF-8 text" if encoding is None else f"text in {encoding}"
    hint = "text, .jsonl, .csv, .tsv and .parquet files are read"
    if utf16:
        hint = "read it with: --encoding utf-16" if encoding else f"convert: iconv -f utf-16 -t utf-8 {name} > new.txt"
    raise UserError(f"{name} is {content}, expected {expected}", hint=hint)


def lines(pieces: Iterator[AnyStr]) -> Iterator[AnyStr]:
    """Yield the lines of text or bytes given in pieces, each with its "\\n"; no other character ends a line."""
    rest: list[AnyStr] = []
    for piece in pieces:
        end = "\n" if isinstance(piece, str) else b"\n"
        whole = piece.split(end)
        last = whole.pop()
        if whole and rest:
            rest.append(whole[0])
            whole[0] = piece[:0].join(rest)
            rest.clear()
        for line in whole:
            yield line + end
        if last:
            rest.append(last)
    if rest:
        yield rest[0][:0].join(rest)


def missing(path: Path) -> UserError:
    """The error for a file that does not exist, with the most similar name in its directory as a hint."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    guess = nearest(path.name, names)
    return UserError(f"no such file: {path}", hint=f"did you mean {path.parent / guess}?" if guess else None)


def matches(spec: str) -> list[Path]:
    """Return the files that a name or a glob matches; UserError if there are none."""
    import glob

    paths = [Path(match) for match in sorted(glob.glob(spec, recursive=True))]  # noqa: PTH207
    if not paths:
        raise UserError(f"no file matches {spec!r}") if glob.has_magic(spec) else missing(Path(spec))
    return paths
