"""Families of models: what each setting of their config.json means for tfcli, and back.

A setting that tfcli does not support is refused by name, never ignored. What a config.json leaves out has the default
of transformers' class. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError
from tfcli.formats.hf.families.base import Family, HeadNames
from tfcli.formats.hf.families.bert import BERT
from tfcli.formats.hf.families.gemma import GEMMA
from tfcli.formats.hf.families.gpt2 import GPT2
from tfcli.formats.hf.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from tfcli.formats.hf.families.mbart import MBART
from tfcli.formats.hf.families.modernbert import MODERNBERT
from tfcli.formats.hf.settings import Settings

FAMILIES = (QWEN3, LLAMA, QWEN2, MISTRAL, GEMMA, GPT2, BERT, MODERNBERT, MBART)
FIXED: Mapping[str, Any] = {"quantization_config": None}
"""Settings for which tfcli supports one value, in every family."""


def find(hf_config: Mapping[str, Any]) -> Family | None:
    """Return the family of the model that a config.json describes, None for one that is not in the table."""
    return next((family for family in FAMILIES if family.model_type == hf_config.get("model_type")), None)


def head_names(family: Family, kind: str) -> HeadNames:
    """Return the names of a head of a family. Raises UserError for a family without it."""
    if kind not in family.heads:
        have = [family.model_type for family in FAMILIES if kind in family.heads]
        hint = f"models that have: {', '.join(have)}; make one: tfcli pretrain TEXT --arch bert"
        raise UserError(f"a model of type {family.model_type} has no head of kind {kind!r} in transformers", hint=hint)
    return family.heads[kind]


def kind_of(hf_config: Mapping[str, Any]) -> str | None:
    """Return the kind of head of the model that a config.json describes, None for none that is known."""
    family, listed = find(hf_config), hf_config.get("architectures")
    if family is None or not isinstance(listed, list):
        return None
    return next((kind for kind, head in family.heads.items() if head.architecture in listed), None)


def read(path: Path, data: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """Return the family and the shape of the model whose config.json, at ``path``, holds ``data``.

    Raises UserError for settings that tfcli does not support and for invalid values.
    """
    family = find(data)
    if family is None:
        raise UserError(
            f"{path.parent} holds a model of type {data.get('model_type')!r}, which tfcli does not read",
            hint=f"it reads: {', '.join(family.model_type for family in FAMILIES)}",
        )
    settings = Settings(path, data, family.defaults)
    for key, value in {**FIXED, **family.fixed}.items():
        if settings.data.get(key) not in (None, value):
            raise settings.error(key, f"tfcli supports only {value!r}")
    fields = {ours: settings.get(theirs) for theirs, ours in family.sizes.items()}
    return family, ModelConfig(**fields | family.read(settings))


def written(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """Return the first family that reads its own settings back as this model, and those settings.

    Raises UserError if there is none.
    """
    for family in FAMILIES:
        sizes = {theirs: getattr(config, ours) for theirs, ours in family.sizes.items()}
        settings = {"model_type": family.model_type, **sizes, **family.write(config)}
        try:
            if read(Path(family.model_type), settings)[1] == config:
                return family, {"architectures": [family.architecture], **settings}
        except UserError:
            continue
    raise UserError(
        "no family of transformers has this model's architecture, so it cannot be written as one",
        hint=f"tfcli writes: {', '.join(family.architecture for family in FAMILIES)}",
    )
