"""Data sets by their name, ``hf:NAME``: of the Hugging Face hub, or a directory that its library reads or wrote.

Only here is the network used. No code of a data set is run: where it is made by a script, the hub's own copy in Parquet
is read.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.errors import RunError, UserError, absent
from tfcli.text.read.files import Digest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PREFIX = "hf:"
EXPECTED = "hf:NAME:SPLIT, hf:OWNER/NAME:SPLIT or hf:OWNER/NAME/CONFIG:SPLIT; or a directory in place of the name"
COPY = "refs/convert/parquet"
"""The branch on which the hub keeps every data set as Parquet."""
ONE = "state.json"
"""What ``save_to_disk`` writes into the directory of one part."""
Namer = Callable[[Any], Any]


def is_named(spec: object) -> bool:
    """Whether ``spec`` is of this form."""
    return str(spec).startswith(PREFIX)


def parts(spec: str) -> tuple[str, str | None]:
    """The name with its configuration, and the split (None where it is left out) of ``hf:NAME:SPLIT``."""
    name, colon, split = spec.removeprefix(PREFIX).partition(":")
    if not name or (colon and not split) or (not Path(name).is_dir() and name.count("/") > 2):
        raise UserError(f"{spec} names no data set", hint=EXPECTED)
    return name, split or None


def short(spec: str) -> str:
    """A word for what ``spec`` names, as for a directory."""
    return Path(parts(spec)[0]).name


def absolute(spec: str) -> str:
    """``spec`` as it is found again from another directory: a directory in it by its whole path."""
    name, split = parts(spec)
    if not Path(name).is_dir():
        return spec
    return f"{PREFIX}{Path(name).absolute()}" + (f":{split}" if split else "")


def check_split(spec: str, command: str) -> None:
    """Raise UserError for ``hf:NAME`` without a split, where it must not be the one to train on by default.

    A directory with one part, as ``save_to_disk`` writes it, has no splits.
    """
    if is_named(spec) and parts(spec)[1] is None and not (Path(parts(spec)[0]) / ONE).is_file():
        raise UserError(f"which split of {spec}?", hint=f"name it: {command} {spec}:test")


def load(spec: str) -> Dataset:
    """The rows of ``hf:NAME`` or ``hf:NAME:SPLIT``; without a split those of "train", or of the only one.

    Images and sounds are left out. Raises UserError for a name, configuration or split that is not there, with the
    nearest one; RunError where the hub is not reached.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    if sys.stderr is None or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, split = parts(spec)
    try:
        found = _found(name, split)
    except (DatasetNotFoundError, FileNotFoundError):
        raise UserError(f"there is no data set {name}", hint=EXPECTED) from None
    except ValueError as error:
        raise _unknown(spec, error) from None
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())[:300]
        hint = f"is the network there? A directory needs none: {PREFIX}DIRECTORY"
        raise RunError(f"{spec} cannot be read: {said}", hint=hint) from None
    chosen = _chosen(found, spec, split)
    media = [column for column, feature in chosen.features.items() if hasattr(feature, "decode_example")]
    return chosen.remove_columns(media) if media else chosen


def _found(name: str, split: str | None) -> Dataset | DatasetDict:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    path, part = Path(name), split if split is not None and _is_sum(split) else None
    if any((path / file).is_file() for file in ("dataset_dict.json", ONE)):  # as save_to_disk writes it
        if part is not None:
            raise UserError(f"{name} gives whole splits only, not {part}", hint="it was written by save_to_disk")
        return datasets.load_from_disk(name)
    if path.is_dir():
        is_csv = datasets.load_dataset_builder(name).name == "csv"  # pandas would take a class "None" for a missing one
        only_empty = {"keep_default_na": False, "na_values": [""]} if is_csv else {}
        return datasets.load_dataset(name, split=part, **only_empty)
    words = name.split("/")
    if len(words) == 3:
        return _of_hub("/".join(words[:2]), words[2], part)
    try:
        return _of_hub(name, None, part)
    except DatasetNotFoundError:
        if len(words) == 1:
            raise
        return _of_hub(words[0], words[1], part)  # of the old names without an owner: glue/mrpc


def _is_sum(split: str) -> bool:
    """Whether a split is put together, as train[:100] or train+test."""
    return "[" in split or "+" in split


def _of_hub(name: str, config: str | None, part: str | None) -> Dataset | DatasetDict:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=part)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        return datasets.load_dataset(name, config, split=part, revision=COPY)


def _unknown(spec: str, error: ValueError) -> UserError:
    """What ``datasets`` says of a configuration or split that is not there, as ours."""
    said = " ".join(str(error).split())
    listed = re.search(r"\[('[^\]]*')\]", said)
    names = re.findall(r"'([^']+)'", listed[1]) if listed else []
    asked = re.search(r"BuilderConfig '([^']+)'|split \"([^\"]+)\"", said)
    if not names:
        return UserError(f"{spec} cannot be read: {said[:300]}", hint=EXPECTED)
    if asked is None:
        return UserError(f"{spec} has several configurations", hint=f"name one: {', '.join(names)} ({EXPECTED})")
    word = asked[1] or asked[2]
    kind = "configuration" if asked[1] else "split"
    return absent(f"{spec} has no {kind} {word!r}", word, names)


def _chosen(found: Dataset | DatasetDict, spec: str, split: str | None) -> Dataset:
    """The split that was asked for, of what may be one already."""
    if not isinstance(found, dict):
        if split is not None and not _is_sum(split) and split != str(found.split):
            raise UserError(f"{spec} is one part of a data set, without splits", hint="leave the split out")
        return found
    wanted = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if wanted not in found:
        raise absent(f"{spec} has no split {wanted!r}", wanted, found)
    one: Dataset = found[wanted]
    return one


def rows(spec: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Columns and rows of ``load``, with the names of classes in place of their numbers."""
    dataset = load(spec)
    return tuple(dataset.column_names), with_names(dataset.to_list(), dataset.features)


def digest(listed: list[dict[str, Any]]) -> Digest:
    """Of rows, as JSON."""
    whole = Digest()
    for row in listed:
        whole.update(json.dumps(row, default=str, sort_keys=True).encode())
    return whole


def with_names(listed: list[dict[str, Any]], features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with the names of classes (features ``ClassLabel``, also in lists and objects) in place of their numbers."""
    namers = {column: namer for column, feature in features.items() if (namer := _namer(feature)) is not None}
    for row in listed:
        row |= {column: namer(row[column]) for column, namer in namers.items()}
    return listed


def _namer(feature: Any) -> Namer | None:
    """What turns a value of a feature into one with names; None where it has no classes."""
    if hasattr(feature, "int2str"):
        # -1 is the hidden label of a test split
        return lambda value: feature.int2str(value) if isinstance(value, int) and value >= 0 else None
    if isinstance(feature, Mapping):
        inner = {key: namer for key, each in feature.items() if (namer := _namer(each)) is not None}
        return (lambda value: _in_object(value, inner)) if inner else None
    each = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    namer = None if each is None else _namer(each)
    return None if namer is None else lambda value: _in_list(value, namer)


def _in_object(value: Any, namers: Mapping[str, Namer]) -> Any:
    return value | {key: namer(value[key]) for key, namer in namers.items()} if isinstance(value, dict) else value


def _in_list(value: Any, namer: Namer) -> Any:
    return [namer(each) for each in value] if isinstance(value, list) else value
