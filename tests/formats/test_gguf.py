"""The GGUF container: what the gguf package writes is read, what we write it reads, and no damage gets through."""

from __future__ import annotations

import errno
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tfcli.errors import RunError, UserError
from tfcli.formats.gguf import blocks as ggml_blocks
from tfcli.formats.gguf.blocks import TYPES, WRITES
from tfcli.formats.gguf.file import GgufFile, NewTensor, open_gguf, write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Grüße 世界",
    "an.int": 4096,
    "a.negative": -5,
    "a.long": 1 << 40,
    "a.float": 0.5,
    "a.bool": True,
    "texts": ["a", "", "▁the", "\n"],
    "ints": [3, -1, 7],
    "floats": [0.25, -1.5],
    "bools": [True, False],
}


def matrix(rows: int, cols: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, (rows, cols)).astype(np.float32)


def blocks(type: str, x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """By the oracle; types that it only reads are random bytes."""
    try:
        return gguf.quants.quantize(x, gguf.GGMLQuantizationType[type]).view(np.uint8)
    except NotImplementedError:
        shape = (len(x), TYPES[type].row_bytes(x.shape[1]))
        return np.random.default_rng(1).integers(0, 60, shape, dtype=np.uint8)


def theirs(path: Path, version: int = 3, endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> Path:
    """A file with every kind of value and every type, written by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_string("general.name", METADATA["general.name"])
    writer.add_uint32("an.int", 4096)
    writer.add_int32("a.negative", -5)
    writer.add_uint64("a.long", 1 << 40)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    for key in ("texts", "ints", "floats", "bools"):
        writer.add_array(key, METADATA[key])
    writer.add_tensor("norm.weight", matrix(1, 7)[0])
    for type in TYPES:
        made = blocks(type, matrix(3, 512))
        writer.add_tensor(f"{type}.weight", made, raw_dtype=gguf.GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if version != 3:
        path.write_bytes(path.read_bytes().replace(b"GGUF\x03", b"GGUF" + bytes([version]), 1))
    return path


def small(path: Path) -> Path:
    """A valid file of about 1 kB, written by us."""
    write_gguf(
        path,
        {"general.architecture": "llama", "llama.block_count": 1, "words": ["one", "two"], "ids": [1, 2, 3]},
        [
            NewTensor(name="a.weight", shape=(4, 32), type="Q8_0", data=matrix(4, 32)),
            NewTensor(name="b.weight", shape=(5,), type="F32", data=matrix(1, 5)[0]),
            NewTensor(name="c.weight", shape=(2, 32), type="Q4_1", data=matrix(2, 32)),
        ],
    )
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_what_gguf_writes_is_read(tmp_path: Path, version: int) -> None:
    """Would catch dimensions in the wrong order, a wrong offset, a value type misread."""
    file = open_gguf(theirs(tmp_path / "m.gguf", version))
    assert file.version == version
    assert file.metadata == METADATA and isinstance(file.metadata["a.bool"], bool)
    assert list(file.tensors) == ["norm.weight", *(f"{type}.weight" for type in TYPES)]
    assert file.tensors["norm.weight"].shape == (7,)
    np.testing.assert_array_equal(file.tensors["norm.weight"].dequantize(), matrix(1, 7)[0])
    for type, kind in TYPES.items():
        tensor = file.tensors[f"{type}.weight"]
        assert (tensor.shape, tensor.type, tensor.nbytes) == ((3, 512), type, 3 * kind.row_bytes(512))
        np.testing.assert_array_equal(tensor.data, blocks(type, matrix(3, 512)).reshape(3, -1))
        some = ggml_blocks.dequantize(type, tensor.data[1:3])
        np.testing.assert_array_equal(some, tensor.dequantize()[1:])


def test_what_we_write_is_byte_for_byte_what_gguf_writes(tmp_path: Path) -> None:
    """Would catch padding, another value type, another order: llama.cpp reads the package's files every day."""
    tensors = [NewTensor(name="norm.weight", shape=(7,), type="F32", data=matrix(1, 7)[0])]
    for type in TYPES:
        data = matrix(3, 512) if type in WRITES else blocks(type, matrix(3, 512))
        tensors.append(NewTensor(name=f"{type}.weight", shape=(3, 512), type=type, data=data))
    write_gguf(tmp_path / "ours.gguf", METADATA, tensors)
    ours = (tmp_path / "ours.gguf").read_bytes()
    assert ours == theirs(tmp_path / "theirs.gguf").read_bytes()
    file = open_gguf(tmp_path / "ours.gguf")
    again = [NewTensor(name=t.name, shape=t.shape, type=t.type, data=t.data) for t in file.tensors.values()]
    write_gguf(tmp_path / "ours.gguf", file.metadata, again)  # over the file that is read
    assert (tmp_path / "ours.gguf").read_bytes() == ours


VALUES = st.one_of(
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(width=32, allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)


@settings(max_examples=60, deadline=None)
@given(
    metadata=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        st.one_of(
            VALUES,
            st.lists(st.booleans()),
            st.lists(st.integers(-(1 << 63), (1 << 63) - 1)),
            st.lists(st.floats(width=32, allow_nan=False)),
            st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
        ),
        max_size=6,
    ).filter(lambda made: "general.alignment" not in made)
)
def test_metadata_comes_back(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]) -> None:
    """Every text, number and list, through our reader and, where it can, the package's."""
    path = tmp_path_factory.getbasetemp() / "law.gguf"
    write_gguf(path, metadata, [])
    assert open_gguf(path).metadata == metadata
    fields = gguf.GGUFReader(path).fields
    for key, value in metadata.items():
        if value != []:  # no type of its elements there
            assert fields[key].contents() == value


def test_numpy_values_keep_their_type(tmp_path: Path) -> None:
    metadata = {"general.architecture": "x", "a": np.uint16(3), "b": np.array([1, 2], np.uint8), "c": np.float64(0.1)}
    write_gguf(tmp_path / "m.gguf", metadata, [])
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert [t.name for t in fields["a"].types + fields["b"].types + fields["c"].types] == [
        "UINT16", "ARRAY", "UINT8", "FLOAT64",
    ]  # fmt: skip
    assert open_gguf(tmp_path / "m.gguf").metadata == {"general.architecture": "x", "a": 3, "b": [1, 2], "c": 0.1}
    for value in (None, {"a": 1}, [1, "a"], [[1]], [True, 1.5]):
        with pytest.raises(TypeError, match="odd"):
            write_gguf(tmp_path / "m.gguf", {"odd": value}, [])


def test_alignment_is_the_file_s_own(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = [NewTensor(name=name, shape=(3,), type="F32", data=matrix(1, 3)[0]) for name in "ab"]
    write_gguf(path, {"general.architecture": "x", "general.alignment": 256}, tensors)
    file = open_gguf(path)
    assert file.tensors["b"].offset - file.tensors["a"].offset == 256 and file.tensors["a"].offset % 256 == 0
    np.testing.assert_array_equal(gguf.GGUFReader(path).tensors[1].data, matrix(1, 3)[0])


def test_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    """Would catch a writer that holds the whole model; a large tensor is turned into blocks in parts."""
    size = 1 << 23

    def make() -> NDArray[np.float32]:
        return np.full((8, size // 8), 127.0, np.float32)

    tensors = [NewTensor(name=f"{at}", shape=(8, size // 8), type="Q8_0", data=make) for at in range(4)]
    tracemalloc.start()
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "x"}, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * size * 4
    assert open_gguf(tmp_path / "m.gguf").tensors["3"].dequantize()[7].max() == 127.0


def test_released_tensors_are_read_again(tmp_path: Path) -> None:
    file = open_gguf(theirs(tmp_path / "m.gguf"))
    for tensor in file.tensors.values():
        before = tensor.dequantize()
        file.release(tensor)
        np.testing.assert_array_equal(tensor.dequantize(), before)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    """Would catch half a model under the name of a whole one."""
    path = small(tmp_path / "m.gguf")
    before = path.read_bytes()

    def full() -> NDArray[np.float32]:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken() -> NDArray[np.float32]:
        return np.full((1, 32), np.nan, np.float32)

    def write(data: Any) -> None:
        good = NewTensor(name="a", shape=(1, 32), type="F32", data=matrix(1, 32))
        bad = NewTensor(name="b.weight", shape=(1, 32), type="Q8_0", data=data)
        write_gguf(path, {"general.architecture": "x"}, [good, bad])

    with pytest.raises(RunError, match="the disk is full"):
        write(full)
    with pytest.raises(UserError, match=r"b\.weight cannot be written: it holds values that are not finite"):
        write(broken)
    with pytest.raises(ValueError, match="shape"):
        write(matrix(2, 32))
    with pytest.raises(ValueError, match="bytes"):
        write(np.zeros(33, np.uint8))
    with pytest.raises(KeyboardInterrupt):
        write(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        write_gguf(tmp_path, {}, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_gguf(tmp_path / "file" / "m.gguf", {}, [])
    with pytest.raises(UserError, match="cannot be written"):
        write_gguf(tmp_path / ("x" * 999), {}, [])
    write_gguf(tmp_path / "new" / "folder" / "m.gguf", {"general.architecture": "x"}, [])
    assert open_gguf(tmp_path / "new" / "folder" / "m.gguf").tensors == {}


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    def tensor(**changes: Any) -> NewTensor:
        return NewTensor(**{"name": "a", "shape": (1, 32), "type": "F32", "data": matrix(1, 32), **changes})

    for wrong in (
        [tensor(name="x" * 64)], [tensor(shape=(1, 1, 1, 1, 32))], [tensor(shape=())], [tensor(), tensor()],
        [tensor(type="Q8_0", shape=(32, 1))], [tensor(shape=(0, 32))],
    ):  # fmt: skip
        with pytest.raises(ValueError):
            write_gguf(tmp_path / "m.gguf", {}, wrong)


# Damage. Files are put together by hand, so that every field can lie.


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def entry(name: bytes = b"w", dims: tuple[int, ...] = (32, 2), type: int = 8, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type, offset)


def craft(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = bytes(1024),
    start: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
) -> bytes:
    keys, tensors = keys or [], tensors or []
    head = start + struct.pack("<QQ", *(counts or (len(tensors), len(keys)))) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, value: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + value


U32 = struct.pack("<I", 7)
DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty, expected a GGUF file"),
    "text": (b"hello\n" * 99, "is text, expected a GGUF file"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
    "bytes": (np.random.default_rng(0).bytes(4096), "binary data"),
    "latin-1": ("été".encode("latin-1") * 9, "binary data of another kind"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "ggml": (b"tjgg" + bytes(99), "before GGUF"),
    "magic alone": (b"GGUF", "cut short"),
    "half a header": (craft()[:20], "cut short"),
    "version 1": (craft(start=b"GGUF" + struct.pack("<I", 1)), "is GGUF version 1, expected 2 or 3"),
    "version 4": (craft(start=b"GGUF" + struct.pack("<I", 4)), "is GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many keys": (craft(counts=(0, 1 << 60)), "1152921504606846976 metadata keys"),
    "many tensors": (craft(counts=(1 << 63, 0)), "9223372036854775808 tensors"),
    "more keys than are read": (craft(data=bytes(1 << 21), counts=(0, 70_000)), "at most 65536"),
    "one key too many": (craft([key(b"a", 4, U32)], data=b"", counts=(0, 2)), "cannot hold|cut short"),
    "long key": (craft([text(b"a", 1 << 62)]), "at most 65535"),
    "key without a name": (craft([key(b"", 4, U32)]), "no name"),
    "key twice": (craft([key(b"a", 4, U32)] * 2), "metadata key 'a' twice"),
    "key not UTF-8": (craft([key(b"\xff", 4, U32)]), "not UTF-8"),
    "text not UTF-8": (craft([key(b"a", 8, text(b"\xc3("))]), "'a' is not UTF-8"),
    "long text": (craft([key(b"a", 8, text(b"x", 1 << 40))]), "'a' has 1099511627776 bytes"),
    "text past the end": (craft([key(b"a", 8, text(b"x", 9999))]), "the text of|the value of"),
    "unknown value": (craft([key(b"a", 13, U32)]), "unknown type 13"),
    "long list": (craft([key(b"a", 9, array(0, 1 << 50))]), "1125899906842624 values"),
    "list past the end": (craft([key(b"a", 9, array(12, 1 << 20))]), "the list of 'a' ends"),
    "list of lists": (craft([key(b"a", 9, array(9, 1, array(4, 1, U32)))]), "is of lists"),
    "list of nothing known": (craft([key(b"a", 9, array(77, 1, U32))]), "unknown type 77"),
    "alignment 0": (craft([key(b"general.alignment", 4, bytes(4))]), "power of two"),
    "alignment 24": (craft([key(b"general.alignment", 4, struct.pack("<I", 24))]), "power of two"),
    "alignment text": (craft([key(b"general.alignment", 8, text(b"32"))]), "power of two"),
    "unknown type": (craft(tensors=[entry(type=99)]), "'w' is of type 99.*it reads F32, F16, BF16, Q8_0"),
    "type not read": (craft(tensors=[entry(type=23)]), "is of type IQ4_XS, which tfcli does not read"),
    "long name": (craft(tensors=[entry(b"x" * 64)]), "at most 63"),
    "name twice": (craft(tensors=[entry(), entry(offset=96)]), "tensor 'w' twice"),
    "no dimensions": (craft(tensors=[entry(dims=())]), "cannot hold|0 dimensions"),
    "no dimensions, room": (craft(tensors=[entry(dims=()), entry(b"v")]), "0 dimensions"),
    "five dimensions": (craft(tensors=[entry(dims=(32, 1, 1, 1, 1))]), "5 dimensions"),
    "no rows": (craft(tensors=[entry(dims=(32, 0))]), r"shape \(0, 32\)"),
    "part of a block": (craft(tensors=[entry(dims=(33, 2))]), "not whole blocks of Q8_0"),
    "overflow": (craft(tensors=[entry(dims=(1 << 62, 1 << 62, 1 << 62, 4))]), "the file has"),
    "overflow to zero": (craft(tensors=[entry(dims=(1 << 32, 1 << 32), type=0)]), "the file has"),
    "too large": (craft(tensors=[entry(dims=(32, 99))]), "'w' ends after byte"),
    "offset past the end": (craft(tensors=[entry(offset=1 << 62)]), "'w' ends after byte"),
    "offset askew": (craft(tensors=[entry(offset=16)]), "not a multiple of 32"),
    "on each other": (craft(tensors=[entry(), entry(b"v", offset=64)]), "'w' and 'v' overlap"),
    "same place": (craft(tensors=[entry(), entry(b"v")]), "overlap"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    """Every lie of a header is an error that says what it is, before anything of its size is allocated."""
    content, message = DAMAGE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message and caught.value.hint and len(str(caught.value)) < 500


def test_the_crafted_file_is_whole_without_a_lie(tmp_path: Path) -> None:
    """Holds the tests above to their one lie each."""
    path = tmp_path / "m.gguf"
    path.write_bytes(craft([key(b"a", 4, U32)], [entry(), entry(b"v", offset=96)]))
    file = open_gguf(path)
    assert file.metadata == {"a": 7} and [t.shape for t in file.tensors.values()] == [(2, 32), (2, 32)]
    path.write_bytes(path.read_bytes()[: 32 * 4 + 96 + 68])  # the padding after the last tensor may be missing
    assert open_gguf(path).tensors.keys() == {"w", "v"}


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a directory.*name the \.gguf file in it"):
        open_gguf(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="cannot be read"):
        open_gguf(tmp_path / ("x" * 999))
    with pytest.raises(UserError, match="not a regular file"):
        open_gguf("/dev/null")


def test_a_big_endian_file_of_gguf_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="big-endian"):
        open_gguf(theirs(tmp_path / "m.gguf", endian=gguf.GGUFEndian.BIG))


def touch(file: GgufFile) -> None:
    """Do everything with a file that loading a model does."""
    for tensor in file.tensors.values():
        assert tensor.dequantize().size == math.prod(tensor.shape)
        if TYPES[tensor.type].quantized:
            ggml_blocks.groups(tensor.type, tensor.data)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = small(tmp_path / "whole.gguf").read_bytes()
    end = max(t.offset + t.nbytes for t in open_gguf(tmp_path / "whole.gguf").tensors.values())
    path = tmp_path / "m.gguf"
    header = open_gguf(tmp_path / "whole.gguf").tensors["a.weight"].offset
    for size in (*range(header), *range(header, end, 7)):
        path.write_bytes(content[:size])
        with pytest.raises(UserError):
            open_gguf(path)
    path.write_bytes(content[:end])
    touch(open_gguf(path))


def test_no_flipped_byte_gets_past_the_checks(tmp_path: Path) -> None:
    """Any header either opens, and then everything in it can be read, or is a UserError; memory stays small."""
    content = small(tmp_path / "whole.gguf").read_bytes()
    header = open_gguf(tmp_path / "whole.gguf").tensors["a.weight"].offset
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    tracemalloc.start()
    try:
        for trial in range(800):
            damaged = bytearray(content)
            for at in rng.integers(4, header if trial % 2 else len(content), rng.integers(1, 4)):
                damaged[at] = rng.choice([0, 1, 0xFF, 0x80, int(rng.integers(256))])
            path.write_bytes(damaged)
            try:
                touch(open_gguf(path))
            except UserError:
                refused += 1
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert 150 < refused < 800
