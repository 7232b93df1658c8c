"""The applications by name; the module of one is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

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

APPLICATIONS = {
    "classify": "texts or pairs of texts into labels",
    "tag": "words of a text into entities",
    "answer": "questions into spans of a text",
    "chat": "conversations into answers",
    "translate": "texts into other texts, as those of another language",
    "lm": "text, of which the model reads on",
}
"""{--task: what it does}; ``tfcli.tasks.NAME.task`` has the ``APPLICATION``."""
CONFIGS: Mapping[str, type[FinetuneConfig]] = {
    "classify": ClassifyConfig,
    "tag": TagConfig,
    "answer": AnswerConfig,
    "chat": ChatConfig,
    "translate": TranslateConfig,
    "lm": LmConfig,
}
"""{--task: its settings}."""
KINDS = {"sequence": "classify", "token": "tag", "span": "answer"}
"""{kind of head: the task of a model with it}, of models that tfcli did not finetune."""


def application(name: str) -> Application:
    """The application of a --task. Raises UserError for an unknown name, with the nearest known one."""
    if name not in APPLICATIONS:
        raise unknown("task", name, APPLICATIONS)
    module = importlib.import_module(f"tfcli.tasks.{name}.task")
    return cast("Application", module.APPLICATION)
