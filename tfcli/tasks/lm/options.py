"""Settings of ``finetune --task lm``."""

from __future__ import annotations

from dataclasses import dataclass, field

from tfcli.tasks.common.options import DecoderTrain, FinetuneConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LmOptions:
    """The reading of text."""

    text_key: str | None = None
    """Field or column with the text; left out: text, content, or the only one with strings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LmConfig(FinetuneConfig):
    """Everything that decides a run on text."""

    train: DecoderTrain = field(default_factory=DecoderTrain)
    lm: LmOptions = field(default_factory=LmOptions)
