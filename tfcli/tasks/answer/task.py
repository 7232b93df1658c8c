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
from tfcli.tasks.answer import data as rows
from tfcli.tasks.answer import predictor as reader
from tfcli.tasks.answer.data import Question
from tfcli.tasks.answer.options import AnswerConfig, AnswerOptions
from tfcli.tasks.answer.predictor import PADDED, Encoded, Reading, encode, logits, pairs
from tfcli.tasks.answer.scores import Outcome, as_numbers, best_threshold, score, table
from tfcli.tasks.answer.windows import Layout, Window, pieces_of
from tfcli.tasks.common.batch import Batch
from tfcli.tasks.common.report import Report, duplicates
from tfcli.tasks.common.split import GIVEN, split
from tfcli.tasks.task import Application, Evaluation, Headline, JudgedByF1, Predictor, Start, check_head, settings_of
from tfcli.text.data_report import Part
from tfcli.text.read import tables
from tfcli.text.tokenizers.codec import Codec

CONTEXT = 384
"""Tokens of a row where data.context is left out, or what the model has (Devlin et al. 2019's published code)."""


def loss(
    model: Transformer,
    part: Batch,
    *,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    plausible: float = 0.0,
) -> tuple[Tensor, int]:
    """Summed mean of the cross-entropies (nats, fp32) of an answer's first and last position, and the rows.

    What is ``plausible`` and no answer adds, so weighted, the cross-entropy of its ends over all positions but that of
    "no answer": as if the model had first to say whether there is one, then which.
    """
    logits_BT2 = logits(model, part, dtype=dtype, dropout=dropout)
    total = _of_ends(logits_BT2, part["targets_B2"])
    if plausible:
        total = total + plausible * _of_ends(logits_BT2[:, 1:], part["plausible_B2"] - 1)
    return total, len(part)


def _of_ends(logits_BT2: Tensor, targets_B2: Tensor) -> Tensor:
    """The mean of the two cross-entropies, summed over rows; a target of -1 counts nothing."""
    first, last = (
        F.cross_entropy(logits_BT, targets_B, ignore_index=-1, reduction="sum")
        for logits_BT, targets_B in zip(logits_BT2.unbind(dim=-1), targets_B2.unbind(dim=-1), strict=True)
    )
    return (first + last) / 2


def examples(
    windows: Sequence[Window], targets: Sequence[tuple[int, int]], plausible: Sequence[tuple[int, int]] | None = None
) -> Batch:
    """Windows as a batch, with the positions of their answers, and of plausible ones that are none."""
    made = {"targets_B2": targets} | ({} if plausible is None else {"plausible_B2": plausible})
    ends = {name: torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2) for name, pairs in made.items()}
    return Batch({**reader.tensors(windows), **ends}, padded=PADDED)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How one model answers: laid out, read, and silent where ``null_margin`` is above ``threshold``."""

    model: Transformer
    codec: Codec
    runtime: Runtime
    layout: Layout
    longest: int

    def encode(self, questions: Sequence[tuple[str, str]]) -> Encoded:
        """The windows of (question, context) pairs."""
        return encode(self.codec, self.layout, questions)

    def read(self, encoded: Encoded) -> list[Reading]:
        """The best answer to each question."""
        return reader.read(self.model, encoded, self.runtime, longest=self.longest)


def outcomes(questions: Sequence[Question], readings: Sequence[Reading]) -> list[Outcome]:
    """Readings against their golds."""
    return [
        Outcome(answer=q.context[r.start : r.end], null_margin=r.null_margin, golds=q.golds)
        for q, r in zip(questions, readings, strict=True)
    ]


def read(specs: Sequence[str], config: AnswerConfig, report: Report) -> tuple[list[Question], Literal[1, 2]]:
    """The questions of all files, and whether some may have no answer (2)."""
    options, paths = config.data, tables.expand(specs)
    keys = rows.Keys(question=options.question_key, context=options.context_key, answers=options.answers_key)
    found = [rows.read(path, report, encoding=options.encoding, errors=options.errors, keys=keys) for path in paths]
    questions = [question for each in found for question in each.questions]
    if len(found) > 1:
        seen: set[str] = set()
        for question in questions:
            if question.id in seen:
                report.fault("questions with an id that another file has too", question.where, None)
            seen.add(question.id)
    version: Literal[1, 2] = 2 if any(each.version == 2 for each in found) else 1
    return questions, version


@dataclass(kw_only=True)
class Answering(JudgedByF1):
    """Questions to learn from and to be scored on: the ``Finetuning`` of ``answer``."""

    answers: Answers
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
    """Of the model that is kept."""

    @property
    def size(self) -> int:
        """Windows in one epoch."""
        return len(self.windows)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each window."""
        return np.array([len(window.ids) for window in self.windows], np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Of the held-out part, once for its loss and once for its answers."""
        return 2 * sum(len(window.ids) for window in self.held.windows)

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """The same in every epoch."""
        windows, *ends = ([each[i] for i in indices] for each in (self.windows, self.targets, self.plausible))
        return examples(windows, *ends)

    def count(self, rows: Batch) -> int:
        """Windows."""
        return len(rows)

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed cross-entropy of the ends of answers, and of plausible ones."""
        return loss(model, rows, dtype=dtype, dropout=dropout, plausible=self.config.answer.plausible)

    @torch.inference_mode()
    def _loss(self, model: Transformer) -> float:
        """The mean over the held-out windows, of answers alone."""
        total = 0.0
        for chosen in by_length([len(window.ids) for window in self.held.windows], device=self.answers.runtime.device):
            part = examples([self.held.windows[i] for i in chosen], [self.held_targets[i] for i in chosen])
            total += float(loss(model, part.to(self.answers.runtime.device), dtype=self.answers.runtime.dtype)[0])
        return total / max(1, len(self.held.windows))

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Exact match and F1 at the threshold, and the loss a window."""
        found = outcomes(self.held_out, self.answers.read(self.held))
        threshold = self._threshold(found)
        scores = score(found, threshold=threshold, version=self.version)
        said = {"val_f1": scores.f1, "val_exact_match": scores.exact_match, "val_loss": self._loss(model)}
        return said | ({"val_threshold": threshold} if self.version == 2 else {})

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """F1; of an average over questions, of numbers from 0 to 1, the error is at most that of a share."""
        return Headline.share("F1", scores["val_f1"], len(self.held_out))

    def keep(self, scores: Mapping[str, float]) -> None:
        """The threshold of this evaluation goes with the weights."""
        self.threshold = scores.get("val_threshold", 0.0)

    def _threshold(self, found: Sequence[Outcome]) -> float:
        if self.version == 1:
            return math.inf
        given = self.config.answer.threshold
        return best_threshold(found)[0] if given is None else given

    @property
    def about(self) -> dict[str, Any]:
        """How rows are laid out, and when to give no answer (null: never)."""
        layout = self.answers.layout
        return {
            "tfcli": {
                "context": layout.length,
                "overlap": layout.overlap,
                "question": layout.question,
                "longest": self.answers.longest,
                "threshold": self.threshold if self.version == 2 else None,
            }
        }

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Scores of the held-out part."""
        found = outcomes(self.held_out, self.answers.read(self.held))
        numbers = as_numbers(found, threshold=self._threshold(found), version=self.version)
        return {f"val_{name}": value for name, value in numbers.items()}, table(numbers)


class AnswerPredictor(Predictor):
    """A finetuned model that answers: the ``Predictor`` of ``answer``."""

    key = "question"

    def __init__(self, answers: Answers, threshold: float) -> None:
        self.answers, self.threshold = answers, threshold

    def plain(self, line: str) -> Question:
        """A question and a context with a tab between them."""
        question, tab, context = line.partition("\t")
        if not tab:
            raise UserError("has no context: expected a question, a tab and a text")
        return _asked(question, context)

    def parse(self, row: dict[str, Any]) -> Question:
        """{"question": "...", "context": "..."}, perhaps with an "id"."""
        if not isinstance(row.get("question"), str) or not isinstance(row.get("context"), str):
            raise UserError('has no "question" and "context" with strings')
        return _asked(row["question"], row["context"], str(row.get("id", "")))

    def predict(self, inputs: Sequence[Question]) -> list[dict[str, Any]]:
        """{"question", "answer", "start", "end", "score", "no_answer"}, offsets in characters of the context.

        ``score`` is the probability of the answer, ``no_answer`` that of none; where none is given, "answer" is "" and
        has no offsets. An input's "id" comes back. "cut" where a question was longer than the model reads; contexts of
        any length are read whole.
        """
        encoded = self.answers.encode(pairs(inputs))
        answers = [self._answer(*each) for each in zip(inputs, self.answers.read(encoded), strict=True)]
        for index in encoded.cut:
            answers[index]["cut"] = True
        return answers

    def _answer(self, asked: Question, found: Reading) -> dict[str, Any]:
        silent = found.null_margin > self.threshold or found.start == found.end
        return {
            **({"id": asked.id} if asked.id else {}),
            "question": asked.question,
            "answer": "" if silent else asked.context[found.start : found.end],
            "start": None if silent else found.start,
            "end": None if silent else found.end,
            "score": round(found.null_probability if silent else found.probability, 6),
            "no_answer": round(found.null_probability, 6),
        }

    def show(self, answer: Mapping[str, Any]) -> str:
        """The answer, its probability and the question, with tabs between; "-" for no answer."""
        said = " ".join(str(answer["answer"]).split()) or "-"
        return f"{said}\t{answer['score']:.4f}\t{' '.join(str(answer['question']).split())}"

    def evaluate(self, specs: Sequence[str], config: AnswerConfig, *, limit: int | None) -> Evaluation:
        """Exact match and F1 by the rules of the official scripts, with 95 % bootstrap intervals over questions."""
        report = Report(strict=config.data.strict)
        questions, version = read(specs, config, report)
        questions = questions[:limit]
        encoded = self.answers.encode(pairs(questions))
        readings = self.answers.read(encoded)
        report.note("questions that are too long, cut", len(encoded.cut), action="cut")
        threshold = self.threshold if config.answer.threshold is None else config.answer.threshold
        numbers = as_numbers(outcomes(questions, readings), threshold=threshold, version=version)
        numbers["data"] = report.as_json()
        answering = AnswerPredictor(self.answers, threshold if version == 2 else math.inf)
        predictions = [answering._answer(*each) for each in zip(questions, readings, strict=True)]
        for answer, question in zip(predictions, questions, strict=True):
            answer["expected"] = list(question.golds)
        return Evaluation(scores=numbers, lines=table(numbers), predictions=predictions, notes=tuple(report.lines()))


def _asked(question: str, context: str, id: str = "") -> Question:
    return Question(id=id, question=question, context=context, answers=(), group="")


class Answer(Application):
    """``--task answer``."""

    name = "answer"
    config = AnswerConfig

    def prepare(self, start: Start) -> Answering:
        """Read questions, cut contexts into windows, and attach a head for the two ends of a span."""
        config: AnswerConfig = start.config
        shape = start.model.config
        check_head(shape, heads.SpanHead.kind)
        report = Report(strict=config.data.strict)
        train, held_out, version, how = _halves(start, report)
        length = min(config.data.context or CONTEXT, shape.context)
        answers = Answers(
            model=start.model,
            codec=start.codec,
            runtime=start.runtime,
            layout=Layout.of(
                start.codec,
                length=length,
                overlap=_overlap(config.answer.overlap, length),
                question=min(config.answer.question, length // 3),
            ),
            longest=config.answer.longest,
        )
        usable = [q for q in train if not q.answers or any(answer.start is not None for answer in q.answers)]
        if not any(q.answers for q in usable):
            raise UserError("no question of the data has an answer in its context", hint="is this the right file?")
        encoded, held = answers.encode(pairs(usable)), answers.encode(pairs(held_out))
        targets = _targets([q.answers for q in usable], encoded)
        plausible = _targets([q.plausible for q in usable], encoded)
        found = {owner for owner, target in zip(encoded.owner, targets, strict=True) if target != (0, 0)}
        lost = sum(bool(q.answers) and index not in found for index, q in enumerate(usable))
        report.note("questions whose answer is whole in no window, learnt as without one", lost)
        if config.answer.plausible:
            report.note(
                "questions without an answer, learnt with the plausible one that the data gives",
                len({owner for owner, target in zip(encoded.owner, plausible, strict=True) if target != (0, 0)}),
            )
        report.note("questions that are too long, cut", len(encoded.cut) + len(held.cut), action="cut")
        report.note("questions with a context that is read in several windows", encoded.long + held.long)
        for line in report.lines():
            start.note(f"data: {line}")
        heads.fresh(start.model, heads.SpanHead.kind, 2, seed=config.seed)
        return Answering(
            answers=answers,
            config=config,
            version=version,
            windows=encoded.windows,
            targets=targets,
            plausible=plausible,
            held_out=held_out,
            held=held,
            held_targets=_targets([q.answers for q in held_out], held),
            data_report=_data_report(start, report, version, how, (usable, encoded), (held_out, held)),
        )

    def predictor(
        self, model: Transformer, codec: Codec, about: Mapping[str, Any], runtime: Runtime
    ) -> AnswerPredictor:
        """Of a directory with a span head, ours or another's; another's always answers."""
        head = heads.of(model)
        if head is None or head.kind != heads.SpanHead.kind:
            raise UserError("this model has no head that finds answers", hint="finetune it with --task answer")
        said, usual = settings_of(about), AnswerOptions()
        length = min(int(said.get("context") or CONTEXT), model.config.context)
        layout = Layout.of(
            codec,
            length=length,
            overlap=_overlap(said.get("overlap"), length),
            question=min(int(said.get("question", usual.question)), length // 3),
        )
        answers = Answers(
            model=model, codec=codec, runtime=runtime, layout=layout, longest=int(said.get("longest", usual.longest))
        )
        threshold = said.get("threshold")
        return AnswerPredictor(answers, math.inf if threshold is None else float(threshold))


def _overlap(asked: int | None, length: int) -> int:
    """What windows share. More than a third of a short row would make a window of every few pieces."""
    return min(128, length // 3) if asked is None else int(asked)


def _halves(start: Start, report: Report) -> tuple[list[Question], list[Question], Literal[1, 2], Mapping[str, Any]]:
    """The training and the held-out part, the version, and how the part was chosen."""
    config: AnswerConfig = start.config
    report.part = "both" if config.data.val is None else "train"
    whole, version = read(start.data, config, report)
    if config.data.val is not None:
        report.part = "val"
        held_out, other = read([config.data.val], config, report)
        return whole, held_out, max(version, other), GIVEN
    groups = [question.group for question in whole]
    what = "articles"
    if len(set(groups)) < 2:
        groups, what = [question.context for question in whole], "contexts"
    made = split(len(whole), config.data.val_fraction, config.seed, groups=groups, things="questions", report=report)
    train, held = made.of(whole)
    start.note(f"held out: {len(held):,} of {len(whole):,} questions, by whole {what}, drawn at random")
    return train, held, version, made.how


def _targets(answers: Sequence[Sequence[rows.Answer]], encoded: Encoded) -> list[tuple[int, int]]:
    """Positions of the first answer of each question in its windows; (0, 0) where a window does not hold it."""
    spans = []
    for listed, context in zip(answers, encoded.contexts, strict=True):
        known = next((answer for answer in listed if answer.start is not None), None)
        span = None
        if known is not None and known.start is not None:
            span = pieces_of(context, known.start, known.start + len(known.text))
        spans.append(span)
    return [window.target(spans[owner]) for window, owner in zip(encoded.windows, encoded.owner, strict=True)]


def _data_report(
    start: Start,
    report: Report,
    version: int,
    how: Mapping[str, Any],
    train: tuple[Sequence[Question], Encoded],
    held_out: tuple[Sequence[Question], Encoded],
) -> dict[str, Any]:
    """data.json."""
    known = {question.context for question in train[0]}
    shared = len({question.context for question in held_out[0]} & known)
    parts = [(part[0], _tokens(*part)) for part in (train, held_out)]
    return report.data_report(
        "answer",
        "questions",
        ((question.where, n) for questions, tokens in parts for question, n in zip(questions, tokens, strict=True)),
        split=how,
        train=_summary(*parts[0]),
        val=_summary(*parts[1]),
        twice=duplicates(pairs(train[0]), pairs(held_out[0])),
        tokenizer_hash=start.codec.hash,
        details={"version": version, "contexts_across_splits": shared},
    )


def _tokens(questions: Sequence[Question], encoded: Encoded) -> list[int]:
    """Of each question, over all windows of its context."""
    tokens = [0] * len(questions)
    for owner, window in zip(encoded.owner, encoded.windows, strict=True):
        tokens[owner] += len(window.ids)
    return tokens


def _summary(questions: Sequence[Question], tokens: Sequence[int]) -> Part:
    return Part(
        documents=len(questions),
        tokens=sum(tokens),
        details={
            "without_answer": sum(not question.answers for question in questions),
            "contexts": len({question.context for question in questions}),
            "longest_context": max((len(question.context) for question in questions), default=0),
        },
    )


APPLICATION = Answer()
