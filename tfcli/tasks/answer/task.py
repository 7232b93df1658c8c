"""Extractive question answering: the span of a text that answers a question, or none (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tfcli.errors import UserError
from tfcli.infer.batches import by_length
from tfcli.model import heads
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.answer.data import Answer as Gold
from tfcli.tasks.answer.data import Question
from tfcli.tasks.answer.options import AnswerConfig, AnswerOptions
from tfcli.tasks.answer.predictor import PADDED, AnswerPredictor, Encoded, logits, outcomes, read, tensors
from tfcli.tasks.answer.scores import Outcome, as_numbers, best_threshold, score, table
from tfcli.tasks.answer.windows import Layout, Window, pieces_of
from tfcli.tasks.common.batch import Batch
from tfcli.tasks.common.report import Examples, Report
from tfcli.tasks.common.split import Halves, halves
from tfcli.tasks.task import Application, Headline, OverExamples, Start, check_head, settings_of
from tfcli.text.tokenizers.codec import Codec

CONTEXT = 384
"""Default tokens of a row, or the model's context where that is less (Devlin et al. 2019's published code)."""


def loss(
    model: Transformer,
    part: Batch,
    *,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    plausible: float = 0.0,
) -> tuple[Tensor, int]:
    """Return the summed mean cross-entropy (nats, fp32) of an answer's first and last position, and the rows.

    A plausible answer that is none adds, with weight ``plausible``, the cross-entropy of its ends over all positions
    but that of "no answer": as if the model first said whether there is an answer, then which.
    """
    logits_BT2 = logits(model, part, dtype=dtype, dropout=dropout)
    total = _of_ends(logits_BT2, part["targets_B2"])
    if plausible:
        total = total + plausible * _of_ends(logits_BT2[:, 1:], part["plausible_B2"] - 1)
    return total, len(part)


def _of_ends(logits_BT2: Tensor, targets_B2: Tensor) -> Tensor:
    """Return the mean of the two cross-entropies, summed over rows; targets of -1 do not count."""
    first, last = (
        F.cross_entropy(logits_BT, targets_B, ignore_index=-1, reduction="sum")
        for logits_BT, targets_B in zip(logits_BT2.unbind(dim=-1), targets_B2.unbind(dim=-1), strict=True)
    )
    return (first + last) / 2


def examples(
    windows: Sequence[Window], targets: Sequence[tuple[int, int]], plausible: Sequence[tuple[int, int]] | None = None
) -> Batch:
    """Return windows as a batch, with the positions of their answers and of plausible ones that are none."""
    pairs = {"targets_B2": targets} | ({} if plausible is None else {"plausible_B2": plausible})
    ends = {name: torch.tensor(list(each), dtype=torch.int64).reshape(-1, 2) for name, each in pairs.items()}
    return Batch({**tensors(windows), **ends}, padded=PADDED)


@dataclass(kw_only=True)
class Answering(OverExamples):
    """Questions to train on and to be scored on: the ``Finetuning`` of ``answer``."""

    predictor: AnswerPredictor
    config: AnswerConfig
    version: Literal[1, 2]
    windows: list[Window]
    targets: list[tuple[int, int]]
    plausible: list[tuple[int, int]]
    held_out: list[Question]
    held: Encoded
    held_targets: list[tuple[int, int]]
    data_report: dict[str, Any]
    threshold: float = 0.0
    """The no-answer score above which the best model abstains."""

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each window."""
        return np.array([len(window.ids) for window in self.windows], np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Number of tokens of the held-out part, once for its loss and once for its answers."""
        return 2 * sum(self.held.lengths)

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """Return the windows at ``indices``, the same in every epoch."""
        windows, *ends = ([each[i] for i in indices] for each in (self.windows, self.targets, self.plausible))
        return examples(windows, *ends)

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Return the summed cross-entropy of the ends of answers and plausible answers, and the windows."""
        return loss(model, rows, dtype=dtype, dropout=dropout, plausible=self.config.answer.plausible)

    @torch.inference_mode()
    def _loss(self, model: Transformer) -> float:
        """Return the mean over the held-out windows, without plausible answers."""
        total, runtime = 0.0, self.predictor.runtime
        for chosen in by_length(self.held.lengths, device=runtime.device):
            part = examples([self.held.windows[i] for i in chosen], [self.held_targets[i] for i in chosen])
            total += float(loss(model, part.to(runtime.device), dtype=runtime.dtype)[0])
        return total / max(1, len(self.held.windows))

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Return exact match and F1 at the threshold, and the loss per window."""
        results = outcomes(self.held_out, self.predictor.read(self.held))
        threshold = self._threshold(results)
        scores = score(results, threshold=threshold, version=self.version)
        metrics = {"val_f1": scores.f1, "val_exact_match": scores.exact_match, "val_loss": self._loss(model)}
        return metrics | ({"val_threshold": threshold} if self.version == 2 else {})

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Return F1; the error of this mean of numbers from 0 to 1 is at most that of a share."""
        return Headline.share("F1", scores["val_f1"], len(self.held_out))

    def keep(self, scores: Mapping[str, float]) -> None:
        """Keep the threshold of this evaluation with the weights."""
        self.threshold = scores.get("val_threshold", 0.0)

    def _threshold(self, results: Sequence[Outcome]) -> float:
        if self.version == 1:
            return math.inf
        given = self.config.answer.threshold
        return best_threshold(results)[0] if given is None else given

    @property
    def hf_config(self) -> dict[str, Any]:
        """The layout of rows, and the no-answer score above which the model abstains (null: it never does)."""
        layout, threshold = self.predictor.layout, self.threshold if self.version == 2 else None
        sizes = {"context": layout.length, "overlap": layout.overlap, "question": layout.question}
        return {"tfcli": {**sizes, "longest": self.predictor.longest, "threshold": threshold}}

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Return the scores of the held-out part."""
        results = outcomes(self.held_out, self.predictor.read(self.held))
        numbers = as_numbers(results, threshold=self._threshold(results), version=self.version)
        return {f"val_{name}": value for name, value in numbers.items()}, table(numbers)


class Answer(Application):
    """``--task answer``."""

    name = "answer"
    config = AnswerConfig

    def prepare(self, start: Start) -> Answering:
        """Read questions, cut contexts into windows, and attach a head for the two ends of a span."""
        config: AnswerConfig = start.config
        shape = start.model.config
        check_head(shape, heads.SpanHead.kind)
        report = Report.of(config.data)
        data = _halves(start, report)
        length = min(config.data.context or CONTEXT, shape.context)
        predictor = AnswerPredictor(
            model=start.model,
            codec=start.codec,
            runtime=start.runtime,
            layout=_layout(start.codec, length, config.answer.overlap, config.answer.question),
            longest=config.answer.longest,
        )
        usable = [q for q in data.train if not q.answers or any(answer.start is not None for answer in q.answers)]
        if not any(q.answers for q in usable):
            raise UserError("no question of the data has an answer in its context", hint="is this the right file?")
        encoded, held = predictor.encode(usable), predictor.encode(data.held_out)
        targets = _targets([q.answers for q in usable], encoded)
        plausible = _targets([q.plausible for q in usable], encoded)
        answered = {owner for owner, target in zip(encoded.owner, targets, strict=True) if target != (0, 0)}
        lost = sum(bool(q.answers) and index not in answered for index, q in enumerate(usable))
        report.note("questions whose answer is whole in no window, trained on as without one", lost)
        if config.answer.plausible:
            report.note(
                "questions without an answer, trained on with the plausible one that the data gives",
                len({owner for owner, target in zip(encoded.owner, plausible, strict=True) if target != (0, 0)}),
            )
        report.note("questions that are too long, cut", len(encoded.cut) + len(held.cut), action="cut")
        report.note("questions with a context that is read in several windows", encoded.long + held.long)
        for line in report.lines():
            start.note(f"data: {line}")
        heads.fresh(start.model, heads.SpanHead.kind, 2, seed=config.seed)
        version: Literal[1, 2] = 2 if 2 in data.infos else 1
        shared = {question.context for question in usable} & {question.context for question in data.held_out}
        data_report = report.data_report(
            self.name, "questions", _summary(usable, encoded), _summary(data.held_out, held),
            split=data.how, tokenizer_hash=start.codec.hash,
            details={"version": version, "contexts_across_splits": len(shared)},
        )  # fmt: skip
        return Answering(
            predictor=predictor, config=config, version=version, windows=encoded.windows, targets=targets,
            plausible=plausible, held_out=data.held_out, held=held,
            held_targets=_targets([q.answers for q in data.held_out], held), data_report=data_report,
        )  # fmt: skip

    def predictor(
        self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any], runtime: Runtime
    ) -> AnswerPredictor:
        """Return the predictor of a directory with a span head; one that tfcli did not write never abstains."""
        head = heads.of(model)
        if head is None or head.kind != heads.SpanHead.kind:
            raise UserError("this model has no head that finds answers", hint="finetune it with --task answer")
        ours, usual = settings_of(hf_config), AnswerOptions()
        length = min(int(ours.get("context") or CONTEXT), model.config.context)
        layout = _layout(codec, length, ours.get("overlap"), int(ours.get("question", usual.question)))
        longest, threshold = int(ours.get("longest", usual.longest)), ours.get("threshold")
        return AnswerPredictor(
            model=model, codec=codec, runtime=runtime, layout=layout, longest=longest,
            threshold=math.inf if threshold is None else float(threshold),
        )  # fmt: skip


def _halves(start: Start, report: Report) -> Halves[Question, Literal[1, 2]]:
    """Return the training and the held-out part: articles, or contexts where there is one article, stay whole."""

    def groups(whole: Sequence[Question]) -> list[str]:
        articles = [question.group for question in whole]
        return articles if len(set(articles)) > 1 else [question.context for question in whole]

    return halves(
        start.data, start.config, report, lambda specs: read(specs, start.config, report),
        things="questions", note=start.note, groups=groups,
    )  # fmt: skip


def _layout(codec: Codec, length: int, overlap: int | None, question: int) -> Layout:
    return Layout.of(codec, length=length, overlap=_overlap(overlap, length), question=min(question, length // 3))


def _overlap(asked: int | None, length: int) -> int:
    """Return the overlap of windows: more than a third of a short row would make a window every few tokens."""
    return min(128, length // 3) if asked is None else int(asked)


def _targets(answers: Sequence[Sequence[Gold]], encoded: Encoded) -> list[tuple[int, int]]:
    """Return the positions of each question's first answer in its windows; (0, 0) where a window does not hold it."""
    spans = []
    for listed, context in zip(answers, encoded.contexts, strict=True):
        starts = ((answer.start, answer.start + len(answer.text)) for answer in listed if answer.start is not None)
        first = next(starts, None)
        spans.append(None if first is None else pieces_of(context, *first))
    return [window.target(spans[owner]) for window, owner in zip(encoded.windows, encoded.owner, strict=True)]


def _summary(questions: Sequence[Question], encoded: Encoded) -> Examples:
    tokens = [0] * len(questions)
    for owner, length in zip(encoded.owner, encoded.lengths, strict=True):
        tokens[owner] += length
    contexts = {question.context for question in questions}
    return Examples(
        documents=len(questions),
        read=[(question.where, number) for question, number in zip(questions, tokens, strict=True)],
        keys=[(question.question, question.context) for question in questions],
        details={
            "without_answer": sum(not question.answers for question in questions),
            "contexts": len(contexts),
            "longest_context": max(map(len, contexts), default=0),
        },
    )


APPLICATION = Answer()
