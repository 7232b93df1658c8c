"""Layers of settings: default < preset < --config file (TOML) < --set < flags, each over the one before."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from tfcli.config.ranges import check_ranges
from tfcli.errors import UserError, unknown

C = TypeVar("C")

# A preset is a few settings over the defaults.
PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "tiny": {"model.depth": 2, "model.context": 64, "train.batch_size": 8, "train.steps": 60},
        "small": {"model.depth": 6, "model.context": 256},
        "nanogpt-cpu": {
            "model.depth": 4, "model.width": 128, "model.heads": 4, "model.context": 64,
            "train.batch_size": 12, "train.steps": 2000,
        },
        "12m": {
            "model.depth": 6, "model.width": 384, "model.heads": 6, "model.context": 256,
            "tokenizer.vocab_size": 4096, "train.batch_size": 8,
        },
        "gpt2-124m": {
            "model.depth": 12, "model.width": 768, "model.heads": 12, "model.context": 1024,
            "tokenizer.vocab_size": 32768, "train.batch_size": 64,
        },
    }
)  # fmt: skip


def resolve(
    cls: type[C],
    *,
    preset: str | None = None,
    file: str | Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> tuple[C, dict[str, str]]:
    """Merge the layers into a ``cls`` and return it with the source of each setting.

    ``sets`` are ``key.path=value`` strings, ``flags`` map dotted keys to values (None: not given). Returns the
    configuration and {dotted key: "default" | "preset NAME" | "FILE" | "--set" | "flag"}. Raises UserError for an
    unknown key (with the nearest name) and for a value of the wrong type or outside its range.
    """
    sources = dict.fromkeys(known_keys(cls), "default")
    values: dict[str, Any] = {}

    def put(key: str, value: Any, source: str) -> None:
        parent, _, name = key.rpartition(".")
        if key in sources:
            values[key] = _coerce(key, value, _type_of(cls, key))
        elif parent in sources and typing.get_origin(_type_of(cls, parent)) is Mapping:
            values.setdefault(parent, {})[name] = _scalar(value)
            key = parent
        else:
            raise unknown("setting", key, sources)
        sources[key] = source

    if preset is not None:
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        for key, value in PRESETS[preset].items():
            put(key, value, f"preset {preset}")
    if file is not None:
        for key, value in _flatten(_read_toml(Path(file)), cls).items():
            put(key, value, str(file))
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item!r} has no value", hint="write --set key=value, as in --set optim.lr=1e-3")
        put(key.strip(), value.strip(), "--set")
    for key, value in (flags or {}).items():
        if value is not None:
            put(key, value, "flag")
    config = _build(cls, values)
    check_ranges(config)
    return config, sources


def known_keys(cls: type[Any], prefix: str = "") -> list[str]:
    """Every dotted key of a configuration class, in order."""
    keys: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        inner = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        keys += known_keys(kind, f"{prefix}{name}.") if inner else [prefix + name]
    return keys


def default_of(cls: type[Any], key: str) -> Any:
    """The default of a dotted key."""
    return functools.reduce(getattr, key.split("."), cls())


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values, nested like its dataclasses."""
    return {
        f.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, f.name)) else _plain(value)
        for f in dataclasses.fields(config)
    }


def from_dict(cls: type[C], data: Mapping[str, Any]) -> C:
    """The configuration that ``to_dict`` wrote. Raises UserError for keys that ``cls`` does not know."""
    values, known = _flatten(data, cls), known_keys(cls)
    for key in values:
        if key not in known:
            raise unknown("setting", key, known)
    return _build(cls, {key: _coerce(key, value, _type_of(cls, key)) for key, value in values.items()})


def seconds(text: str) -> float:
    """Parse a duration such as 90s, 10m or 1h30m. Raises UserError for anything else."""
    import re

    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    parts = match.groups() if match else (0, 0, 0)
    total = sum(float(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    if total <= 0:
        raise UserError(f"{text!r} is not a duration", hint="write 90s, 10m or 1h30m")
    return total


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _type_of(cls: type[Any], key: str) -> Any:
    return functools.reduce(lambda kind, part: typing.get_type_hints(kind)[part], key.split("."), cls)


def _flatten(data: Mapping[str, Any], cls: type[Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    keys = known_keys(cls)
    for name, value in data.items():
        key = prefix + name
        if isinstance(value, Mapping) and key not in keys:
            flat |= _flatten(value, cls, key + ".")
        else:
            flat[key] = value
    return flat


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}", hint="--config takes a TOML file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint="--config takes a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}", hint="for example: [train] newline steps = 500") from None


def _scalar(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value.lower(), value)


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """``value`` (a string from the shell, or a TOML or JSON value) as the annotated type ``kind``."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "auto", "")):
            return None
        return _coerce(key, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value not in args:
            raise unknown(f"{key}", str(value), args)
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{key} is {value!r}", hint="it must be a list")
        return tuple(_coerce(key, item, args[0]) for item in items)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{key} is {value!r}", hint=f"it must be a table of settings, as in {key}.name = value")
        for name, item in value.items():
            if not isinstance(item, str | int | float):
                raise UserError(f"{key}.{name} is {item!r}", hint="it must be a number, a text, true or false")
        return dict(value)
    try:
        if kind is bool and not isinstance(value, bool):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind is int:
            if isinstance(value, bool) or int(float(value)) != float(value):
                raise ValueError
            return int(float(value)) if not isinstance(value, str) or not value.lstrip("+-").isdigit() else int(value)
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{key} is {value!r}", hint=f"it must be {expected}") from None
    if not isinstance(value, kind):
        raise UserError(f"{key} is {value!r}", hint=f"it must be a {'text' if kind is str else kind.__name__}")
    return value


def _build(cls: type[C], values: Mapping[str, Any], prefix: str = "") -> C:
    kwargs: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            kwargs[name] = _build(kind, values, f"{prefix}{name}.")
        elif prefix + name in values:
            kwargs[name] = values[prefix + name]
    return cls(**kwargs)
