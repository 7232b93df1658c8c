"""Datasets by name, ``hf:NAME``: from the Hugging Face hub, or a directory that the datasets library reads or wrote.

No other module uses the network. The code of a dataset is never run: for one with a loading script, the hub's own copy
in Parquet is read.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.errors import RunError, UserError, absent
from tfcli.text.read.files import Digest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PREFIX = "hf:"
EXPECTED = "hf:NAME:SPLIT, hf:OWNER/NAME:SPLIT or hf:OWNER/NAME/CONFIG:SPLIT; or a directory instead of the name"
COPY = "refs/convert/parquet"
"""The branch on which the hub keeps every dataset as Parquet."""
ONE = "state.json"
"""The file that ``save_to_disk`` writes for a dataset without splits."""
Namer = Callable[[Any], Any]


def is_named(spec: object) -> bool:
    """Return whether ``spec`` begins with ``hf:``."""
    return str(spec).startswith(PREFIX)


def parts(spec: str) -> tuple[str, str | None]:
    """Return the name with its configuration, and the split (None without one), of ``hf:NAME:SPLIT``."""
    name, colon, split = spec.removeprefix(PREFIX).partition(":")
    if not name or (colon and not split) or (not Path(name).is_dir() and name.count("/") > 2):
        raise UserError(f"{spec} is not the name of a dataset", hint=f"expected {EXPECTED}")
    return name, split or None


def short(spec: str) -> str:
    """Return the last part of the name, as for a directory."""
    return Path(parts(spec)[0]).name


def absolute(spec: str) -> str:
    """Return ``spec`` with the absolute path of a directory in it, so that it holds in other working directories."""
    name, split = parts(spec)
    if not Path(name).is_dir():
        return spec
    return f"{PREFIX}{Path(name).absolute()}" + (f":{split}" if split else "")


def check_split(spec: str, command: str) -> None:
    """Raise UserError for ``hf:NAME`` without a split, where the default, the training split, would be wrong.

    A dataset without splits, as ``save_to_disk`` may write it, needs none.
    """
    if is_named(spec) and parts(spec)[1] is None and not (Path(parts(spec)[0]) / ONE).is_file():
        raise UserError(f"{spec} needs a split", hint=f"for example: {command} {spec}:test")


def load(spec: str) -> Dataset:
    """Load ``hf:NAME`` or ``hf:NAME:SPLIT``, by default the split "train" or the only one, without images and sounds.

    Raises UserError for a name, configuration or split that does not exist, with the most similar one; RunError if the
    hub cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    if sys.stderr is None or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, split = parts(spec)
    try:
        loaded = _loaded(name, split)
    except (DatasetNotFoundError, FileNotFoundError):
        raise UserError(f"there is no dataset {name}", hint=EXPECTED) from None
    except ValueError as error:
        raise _unknown(spec, error) from None
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        message = " ".join(str(error).split())[:300]
        hint = f"check the network, which a directory does not need: {PREFIX}DIRECTORY"
        raise RunError(f"{spec} cannot be read: {message}", hint=hint) from None
    chosen = _chosen(loaded, spec, split)
    media = [column for column, feature in chosen.features.items() if hasattr(feature, "decode_example")]
    return chosen.remove_columns(media) if media else chosen


def _loaded(name: str, split: str | None) -> Dataset | DatasetDict:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    path, part = Path(name), split if split is not None and _is_sum(split) else None
    if any((path / file).is_file() for file in ("dataset_dict.json", ONE)):  # as save_to_disk writes it
        if part is not None:
            raise UserError(f"{name} has only whole splits, not {part}", hint="it was written by save_to_disk")
        return datasets.load_from_disk(name)
    if path.is_dir():
        is_csv = datasets.load_dataset_builder(name).name == "csv"  # pandas would read a class "None" as missing
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
        return _of_hub(words[0], words[1], part)  # an old name without an owner: glue/mrpc


def _is_sum(split: str) -> bool:
    """Return whether a split is an expression, such as train[:100] or train+test."""
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
    """Convert the error of ``datasets`` for an unknown configuration or split."""
    message = " ".join(str(error).split())
    listed = re.search(r"\[('[^\]]*')\]", message)
    names = re.findall(r"'([^']+)'", listed[1]) if listed else []
    asked = re.search(r"BuilderConfig '([^']+)'|split \"([^\"]+)\"", message)
    if not names:
        return UserError(f"{spec} cannot be read: {message[:300]}", hint=EXPECTED)
    if asked is None:
        return UserError(f"{spec} has several configurations", hint=f"name one: {', '.join(names)} ({EXPECTED})")
    word = asked[1] or asked[2]
    kind = "configuration" if asked[1] else "split"
    return absent(f"{spec} has no {kind} {word!r}", word, names)


def _chosen(loaded: Dataset | DatasetDict, spec: str, split: str | None) -> Dataset:
    """Return the requested split of what may be one already."""
    if not isinstance(loaded, dict):
        if split is not None and not _is_sum(split) and split != str(loaded.split):
            raise UserError(f"{spec} is a dataset without splits", hint="leave out the split")
        return loaded
    wanted = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if wanted not in loaded:
        raise absent(f"{spec} has no split {wanted!r}", wanted, loaded)
    one: Dataset = loaded[wanted]
    return one


def rows(spec: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Load a dataset and return its columns and rows, with the names of classes instead of their numbers."""
    dataset = load(spec)
    return tuple(dataset.column_names), with_names(dataset.to_list(), dataset.features)


def digest(values: list[dict[str, Any]]) -> Digest:
    """Return the digest of rows as JSON."""
    whole = Digest()
    for row in values:
        whole.update(json.dumps(row, default=str, sort_keys=True).encode())
    return whole


def with_names(values: list[dict[str, Any]], features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Replace the numbers of classes (features ``ClassLabel``, also in lists and objects) by their names, in place."""
    namers = {column: namer for column, feature in features.items() if (namer := _namer(feature)) is not None}
    for row in values:
        row |= {column: namer(row[column]) for column, namer in namers.items()}
    return values


def _namer(feature: Any) -> Namer | None:
    """Return the function that replaces classes by their names in a value of a feature; None without classes."""
    if hasattr(feature, "int2str"):
        # -1 stands for the hidden labels of a test split
        return lambda value: feature.int2str(value) if isinstance(value, int) and value >= 0 else None
    if isinstance(feature, Mapping):
        inner = {key: namer for key, each in feature.items() if (namer := _namer(each)) is not None}
        return partial(_in_object, namers=inner) if inner else None
    each = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    namer = None if each is None else _namer(each)
    return None if namer is None else partial(_in_list, namer=namer)


def _in_object(value: Any, namers: Mapping[str, Namer]) -> Any:
    return value | {key: namer(value[key]) for key, namer in namers.items()} if isinstance(value, dict) else value


def _in_list(value: Any, namer: Namer) -> Any:
    return [namer(each) for each in value] if isinstance(value, list) else value
