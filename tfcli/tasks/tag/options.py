"""Settings of ``finetune --task tag``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tfcli.tasks.common.options import FinetuneConfig, FinetuneData


@dataclass(frozen=True, kw_only=True, slots=True)
class TagData(FinetuneData):
    """Which columns of tables, or fields of JSON lines, hold what."""

    tokens_key: str | None = None
    """The words of a sentence; left out: tokens or words."""
    tags_key: str | None = None
    """Their tags; left out: tags, ner_tags or labels."""
    text_key: str | None = None
    """Or a text; left out: text."""
    spans_key: str | None = None
    """Its entities; left out: spans, entities, label or labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TagOptions:
    """How tags are read and learnt."""

    scheme: Literal["auto", "bio", "bioes"] = "auto"
    """The tags that the model learns; auto: those of the data, bio for spans."""
    repair: bool = True
    """Tags that break their scheme are read as conlleval does, and counted; false: they stop the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TagConfig(FinetuneConfig):
    """Everything that decides a run of tagging."""

    data: TagData = field(default_factory=TagData)
    tag: TagOptions = field(default_factory=TagOptions)
