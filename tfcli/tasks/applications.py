"""The applications by the word after --task; the module of one is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple, cast

from tfcli.errors import unknown

if TYPE_CHECKING:
    from tfcli.tasks.task import Application


class Line(NamedTuple):
    """A module with an ``APPLICATION``, what it turns into what, and the kind of head that gives its models away."""

    module: str
    does: str
    head: str | None = None


APPLICATIONS = {
    "classify": Line("tfcli.tasks.classify.task", "texts or pairs of texts into labels", "sequence"),
    "tag": Line("tfcli.tasks.tag.task", "words of a text into entities", "token"),
    "answer": Line("tfcli.tasks.answer.task", "questions into spans of a text", "span"),
    "translate": Line("tfcli.tasks.translate.task", "texts into other texts, as those of another language"),
    "chat": Line("tfcli.tasks.chat.task", "conversations into answers"),
    "lm": Line("tfcli.tasks.lm.task", "text, of which the model reads on"),
}


def application(name: str) -> Application:
    """The application of a --task. Raises UserError for an unknown name, with the nearest known one."""
    if name not in APPLICATIONS:
        raise unknown("task", name, APPLICATIONS)
    return cast("Application", importlib.import_module(APPLICATIONS[name].module).APPLICATION)


def of_head(kind: str | None) -> str | None:
    """The task of a model that tfcli did not finetune, by the kind of its head."""
    return next((name for name, line in APPLICATIONS.items() if kind is not None and line.head == kind), None)
