"""Settings of ``finetune --task classify``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tfcli.tasks.common.options import FinetuneConfig, FinetuneData


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyData(FinetuneData):
    """Which columns hold what."""

    text_key: str | None = None
    """Column with the text; left out: text, sentence, question and the like. Without a header "1" is the first."""
    pair_key: str | None = None
    """Column with a second text; left out: sentence2, hypothesis and the like, where there is one."""
    label_key: str | None = None
    """Column with the label; left out: label, labels, category and the like."""
    label_separator: str | None = None
    """What stands between the labels of a row that has several, in columns of text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyOptions:
    """What is classified how."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced: rare labels weigh as much as frequent ones together."""
    threshold: float = 0.5
    """Where several labels are possible: the probability from which one is given."""
    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    """What decides which model is best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig(FinetuneConfig):
    """Everything that decides a run of classify."""

    data: ClassifyData = field(default_factory=ClassifyData)
    classify: ClassifyOptions = field(default_factory=ClassifyOptions)
