"""Settings of ``finetune --task classify``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tfcli.tasks.common.options import FinetuneConfig, FinetuneData


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyData(FinetuneData):
    """Columns of tables, or fields of JSON rows."""

    text_key: str | None = None
    """Column with the text; left out: text, sentence, question and the like. Without a header "1" is the first."""
    pair_key: str | None = None
    """Column with a second text; left out: sentence2, hypothesis and the like, where there is one."""
    label_key: str | None = None
    """Column with the label; left out: label, labels, category and the like."""
    label_separator: str | None = None
    """Separator of the labels of a row that has several, in a column of text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyOptions:
    """The loss, and how labels are chosen and scored."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced: every label has the same total weight, however rare."""
    threshold: float = 0.5
    """Probability from which a label is predicted, with several labels per text."""
    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    """Score by which the best model is chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig(FinetuneConfig):
    """Everything that decides a run of classification."""

    data: ClassifyData = field(default_factory=ClassifyData)
    classify: ClassifyOptions = field(default_factory=ClassifyOptions)
