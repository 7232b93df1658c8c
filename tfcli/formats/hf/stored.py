"""A model directory on disk: its files are checked against each other before anything of its size is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError, nearest
from tfcli.formats.hf.families import registry as families
from tfcli.formats.hf.families.base import Family, Place
from tfcli.formats.hf.settings import json_object
from tfcli.formats.hf.weights import Weights
from tfcli.model import cost

if TYPE_CHECKING:
    import torch

CONFIG, ADAPTER = "config.json", "adapter_config.json"
FILES = (".gguf", ".bin", ".pt", ".pth", ".safetensors")
"""Suffixes that name a file of a model, whether or not it exists."""
OWN = "tfcli-"
"""Prefix of the model_type of a baseline, which belongs to no family: only its objective reads it."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A model directory whose files were checked against each other; ``tensors`` reads them."""

    config: ModelConfig
    family: Family
    weights: Weights
    places: Mapping[str, Place]
    """{tfcli's name: its place in the files}; a tied head has none."""
    not_read: tuple[str, ...]
    """Names of tensors of parts that tfcli does not have, such as a pooler or a classifier."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (tfcli's name, tensor) one at a time, in the dtype that each is stored in."""
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

    ``hf_config`` is the content of config.json, where it was read already. ``on_note`` is told of tensors that are not
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
    names, aliases, entries = family.names, family.names.aliases or {}, {}
    for name, entry in weights.entries.items():
        stem, dot, last = name.rpartition(".")
        entries[stem + dot + aliases.get(last, last)] = entry
    embed = {prefix: names.places(["embed.weight"], prefix)["embed.weight"].name for prefix in names.prefixes}
    prefix = next((prefix for prefix, name in embed.items() if name in entries), names.prefixes[0])
    places = names.places(shapes, prefix)
    weights = Weights(entries, weights.path)
    present = {name: entry.shape for name, entry in entries.items() if not name.endswith(names.buffers)}
    not_read = tuple(name for name in present if name.startswith(names.others))
    for name in not_read:
        del present[name]
    head, table = f"{names.head}.weight", present.get(places["embed.weight"].name)
    if not config.tied and head not in present and not_read:  # a classifier: its class has no head of the vocabulary
        config = replace(config, tied=True)
        del places["head.weight"], shapes["head.weight"]
    copies = [head] if config.tied else []
    for name in (*copies, *(prefix + copy for copy in names.copies)):
        if name in present and present[name] == table:
            del present[name]
    for name in set(names.zeros) & present.keys():
        if weights.read(name).any():
            raise UserError(f"{weights.path}: {name} is not zero", hint="tfcli has no such part")
        del present[name]
    expected = {place.name: place.stored_shape(shapes[ours]) for ours, place in places.items()}
    problems = mismatches(expected, present)
    if problems:
        raise UserError(
            f"{weights.path} does not hold the tensors that its config.json describes: {problems}",
            hint="the two files must come from one model",
        )
    if not_read and on_note:
        on_note(f"{directory}: {len(not_read)} tensors of other parts are not read ({few(not_read)})")
    return Stored(config=config, family=family, weights=weights, places=places, not_read=not_read)


def mismatches(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], ignored: Container[str] = ()
) -> str:
    """Compare {name: shape} of tensors: "2 missing (a, b); 1 unexpected (c)", "" where they are the same."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [repr(name)[1:-1] for name in found if name not in expected and name not in ignored],
        "mis-shaped": [
            f"{name} {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    return "; ".join(f"{len(names)} {kind} ({few(names)})" for kind, names in problems.items() if names)


def few(names: Sequence[str]) -> str:
    """Return the first of many names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_config(directory: str | Path, hf_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the shape of the model in a directory, without torch. Raises UserError for unsupported settings."""
    return read_settings(Path(directory), hf_config)[1]


def read_settings(
    directory: Path, hf_config: Mapping[str, Any] | None = None
) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """Return family and shape of the model in a directory, and what tfcli added to them; as ``read_config``.

    ``hf_config`` is the content of config.json, where it was read already.
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
    """Return the content of config.json in a directory. Raises UserError if there is none, or not an object."""
    if not directory.is_dir():
        raise _no_model(directory)
    try:
        return json_object(directory / CONFIG, (directory / CONFIG).read_bytes())
    except FileNotFoundError:
        raise UserError(f"no {CONFIG} in {directory}", hint="name a directory that pretrain wrote") from None


def _no_model(directory: Path) -> UserError:
    if directory.is_file():
        return UserError(f"{directory} is a file, expected a model directory", hint="such as one that pretrain wrote")
    file = directory.suffix in FILES
    try:
        beside = [entry.name for entry in directory.parent.iterdir() if entry.is_dir() or file]
    except OSError:
        beside = []
    guess = nearest(directory.name, beside)
    advice = "is it in another directory?" if file else "name a directory that pretrain wrote"
    hint = f"did you mean {directory.parent / guess}?" if guess else advice
    return UserError(f"no such {'file' if file else 'model'}: {directory}", hint=hint)
