"""Settings of ``finetune --task tag``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tfcli.tasks.common.options import FinetuneConfig, FinetuneData


@dataclass(frozen=True, kw_only=True, slots=True)
class TagData(FinetuneData):
    """Columns of tables, or fields of JSON lines."""

    tokens_key: str | None = None
    """The words of a sentence; left out: tokens or words."""
    tags_key: str | None = None
    """Their tags; left out: tags, ner_tags or labels."""
    text_key: str | None = None
    """Or a raw text; left out: text."""
    spans_key: str | None = None
    """Its entities as character spans; left out: spans, entities, label or labels."""

    @property
    def keys(self) -> dict[str, str | None]:
        """Columns by what they hold."""
        return {"tokens": self.tokens_key, "tags": self.tags_key, "text": self.text_key, "spans": self.spans_key}


@dataclass(frozen=True, kw_only=True, slots=True)
class TagOptions:
    """The reading and the scheme of tags."""

    scheme: Literal["auto", "bio", "bioes"] = "auto"
    """Scheme of the labels that the model learns; auto: that of the data, bio for spans."""
    repair: bool = True
    """Read tags that break their scheme as conlleval does, and count them; false: stop the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TagConfig(FinetuneConfig):
    """Everything that decides a run of tagging."""

    data: TagData = field(default_factory=TagData)
    tag: TagOptions = field(default_factory=TagOptions)
