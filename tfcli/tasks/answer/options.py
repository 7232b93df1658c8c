"""Settings of ``finetune --task answer``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tfcli.config.ranges import Count, NotNegative, Range, RunShare
from tfcli.tasks.common.options import FinetuneConfig, FinetuneData, FinetuneOptim


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerData(FinetuneData):
    """Which columns of tables, or fields of JSON rows, hold what."""

    question_key: str | None = None
    """Left out: question."""
    context_key: str | None = None
    """Left out: context."""
    answers_key: str | None = None
    """Texts and their offsets, as {"text": [...], "answer_start": [...]}, or in a table one text with answer_start
    beside it; left out: answers, or of a table answer_text or answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerOptions:
    """How questions are laid out and answered."""

    overlap: Annotated[int, Range(at_least=0)] | None = None
    """Pieces of a long context that neighbouring windows share; its "stride" elsewhere. Left out: a third of a row, at
    most 128."""
    question: Count = 64
    """Pieces of a question at most, and at most a third of a row; what follows is cut."""
    longest: Count = 30
    """Pieces of an answer at most."""
    plausible: NotNegative = 1.0
    """Weight of the loss of a plausible answer, where the data has one for a question without an answer; 0: none."""
    threshold: float | None = None
    """By how much "no answer" must score above the best answer to be given; left out: what is best on the held-out
    part. Data in which every question has an answer has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerOptim(FinetuneOptim):
    """As for every task, but at full rate from the start.

    The first hundred steps teach only where answers are likely; the model leaves that plateau the later, the slower it
    begins. On 5,426 questions a warm-up of 0.06 cost 60 of 1,055 steps, and 1 of F1 on those with an answer.
    """

    warmup: RunShare = 0.0
    """Part of the run over which the rate rises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerConfig(FinetuneConfig):
    """Everything that decides a run of answering."""

    data: AnswerData = field(default_factory=AnswerData)
    optim: AnswerOptim = field(default_factory=AnswerOptim)
    answer: AnswerOptions = field(default_factory=AnswerOptions)
