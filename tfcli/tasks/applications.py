"""The applications by the word after --task, each imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple, cast

from tfcli.errors import unknown
from tfcli.tasks.answer.options import AnswerConfig
from tfcli.tasks.chat.options import ChatConfig
from tfcli.tasks.classify.options import ClassifyConfig
from tfcli.tasks.common.options import FinetuneConfig
from tfcli.tasks.lm.options import LmConfig
from tfcli.tasks.tag.options import TagConfig
from tfcli.tasks.translate.options import TranslateConfig

if TYPE_CHECKING:
    from tfcli.tasks.task import Application


class Line(NamedTuple):
    """A module with an ``APPLICATION``, its settings, what it does (for the help), and the kind of head it trains."""

    module: str
    config: type[FinetuneConfig]
    does: str
    head: str | None = None


APPLICATIONS = {
    "classify": Line("tfcli.tasks.classify.task", ClassifyConfig, "texts or pairs of texts into labels", "sequence"),
    "tag": Line("tfcli.tasks.tag.task", TagConfig, "words of a text into entities", "token"),
    "answer": Line("tfcli.tasks.answer.task", AnswerConfig, "questions into spans of a text", "span"),
    "translate": Line("tfcli.tasks.translate.task", TranslateConfig, "texts into other texts, as translations"),
    "chat": Line("tfcli.tasks.chat.task", ChatConfig, "conversations into answers"),
    "lm": Line("tfcli.tasks.lm.task", LmConfig, "text, of which the model reads on"),
}


def application(name: str) -> Application:
    """Return the application of a --task. Raises UserError for an unknown name, with the nearest known one."""
    if name not in APPLICATIONS:
        raise unknown("task", name, APPLICATIONS)
    return cast("Application", importlib.import_module(APPLICATIONS[name].module).APPLICATION)


def configs() -> dict[str, type[FinetuneConfig]]:
    """Return the settings class of each task."""
    return {name: line.config for name, line in APPLICATIONS.items()}


def of_head(kind: str | None) -> str | None:
    """Return the task of a model that tfcli did not finetune, by the kind of its head."""
    return next((name for name, line in APPLICATIONS.items() if kind is not None and line.head == kind), None)
