"""Settings of ``finetune --task answer``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tfcli.config.ranges import Count, NotNegative, Range, RunShare
from tfcli.tasks.common.options import FinetuneConfig, FinetuneData, FinetuneOptim


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerData(FinetuneData):
    """Columns of tables, or fields of JSON rows."""

    question_key: str | None = None
    """The question; left out: question."""
    context_key: str | None = None
    """The text that holds the answer; left out: context."""
    answers_key: str | None = None
    """Texts and their offsets, as {"text": [...], "answer_start": [...]}, or in a table one text with answer_start
    beside it; left out: answers, or of a table answer_text or answer."""

    @property
    def keys(self) -> dict[str, str | None]:
        """Columns by what they hold."""
        return {"question": self.question_key, "context": self.context_key, "answers": self.answers_key}


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerOptions:
    """The encoding of questions, and the choice of answers."""

    overlap: Annotated[int, Range(at_least=0)] | None = None
    """Tokens of a long context that neighboring windows share ("stride" elsewhere). Left out: a third of a row, at
    most 128."""
    question: Count = 64
    """Maximum tokens of a question, which is truncated to it, and to a third of a row."""
    longest: Count = 30
    """Maximum tokens of an answer."""
    plausible: NotNegative = 1.0
    """Loss weight of a plausible answer, where the data gives one for an unanswerable question; 0: ignore it."""
    threshold: float | None = None
    """No-answer score (its lead over the best answer, in logits) above which the model abstains; left out: the best on
    the held-out part. Without unanswerable questions in the data, the model never abstains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerOptim(FinetuneOptim):
    """The optimizer of every task, at full rate from the start.

    The first hundred steps teach only where answers are likely, and a slow start prolongs that plateau. On 5,426
    questions a warm-up of 0.06 cost 60 of 1,055 steps, and 1 point of F1 on questions with an answer.
    """

    warmup: RunShare = 0.0
    """Share of the run over which the rate rises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerConfig(FinetuneConfig):
    """Everything that decides a run of question answering."""

    data: AnswerData = field(default_factory=AnswerData)
    optim: AnswerOptim = field(default_factory=AnswerOptim)
    answer: AnswerOptions = field(default_factory=AnswerOptions)
