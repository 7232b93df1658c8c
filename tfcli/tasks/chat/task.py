"""Dialogue and instructions: supervised finetuning on the answers of conversations (Ouyang et al. 2022, 3.5)."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tfcli.config.options import Sampling
from tfcli.errors import UserError
from tfcli.infer.batches import by_length
from tfcli.infer.decode import decode
from tfcli.infer.engine import Engine
from tfcli.infer.residency import pack_weights
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.chat import data as rows
from tfcli.tasks.chat import encode
from tfcli.tasks.chat.data import Conversation
from tfcli.tasks.chat.encode import Encoded
from tfcli.tasks.chat.options import ChatConfig, ChatOptions
from tfcli.tasks.common import batch, resample
from tfcli.tasks.common.batch import Batch
from tfcli.tasks.common.report import Examples, Report, duplicates
from tfcli.tasks.common.split import Halves, halves
from tfcli.tasks.lm.task import check_decoder
from tfcli.tasks.task import Application, Evaluation, Finetuning, Headline, OverExamples, Predictor, Start
from tfcli.text.chat.messages import ChatTemplate, prompt_ids, read_messages, with_template
from tfcli.text.read import tables
from tfcli.text.tokenizers.codec import Codec

NONE = -1
"""Target of positions that predict nothing."""
ROW = 512
"""Default tokens of a packed row."""
LOGITS_AT_ONCE = 512
"""Positions whose logits are in memory at once."""
SPECIMEN = 64
"""Maximum new tokens of a sample."""


def loss(
    model: Transformer, part: Batch, *, dtype: torch.dtype | None = None, dropout: float = 0.0
) -> tuple[Tensor, int]:
    """Return the summed cross-entropy (nats, fp32) of the answers' ids, ends of turns included, and their number."""
    segments_BT = part["segments_BT"] if int(part["segments_BT"].max()) > 0 else None
    hidden_BTD = model(part["tokens_BT"], dtype=dtype, dropout=dropout, segments_BT=segments_BT)
    at_BT = part["targets_BT"] != NONE
    return model.loss(hidden_BTD[at_BT][None], part["targets_BT"][at_BT][None]), count(part)


def count(part: Batch) -> int:
    """Return the number of ids that a batch predicts."""
    return int((part["targets_BT"] != NONE).sum())


def examples(listed: Sequence[Sequence[Encoded]]) -> Batch:
    """Return rows of conversations as a batch."""
    laid = [encode.lay(conversations) for conversations in listed]
    tokens = [row["tokens"].tolist() for row in laid]
    tensors = {
        "tokens_BT": batch.pad(tokens),
        "mask_BT": batch.mask(tokens),
        "targets_BT": batch.pad([row["targets"].tolist() for row in laid], value=NONE),
        "segments_BT": batch.pad([row["segments"].tolist() for row in laid], value=-1),
    }
    return Batch(tensors, padded=tuple(tensors))


@torch.inference_mode()
def score(model: Transformer, listed: Sequence[Encoded], runtime: Runtime) -> npt.NDArray[np.float64]:
    """Return (N, 3): of each conversation the summed loss of its answers' ids, their number, and the argmax hits."""
    out = np.zeros((len(listed), 3))
    for chosen in by_length([len(one.ids) for one in listed], device=runtime.device):
        part = examples([[listed[index]] for index in chosen]).to(runtime.device)
        hidden_BTD = model(part["tokens_BT"], dtype=runtime.dtype)
        row_N, at_N = (part["targets_BT"] != NONE).nonzero(as_tuple=True)
        for rows_n, places_n in zip(row_N.split(LOGITS_AT_ONCE), at_N.split(LOGITS_AT_ONCE), strict=True):
            logits_nV = model.logits(hidden_BTD[rows_n, places_n]).float()
            targets_n = part["targets_BT"][rows_n, places_n]
            lost_n = F.cross_entropy(logits_nV, targets_n, reduction="none").cpu().double().numpy()
            right_n = (logits_nV.argmax(dim=-1) == targets_n).cpu().numpy()
            places = np.array(chosen)[rows_n.cpu().numpy()]
            for column, values in enumerate((lost_n, np.ones(len(places)), right_n)):
                np.add.at(out[:, column], places, values)
    return out


def as_numbers(columns: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return loss (nats per id), perplexity and accuracy of the answers, with 95 % intervals over conversations."""
    lost, ids, right = columns.sum(axis=0).tolist()

    def mean(column: int) -> list[float]:
        return resample.interval(columns, lambda sums: sums[:, column] / sums[:, 1])

    return {
        "loss": lost / ids,
        "perplexity": math.exp(min(700.0, lost / ids)),
        "accuracy": right / ids,
        "answer_tokens": int(ids),
        "examples": len(columns),
        "interval": {"loss": mean(0), "accuracy": mean(2)},
    }


def table(scores: Mapping[str, Any]) -> list[str]:
    """Return the scores for people."""
    low, high = scores["interval"]["loss"]
    return [
        f"loss of the answers {scores['loss']:.4f} ({low:.4f} to {high:.4f}) nats per token, perplexity "
        f"{scores['perplexity']:.3f}, {scores['accuracy']:.1%} of tokens predicted "
        f"({scores['examples']:,} conversations, {scores['answer_tokens']:,} tokens)"
    ]


@dataclass(frozen=True, kw_only=True)
class Chatting(OverExamples):
    """Conversations to train on and to be scored on: the ``Finetuning`` of ``chat``."""

    train: Sequence[Sequence[Encoded]]
    """Rows of one or more conversations."""
    val: Sequence[Encoded]
    held: Sequence[Conversation]
    """The messages of ``val``."""
    codec: Codec
    """The tokenizer, with the template of the conversations: what is saved beside the model."""
    runtime: Runtime
    data_report: dict[str, Any]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.array([sum(len(one.ids) - 1 for one in row) for row in self.train], np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Number of tokens of the held-out conversations."""
        return sum(len(one.ids) for one in self.val)

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """Return the rows at ``indices``, the same in every epoch."""
        return examples([self.train[index] for index in indices])

    def count(self, rows: Batch) -> int:
        """Return the number of answers' ids."""
        return count(rows)

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Return the summed cross-entropy of the answers' ids, and their number."""
        return loss(model, rows, dtype=dtype, dropout=dropout)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Return loss and accuracy of the held-out answers."""
        lost, ids, right = score(model, self.val, self.runtime).sum(axis=0).tolist()
        return {"val_loss": lost / ids, "val_accuracy": right / ids}

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Return the loss."""
        return Headline(name="loss", value=scores["val_loss"])

    def sample(self, model: Transformer, seed: int) -> str | None:
        """Return the greedy answer to the first held-out prompt; None where it leaves no room."""
        first = self.held[0]
        asked = first.messages[: first.answers[0]]
        assert self.codec.chat_template is not None
        ids = prompt_ids(self.codec, ChatTemplate(self.codec.chat_template), asked)
        if len(ids) >= model.config.context:
            return None
        sampling = Sampling(max_tokens=min(SPECIMEN, model.config.context - len(ids)), temperature=0.0)
        steps = decode(
            model, [ids], sampling, seeds=[seed], eos_id=self.codec.eos_id,
            ended=lambda row, id: id in self.codec.eos_ids,
        )  # fmt: skip
        answer = self.codec.decode([step.id for row in steps for step in row if step.id is not None])
        return f"{asked[-1]['content']}\n> {answer}"

    def saved_codec(self, codec: Codec) -> Codec:
        """Return the tokenizer with the template of the conversations."""
        return self.codec

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Return the scores of the held-out answers."""
        scores = as_numbers(score(model, self.val, self.runtime))
        return scores, table(scores)


@dataclass(frozen=True, kw_only=True)
class Answerer(Predictor):
    """A model that answers messages: the ``Predictor`` of ``chat``."""

    model: Transformer
    codec: Codec
    runtime: Runtime
    key: str = "prompt"
    _packing: threading.Lock = field(default_factory=threading.Lock)
    """Held while the weights are packed, and while they are read before that."""

    def plain(self, line: str) -> list[dict[str, Any]]:
        """Parse a line as the message of a user."""
        return [{"role": "user", "content": line}]

    def parse(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Parse {"messages": [...]} or {"prompt": "..."}."""
        if "messages" in row:
            return read_messages(row)
        if not isinstance(row.get("prompt"), str):
            raise UserError('has neither "messages" with a list nor "prompt" with a string')
        return self.plain(row["prompt"])

    def predict(self, inputs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Return {"response": "..."} of each, greedily; ``tfcli generate --chat`` samples."""
        sampling = Sampling(temperature=0.0)
        with self._packing, self.runtime.active():
            pack_weights(self.model)  # does nothing the second time
        return [{"response": str(answer)} for answer in self._engine.generate_batch(inputs, sampling)]

    @cached_property
    def _engine(self) -> Engine:
        """The engine that answers."""
        return Engine(self.model, self.codec, self.runtime)

    def show(self, answer: Mapping[str, Any]) -> str:
        """Return the answer on one line."""
        return " ".join(str(answer["response"]).split())

    def evaluate(self, data: Sequence[str], config: Any, *, limit: int | None) -> Evaluation:
        """Return loss, perplexity and accuracy of the answers' ids, each given all before it."""
        report = Report.of(config.data)
        conversations = _read(data, config, report)[:limit]
        context = self.model.config.context
        kept, encoded = _encoded(conversations, self.codec, min(config.data.context or context, context), report)
        with self._packing:
            columns = score(self.model, encoded, self.runtime)
        scores = as_numbers(columns) | {"data": report.as_json()}
        predictions = [
            {"messages": list(one.messages), "loss": lost / ids, "answer_tokens": int(ids)}
            for one, (lost, ids, _) in zip(kept, columns.tolist(), strict=True)
        ]
        return Evaluation(scores=scores, lines=table(scores), predictions=predictions, notes=tuple(report.lines()))


class Chat(Application):
    """``--task chat``."""

    name = "chat"
    config = ChatConfig

    def prepare(self, start: Start) -> Finetuning:
        """Read the conversations, render them by the model's chat template, and pack them."""
        config: ChatConfig = start.config
        check_decoder(start.model, self.name)
        context = start.model.config.context
        context = min(config.data.context or context, context)
        codec = with_template(start.codec, encode.template_for(start.codec))
        if start.codec.chat_template is None:
            start.note("the tokenizer has no chat template; using ChatML")
        report = Report.of(config.data)
        data = _halves(start, report)
        train, encoded = _encoded(data.train, codec, context, report)
        held, held_encoded = _encoded(data.held_out, codec, context, report)
        packed = _rows(encoded, config.chat, context)
        parts = _summary(train, encoded, rows=len(packed)), _summary(held, held_encoded, rows=len(held))
        repeated = duplicates(*(part.keys for part in parts))["across_splits"]
        report.note("held-out prompts that are in the training part too", repeated)
        data_report = report.data_report(
            self.name, "conversations", *parts,
            split=data.how, tokenizer_hash=codec.hash, details={"context": context},
        )  # fmt: skip
        for line in report.lines():
            start.note(line)
        start.note(f"data: {len(encoded):,} conversations in {len(packed):,} rows, {len(held):,} held out")
        return Chatting(
            train=packed, val=held_encoded, held=held, codec=codec, runtime=start.runtime, data_report=data_report
        )

    def predictor(self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any], runtime: Runtime) -> Answerer:
        """Return the predictor of a model with a chat template."""
        return Answerer(model=model, codec=codec, runtime=runtime)

    def next_step(self, directory: Path) -> str:
        """Return the command that answers a prompt."""
        return f"tfcli generate --chat --model {directory}"


def _halves(start: Start, report: Report) -> Halves[Conversation, None]:
    """Return the training and the held-out part; conversations with the same prompt stay on one side."""
    return halves(
        start.data, start.config, report, lambda specs: (_read(specs, start.config, report), None),
        things="conversations", groups=lambda whole: [_asked(one) for one in whole],
    )  # fmt: skip


def _read(specs: Sequence[str], config: ChatConfig, report: Report) -> list[Conversation]:
    return [one for path in tables.expand(specs) for one in rows.read(path, report, config.data)]


def _encoded(
    conversations: Sequence[Conversation], codec: Codec, context: int, report: Report
) -> tuple[list[Conversation], list[Encoded]]:
    """Return the conversations that can be trained on, and their ids. Raises UserError where there are none."""
    assert codec.chat_template is not None
    template = ChatTemplate(codec.chat_template)
    kept: list[Conversation] = []
    encoded: list[Encoded] = []
    for conversation in conversations:
        whole = encode.encode(codec, template, conversation, report)
        fitted = None if whole is None else encode.fit(whole, context, report, conversation.where)
        if fitted is not None:
            kept.append(conversation)
            encoded.append(fitted)
    if not encoded:
        raise UserError(
            f"no conversation can be used: {'; '.join(report.lines())}", hint="or is the context too short?"
        )
    return kept, encoded


def _rows(encoded: Sequence[Encoded], options: ChatOptions, context: int) -> list[list[Encoded]]:
    if not options.pack:
        return [[one] for one in encoded]
    room = min(context, options.row or ROW)
    packed = encode.pack([len(one.ids) - 1 for one in encoded], room)
    return [[encoded[index] for index in row] for row in packed]


def _asked(conversation: Conversation) -> str:
    """Return the messages before the first answer: conversations with the same stay on one side of a split."""
    return "\n".join(message["content"] for message in conversation.messages[: conversation.answers[0]])


def _summary(conversations: Sequence[Conversation], encoded: Sequence[Encoded], *, rows: int) -> Examples:
    lengths = [len(one.ids) for one in encoded]
    return Examples(
        documents=len(encoded),
        read=[(one.where, length) for one, length in zip(conversations, lengths, strict=True)],
        keys=[_asked(one) for one in conversations],
        details={
            "rows": rows,
            "answer_tokens": int(sum(one.answer.sum() for one in encoded)),
            "longest": max(lengths),
            "median": float(np.median(lengths)),
        },
    )


APPLICATION = Chat()
