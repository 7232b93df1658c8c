"""Tensors in safetensors files, one or several: complete headers are checked before a number is read.

Tensors are read one at a time into memory of their own. (The safetensors library maps the file, so that what was read
stays resident until the file is closed: both copies of a model that is cast or quantized as it is loaded.)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.errors import UserError

if TYPE_CHECKING:
    import torch

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER = 100_000_000
"""Largest header in bytes; the safetensors library has the same limit."""
WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""{type that weights may be stored as: torch's name of it}."""
DAMAGED = "copy or save the model again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The place of a tensor: bytes ``begin`` to ``end`` of ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return {name: entry} of a safetensors file: each has the bytes that its shape needs, together they fill the file.

    Raises UserError for a header that is damaged or does not match the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{path} is cut short or not a safetensors file", hint=DAMAGED)
            if length > MOST_HEADER:
                raise UserError(f"{path} has a header of {length} bytes", hint=f"at most {MOST_HEADER} are read")
            header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _once(path, pairs))
        start = 8 + length
        entries = {name: _entry(path, entry, start) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} has a damaged header", hint=DAMAGED) from None
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != at or entry.end - entry.begin != math.prod(entry.shape) * WIDTHS[entry.dtype]:
            raise UserError(f"{path}: the header gives {name} other bytes than its shape needs", hint=DAMAGED)
        at = entry.end
    if at != size:
        hint = f"it was cut short or changed: {DAMAGED}"
        raise UserError(f"{path} has {size} bytes, its header says {at}", hint=hint)
    return entries


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} lists {twice} twice", hint=DAMAGED)
    return dict(pairs)


def _entry(path: Path, entry: dict[str, Any], start: int) -> Entry:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (begin, end, *shape)) or entry["dtype"] not in WIDTHS:
        raise ValueError
    return Entry(path=path, dtype=entry["dtype"], shape=shape, begin=start + begin, end=start + end)


class Weights:
    """All tensors of a model directory."""

    def __init__(self, entries: dict[str, Entry], path: Path) -> None:
        self.entries = entries
        self.path = path
        """The file that lists them, for messages."""

    @classmethod
    def open(cls, directory: Path) -> Weights:
        """Open ``model.safetensors``, or the shards that its index lists.

        Raises UserError where a file is absent, damaged or disagrees with the index.
        """
        path = find(directory)
        return cls(read_header(path) if path.name == FILE else _shards(directory), path)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in the dtype that it is stored in. Raises UserError for one that is not F32, F16 or BF16."""
        import torch

        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            hint = f"tfcli reads weights in {', '.join(FLOATS)}; save the model in one of them"
            raise UserError(f"{entry.path}: {name} is stored as {entry.dtype}", hint=hint)
        out = torch.empty(entry.shape, dtype=getattr(torch, FLOATS[entry.dtype]))
        raw = memoryview(out.view(-1).view(torch.uint8).numpy().data)
        try:
            with entry.path.open("rb", buffering=0) as file:
                file.seek(entry.begin)
                done = 0
                while done < len(raw):
                    count = file.readinto(raw[done:])
                    if not count:
                        raise UserError(f"{entry.path} became shorter while it was read", hint=DAMAGED)
                    done += count
        except OSError as error:
            raise UserError(f"{entry.path} cannot be read: {error.strerror}") from None
        return out


def find(directory: Path) -> Path:
    """Return the file of a directory's weights, or the index of its shards. Raises UserError for none, or a pickle."""
    for name in (FILE, INDEX):
        if (directory / name).is_file():
            return directory / name
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise pickled(f"{directory} has its weights in a pickle (.bin, .pt, .pth)", directory)
    raise UserError(f"no {FILE} in {directory}", hint="a model directory holds config.json and model.safetensors")


def pickled(what: str, directory: Path) -> UserError:
    """Return the error for weights in a pickle, which says how to convert the model in ``directory``."""
    try:
        named = json.loads((directory / "config.json").read_bytes())["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        named = None
    model = named if isinstance(named, str) and named.isidentifier() else "AutoModel"
    call = f'from transformers import {model} as M; M.from_pretrained("{directory}").save_pretrained("NEW")'
    hint = f"if you trust where it is from, convert it, and copy its tokenizer there: python -c '{call}'"
    return UserError(f"{what}, which can run code when it is read", hint=hint)


def _shards(directory: Path) -> dict[str, Entry]:
    """Return the entries of all shards, in the order of the index."""
    index = directory / INDEX
    try:
        data = json.loads(index.read_bytes(), object_pairs_hook=lambda pairs: _once(index, pairs))
        where: dict[str, str] = dict(data["weight_map"])
    except OSError as error:
        raise UserError(f"{index} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{index} is not an index of shards", hint=DAMAGED) from None
    files = list(dict.fromkeys(where.values()))
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names a shard {name!r}", hint="expected the name of a file next to it")
    absent = [name for name in files if not (directory / name).is_file()]
    if absent:
        hint = f"{INDEX} lists them: copy the whole model"
        raise UserError(f"{directory} lacks {len(absent)} of {len(files)} shards: {', '.join(absent[:3])}", hint=hint)
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(directory / file).items():
            if name in entries:
                raise UserError(f"{name} is in {entries[name].path.name} and in {file}", hint=DAMAGED)
            if where.get(name) != file:
                raise UserError(f"{directory / file} holds {name}, {INDEX} says {where.get(name)}", hint=DAMAGED)
            entries[name] = entry
    for name in where:
        if name not in entries:
            raise UserError(f"{where[name]} does not hold {name}, as {INDEX} says", hint=DAMAGED)
    return entries
