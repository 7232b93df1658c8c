"""A model that finds answers in texts: the best span over all windows, and its lead over "no answer"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.errors import UserError
from tfcli.infer.batches import by_length
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.answer import data as rows
from tfcli.tasks.answer.data import Question
from tfcli.tasks.answer.options import AnswerConfig
from tfcli.tasks.answer.scores import Outcome, as_numbers, table
from tfcli.tasks.answer.windows import Layout, Window, text_of
from tfcli.tasks.common import batch
from tfcli.tasks.common.batch import Batch, head_logits
from tfcli.tasks.common.report import Report
from tfcli.tasks.task import Evaluation, Predictor
from tfcli.text.read import tables
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.offsets import Located, locate

NOTHING = 1e6
"""The no-answer score of a context without tokens."""
PADDED = ("tokens_BT", "mask_BT", "types_BT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Questions as windows: ``windows[i]`` belongs to question ``owner[i]``."""

    windows: list[Window]
    owner: list[int]
    contexts: list[Located]
    """The tokens of each question's context."""
    cut: list[int]
    """Indices of questions that were truncated to what the layout allows."""
    long: int
    """Number of questions with more than one window."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window."""
        return [len(window.ids) for window in self.windows]


def encode(codec: Codec, layout: Layout, questions: Sequence[Question]) -> Encoded:
    """Return the windows of questions; a context that several share is encoded once."""
    texts = list(dict.fromkeys(question.context for question in questions))
    known = dict(zip(texts, locate(codec, texts), strict=True))
    contexts = [known[question.context] for question in questions]
    asked = codec.encode_batch([question.question for question in questions])
    windows = [layout.windows(tuple(ids), context) for ids, context in zip(asked, contexts, strict=True)]
    return Encoded(
        windows=[window for each in windows for window in each],
        owner=[index for index, each in enumerate(windows) for _ in each],
        contexts=contexts,
        cut=[index for index, ids in enumerate(asked) if len(ids) > layout.question],
        long=sum(len(each) > 1 for each in windows),
    )


def tensors(windows: Sequence[Window]) -> dict[str, Tensor]:
    """Return the tensors named in ``PADDED``."""
    ids = [window.ids for window in windows]
    types = [window.types for window in windows]
    return {"tokens_BT": batch.pad(ids), "mask_BT": batch.mask(ids), "types_BT": batch.pad(types)}


def logits(model: Transformer, part: Batch, *, dtype: torch.dtype | None = None, dropout: float = 0.0) -> Tensor:
    """Return the logits (B, T, 2) of an answer's first and last position, in fp32; -inf at padding."""
    logits_BT2 = head_logits(model, part, dtype=dtype, dropout=dropout)
    return logits_BT2.masked_fill(~part["mask_BT"][..., None], -math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The best answer to one question: characters ``start`` to ``end`` of its context.

    ``no_answer_score`` is the lead of "no answer" over it, in logits. The probabilities are a softmax over the spans of
    all windows and "no answer".
    """

    start: int
    end: int
    no_answer_score: float
    probability: float
    no_answer_probability: float


@torch.inference_mode()
def best_answers(model: Transformer, encoded: Encoded, runtime: Runtime, *, longest: int) -> list[Reading]:
    """Return the best span of at most ``longest`` tokens for each question.

    The score of a span is start logit + end logit; that of no answer is the same at position 0, in the window where it
    is lowest (Devlin et al. 2019, 4.3, and its published code).
    """
    windows = encoded.windows
    rows = np.empty((len(windows), 5))
    for chosen in by_length(encoded.lengths, device=runtime.device):
        some = [windows[index] for index in chosen]
        part = Batch(tensors(some), padded=PADDED).to(runtime.device)
        rows[chosen] = _spans(logits(model, part, dtype=runtime.dtype), some, longest)
    ends = np.searchsorted(encoded.owner, np.arange(len(encoded.contexts) + 1))
    return [
        _best(rows[start:end], windows[start:end], context)
        for start, end, context in zip(ends, ends[1:], encoded.contexts, strict=False)
    ]


def _spans(logits_BT2: Tensor, windows: Sequence[Window], longest: int) -> npt.NDArray[np.float64]:
    """Return (B, 5): the best span's score, first and last position, the score of no answer, the log-sum over spans."""
    first_BT, last_BT = logits_BT2.double().unbind(dim=-1)
    T = first_BT.shape[1]
    at = torch.tensor([[window.at, window.at + window.count] for window in windows], device=first_BT.device)
    positions = torch.arange(T, device=first_BT.device)
    context_BT = (positions >= at[:, :1]) & (positions < at[:, 1:])
    null_B = first_BT[:, 0] + last_BT[:, 0]
    first_BT = first_BT.masked_fill(~context_BT, -math.inf)
    last_BT = last_BT.masked_fill(~context_BT, -math.inf)
    # scores[b, d, t]: from t to t + d
    further = [torch.nn.functional.pad(last_BT[:, d:], (0, d), value=-math.inf) for d in range(min(longest, T))]
    scores_BET = first_BT[:, None] + torch.stack(further, dim=1)
    flat = scores_BET.flatten(1)
    best_B, where_B = flat.max(dim=1)
    start_B = where_B % T
    columns = (best_B, start_B, start_B + where_B // T, null_B, flat.logsumexp(dim=1))
    return torch.stack([column.double() for column in columns], dim=1).cpu().numpy()


def _best(rows: npt.NDArray[np.float64], windows: Sequence[Window], context: Located) -> Reading:
    """Return the best answer over the windows of one question."""
    which = int(rows[:, 0].argmax())
    score, first, last = rows[which, :3]
    null = float(rows[:, 3].min())
    if not math.isfinite(score):  # the context has no tokens
        return Reading(start=0, end=0, no_answer_score=NOTHING, probability=0.0, no_answer_probability=1.0)
    total = np.logaddexp.reduce([*rows[:, 4], null])
    window = windows[which]
    shift = window.first - window.at
    start, end = text_of(context, int(first) + shift, int(last) + shift)
    return Reading(
        start=start,
        end=end,
        no_answer_score=null - float(score),
        probability=float(np.exp(score - total)),
        no_answer_probability=float(np.exp(null - total)),
    )


@dataclass(frozen=True, kw_only=True)
class AnswerPredictor(Predictor):
    """A finetuned model that answers: the ``Predictor`` of ``answer``."""

    model: Transformer
    codec: Codec
    runtime: Runtime
    layout: Layout
    longest: int
    """Maximum tokens of an answer."""
    threshold: float = math.inf
    """The no-answer score above which the model abstains."""
    key: str = "question"

    def encode(self, questions: Sequence[Question]) -> Encoded:
        """Return the windows of questions."""
        return encode(self.codec, self.layout, questions)

    def read(self, encoded: Encoded) -> list[Reading]:
        """Return the best answer to each question."""
        return best_answers(self.model, encoded, self.runtime, longest=self.longest)

    def plain(self, line: str) -> Question:
        """Parse a question and a context with a tab between them."""
        question, tab, context = line.partition("\t")
        if not tab:
            raise UserError("has no context: expected a question, a tab and a text")
        return asked(question, context)

    def parse(self, row: dict[str, Any]) -> Question:
        """Parse {"question": "...", "context": "..."}, perhaps with an "id"."""
        if not isinstance(row.get("question"), str) or not isinstance(row.get("context"), str):
            raise UserError('has no "question" and "context" with strings')
        return asked(row["question"], row["context"], str(row.get("id", "")))

    def predict(self, inputs: Sequence[Question]) -> list[dict[str, Any]]:
        """Return {"question", "answer", "start", "end", "score", "no_answer"}, offsets in characters of the context.

        ``score`` is the probability of the answer, ``no_answer`` that of none. Where the model abstains, "answer" is ""
        without offsets. An input's "id" is kept. "cut" is set where a question was truncated; contexts of any length
        are read whole.
        """
        encoded = self.encode(inputs)
        answers = [self._answer(*each) for each in zip(inputs, self.read(encoded), strict=True)]
        for index in encoded.cut:
            answers[index]["cut"] = True
        return answers

    def _answer(self, question: Question, best: Reading) -> dict[str, Any]:
        abstains = best.no_answer_score > self.threshold or best.start == best.end
        return {
            **({"id": question.id} if question.id else {}),
            "question": question.question,
            "answer": "" if abstains else question.context[best.start : best.end],
            "start": None if abstains else best.start,
            "end": None if abstains else best.end,
            "score": round(best.no_answer_probability if abstains else best.probability, 6),
            "no_answer": round(best.no_answer_probability, 6),
        }

    def show(self, answer: Mapping[str, Any]) -> str:
        """Return the answer ("-" for none), its probability and the question, with tabs between."""
        text = " ".join(str(answer["answer"]).split()) or "-"
        return f"{text}\t{answer['score']:.4f}\t{' '.join(str(answer['question']).split())}"

    def evaluate(self, data: Sequence[str], config: AnswerConfig, *, limit: int | None) -> Evaluation:
        """Return exact match and F1 of the official scripts, with 95 % bootstrap intervals over questions."""
        report = Report.of(config.data)
        questions, version = read(data, config, report)
        questions = questions[:limit]
        encoded = self.encode(questions)
        readings = self.read(encoded)
        report.note("questions that are too long, cut", len(encoded.cut), action="cut")
        threshold = self.threshold if config.answer.threshold is None else config.answer.threshold
        numbers = as_numbers(outcomes(questions, readings), threshold=threshold, version=version)
        numbers["data"] = report.as_json()
        answering = replace(self, threshold=threshold if version == 2 else math.inf)
        predictions = [
            {**answering._answer(question, best), "expected": list(question.golds)}
            for question, best in zip(questions, readings, strict=True)
        ]
        return Evaluation(scores=numbers, lines=table(numbers), predictions=predictions, notes=tuple(report.lines()))


def read(specs: Sequence[str], config: AnswerConfig, report: Report) -> tuple[list[Question], Literal[1, 2]]:
    """Return the questions of all files, and the version of SQuAD: 2 where some may have no answer."""
    parts = [rows.read(path, report, config.data) for path in tables.expand(specs)]
    questions = [question for part in parts for question in part.questions]
    seen: set[str] = set()
    for question in questions if len(parts) > 1 else []:
        if question.id in seen:
            report.fault("questions with an id that another file has too", question.where, None)
        seen.add(question.id)
    return questions, 2 if any(part.version == 2 for part in parts) else 1


def outcomes(questions: Sequence[Question], readings: Sequence[Reading]) -> list[Outcome]:
    """Return answers beside the right ones."""
    return [
        Outcome(answer=q.context[r.start : r.end], no_answer_score=r.no_answer_score, golds=q.golds)
        for q, r in zip(questions, readings, strict=True)
    ]


def asked(question: str, context: str, id: str = "") -> Question:
    """Return a question whose answer is not known."""
    return Question(id=id, question=question, context=context, answers=(), group="")
