"""A model directory as it lies on disk: its files checked against each other, nothing of its size allocated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError, nearest
from tfcli.formats.hf.families import registry as families
from tfcli.formats.hf.families.base import Family, Place
from tfcli.formats.hf.weights import Entry, Weights
from tfcli.model import cost

if TYPE_CHECKING:
    import torch

CONFIG, ADAPTER = "config.json", "adapter_config.json"
FILES = (".gguf", ".bin", ".pt", ".pth", ".safetensors")
"""What names a file of a model, where it is there or not."""
OWN = "tfcli-"
"""How the model_type of a baseline begins, which is none of the families: its objective alone reads it."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A model directory whose files were checked against each other; ``tensors`` reads them."""

    config: ModelConfig
    family: Family
    weights: Weights
    places: Mapping[str, Place]
    """{the core's name: where it lies}; a tied head has none."""
    not_read: tuple[str, ...]
    """Names of tensors of parts that the core does not have, such as a pooler or a classifier."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(the core's name, tensor) of each, one at a time, in the dtype that it is stored in."""
        name, stored = "", None
        for ours, place in self.places.items():
            if place.name != name or stored is None:  # GPT-2's queries, keys and values are one tensor
                name, stored = place.name, self.weights.read(place.name)
            tensor = stored.T if place.transposed else stored
            if place.skip:
                tensor = tensor[place.skip :]
            if place.plus:
                tensor = tensor.float() + place.plus
            if place.parts > 1:
                rows = tensor.shape[0] // place.parts
                tensor = tensor[place.part * rows : (place.part + 1) * rows].clone()
            yield ours, tensor.contiguous()


def open_model(
    directory: str | Path,
    *,
    hf_config: Mapping[str, Any] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Stored:
    """Check the files of a model directory against each other; nothing of the model's size is allocated.

    ``hf_config`` is what config.json holds, where it was read already. ``on_note`` is told of tensors that are not
    read. Raises UserError as ``load`` does.
    """
    import torch

    from tfcli.model.transformer import Transformer

    directory = Path(directory)
    family, config, _ = read_settings(directory, hf_config)
    weights = Weights.open(directory)
    held, described = sum(math.prod(entry.shape) for entry in weights.entries.values()), cost.parameters(config).total
    if config.depth > len(weights.entries) or described > 8 * held:
        raise UserError(
            f"{weights.path} holds {held} numbers, its {CONFIG} describes {described} in {config.depth} layers",
            hint="the two files must come from one model",
        )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Transformer(config).state_dict().items()}
    if config.tied:
        del shapes["head.weight"]
    entries = _renamed(weights.entries, family.names.aliases or {})
    names = family.names
    embed = {prefix: names.places(["embed.weight"], prefix)["embed.weight"].name for prefix in names.prefixes}
    prefix = next((prefix for prefix, name in embed.items() if name in entries), names.prefixes[0])
    places = names.places(shapes, prefix)
    found = {name: entry for name, entry in entries.items() if not name.endswith(names.buffers)}
    not_read = tuple(name for name in found if name.startswith(names.others)) if names.others else ()
    found = {name: entry for name, entry in found.items() if name not in not_read}
    head, table = f"{names.head}.weight", found.get(places["embed.weight"].name)
    if not config.tied and head not in found and not_read:  # a classifier: its class has no head of the vocabulary
        config = replace(config, tied=True)
        del places["head.weight"], shapes["head.weight"]
    copies = [head] if config.tied else []
    for name in (*copies, *(prefix + copy for copy in names.copies)):
        if name in found and table is not None and found[name].shape == table.shape:
            del found[name]
    for name in set(names.zeros) & found.keys():
        if Weights(found, weights.path).read(name).any():
            raise UserError(f"{weights.path}: {name} is not zero", hint="tfcli has no such part")
        del found[name]
    _check_tensors(weights.path, _expected(places, shapes), {name: entry.shape for name, entry in found.items()})
    if not_read and on_note:
        on_note(f"{directory}: {len(not_read)} tensors of other parts are not read ({few(not_read)})")
    return Stored(
        config=config, family=family, weights=Weights(entries, weights.path), places=places, not_read=not_read
    )


def _renamed(entries: Mapping[str, Entry], aliases: Mapping[str, str]) -> dict[str, Entry]:
    found = {}
    for name, entry in entries.items():
        stem, dot, last = name.rpartition(".")
        found[stem + dot + aliases.get(last, last)] = entry
    return found


def _expected(places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{name in the file: shape}."""
    expected = {}
    for ours, place in places.items():
        rows, *rest = shapes[ours]
        shape = (rows * place.parts + place.skip, *rest)
        expected[place.name] = shape[::-1] if place.transposed else shape
    return expected


def _check_tensors(path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "mis-shaped": [
            f"{name} {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if any(problems.values()):
        raise UserError(
            f"{path} does not hold the tensors that its config.json describes: {counted(problems)}",
            hint="the two files must come from one model",
        )


def counted(problems: Mapping[str, Sequence[str]]) -> str:
    """{kind: names} as "2 missing (a, b); 1 unexpected (c)", for a message."""
    return "; ".join(f"{len(names)} {kind} ({few(names)})" for kind, names in problems.items() if names)


def few(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_config(directory: str | Path, hf_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """The shape of the model in a directory, without torch. Raises UserError for what the core does not have."""
    return read_settings(Path(directory), hf_config)[1]


def read_settings(
    directory: Path, hf_config: Mapping[str, Any] | None = None
) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """Family and shape of the model in a directory, and what tfcli wrote beside them; as ``read_config``.

    ``hf_config`` is what config.json holds, where it was read already.
    """
    data = read_data(directory) if hf_config is None else hf_config
    kind = data.get("model_type")
    if isinstance(kind, str) and kind.startswith(OWN):
        raise UserError(
            f"{directory} is a baseline ({kind}), which can only be scored", hint=f"tfcli evaluate {directory} TEXT"
        )
    family, config = families.read(directory / CONFIG, data)
    extra = data.get("tfcli")
    return family, config, extra if isinstance(extra, dict) else {}


def read_data(directory: Path) -> dict[str, Any]:
    """What config.json in a directory holds. Raises UserError where there is none, or not an object."""
    path = directory / CONFIG
    if not directory.is_dir():
        raise _no_model(directory)
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no {CONFIG} in {directory}", hint="name a directory that pretrain wrote") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", hint="copy or save the model again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is a JSON {type(data).__name__}, expected an object")
    return data


def _no_model(directory: Path) -> UserError:
    if directory.is_file():
        return UserError(f"{directory} is a file, expected a model directory", hint="such as one that pretrain wrote")
    file = directory.suffix in FILES
    try:
        beside = [entry.name for entry in directory.parent.iterdir() if entry.is_dir() or file]
    except OSError:
        beside = []
    guess = nearest(directory.name, beside)
    if file:
        there = f"did you mean {directory.parent / guess}?" if guess else "is it in another directory?"
        return UserError(f"no such file: {directory}", hint=there)
    return UserError(
        f"no such model: {directory}",
        hint=f"did you mean {directory.parent / guess}?" if guess else "name a directory that pretrain wrote",
    )
