"""Bytes of a file as text: decompressed by suffix, what is not text named by its content, the encoding checked."""

from __future__ import annotations

import codecs
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, AnyStr, Literal, cast

from tfcli.errors import UserError, nearest
from tfcli.text.data_report import PLACES, Action, Change

Errors = Literal["strict", "replace"]
"""What becomes of bytes that are not in the encoding."""
BLOCK = 1 << 20
"""Bytes read at once."""
SNIFF = 8192
"""Bytes at the start of a file that decide whether it is text."""
ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""At the start of UTF-16 and UTF-32; that of UTF-32-LE begins as the first."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
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
    """SHA-256 and the number of the bytes that it was given."""

    def __init__(self) -> None:
        self._hash, self.bytes = hashlib.sha256(), 0

    def update(self, data: bytes) -> None:
        """Take more bytes."""
        self._hash.update(data)
        self.bytes += len(data)

    @property
    def sha256(self) -> str:
        """As hexadecimal digits."""
        return self._hash.hexdigest()


@dataclass(kw_only=True)
class Count:
    """What was read from one source; filled in while it is read."""

    name: str
    bytes: int = 0
    """UTF-8 bytes of the text."""
    documents: int = 0
    """Documents with text in them."""
    empty: int = 0
    """Documents without text, dropped."""
    replaced: int = 0
    """Invalid UTF-8 sequences (or lone surrogates) that became U+FFFD."""
    boms: int = 0
    """Byte order marks at the start of a file, dropped: they are not text."""
    empty_at: list[str] = field(default_factory=list)
    replaced_at: list[str] = field(default_factory=list)
    """The first few places of both, "file:line"."""

    def drop(self, where: str) -> None:
        """Count a document without text."""
        self.empty += 1
        if len(self.empty_at) < PLACES:
            self.empty_at.append(where)

    def replace(self, number: int, where: str) -> None:
        """Count what became U+FFFD, from ``where`` on."""
        self.replaced += number
        if number and len(self.replaced_at) < PLACES:
            self.replaced_at.append(where)


@dataclass
class Counts:
    """One ``Count`` for each source, in the order in which they were read."""

    sources: list[Count] = field(default_factory=list)


def changes(counts: Sequence[Count]) -> dict[Action, list[Change]]:
    """What reading did to the text, for the data report."""
    marks = [count.name for count in counts if count.boms]
    empty_at = [where for count in counts for where in count.empty_at]
    replaced_at = [where for count in counts for where in count.replaced_at]
    return {
        "dropped": [
            Change(reason="empty documents", count=sum(count.empty for count in counts), places=empty_at),
            Change(reason="byte order marks", count=sum(count.boms for count in counts), places=marks),
        ],
        "repaired": [
            Change(
                reason="invalid UTF-8 that became U+FFFD",
                count=sum(count.replaced for count in counts),
                places=replaced_at,
            )
        ],
    }


def stem_suffix(path: Path) -> tuple[str, str]:
    """The suffix that names the format and the one that names the compression, both lower case, "" for none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def blocks(path: Path, name: str) -> Iterator[bytes]:
    """The decompressed bytes of ``path`` in blocks; UserError where the file is missing, unreadable or corrupt."""
    import lzma

    compression = stem_suffix(path)[1]
    try:
        if compression == ".zst":
            yield from _zstd_blocks(path, name)
            return
        with _open(path, compression) as file:
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


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        import gzip

        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == ".bz2":
        import bz2

        return cast(IO[bytes], bz2.open(path, "rb"))
    if compression == ".xz":
        import lzma

        return cast(IO[bytes], lzma.open(path, "rb"))
    return path.open("rb")


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
    """What a file that starts with ``head`` is when it is not UTF-8 text, in words; None for text."""
    for magic, words in MAGICS:
        if head.startswith(magic):
            return words
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16 text"
    zeros = head.count(0)
    if zeros and zeros >= len(head) // 3 and (0 in head[0::2]) != (0 in head[1::2]):
        return "UTF-16 text"
    return "binary data (it has NUL bytes)" if zeros else None


def check_encoding(encoding: str) -> None:
    """UserError for one that Python does not know."""
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
    """The text of ``path`` in pieces of about a block, without a byte order mark; ``count`` is told what was replaced.

    Without an ``encoding`` it is UTF-8, and the command has no option for another. ``seen`` is given every block of
    decompressed bytes, as to hash them.
    Raises UserError for a file that is not text, and under ``errors="strict"`` for invalid bytes, with byte and line.
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
    words = what_it_is(head)
    utf16 = words == "UTF-16 text"
    if words is None or (utf16 and (encoding or "").lower().replace("_", "-").startswith("utf-16")):
        return
    expected = "UTF-8 text" if encoding is None else f"text in {encoding}"
    hint = "text, .jsonl, .csv, .tsv and .parquet files are read"
    if utf16:
        hint = "read it with: --encoding utf-16" if encoding else f"convert: iconv -f utf-16 -t utf-8 {name} > new.txt"
    raise UserError(f"{name} is {words}, expected {expected}", hint=hint)


def lines(pieces: Iterator[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a text, or of bytes, that come in pieces, each with its "\\n"; no other character ends a line."""
    rest: list[AnyStr] = []
    for piece in pieces:
        nothing = piece[:0]
        end = "\n" if isinstance(piece, str) else b"\n"
        found = piece.split(end)
        for line in found[:-1]:
            if rest:
                rest += [line, end]
                yield nothing.join(rest)
                rest.clear()
            else:
                yield line + end
        if found[-1]:
            rest.append(found[-1])
    if rest:
        yield rest[0][:0].join(rest)


def missing(path: Path) -> UserError:
    """What is said of a file that is not there: the name beside it that is closest."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        beside = []
    guess = nearest(path.name, beside)
    return UserError(f"no such file: {path}", hint=f"did you mean {path.parent / guess}?" if guess else None)


def matches(spec: str) -> list[Path]:
    """The files that a name or a glob stands for; UserError where there are none."""
    import glob

    found = [Path(match) for match in sorted(glob.glob(spec, recursive=True))]  # noqa: PTH207
    if not found:
        raise UserError(f"no file matches {spec!r}") if glob.has_magic(spec) else missing(Path(spec))
    return found
