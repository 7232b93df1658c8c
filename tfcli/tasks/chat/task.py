"""Dialogue and instructions: answer as the assistants of conversations did (Ouyang et al. 2022, 3.5, step 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from tfcli.tasks.chat.data import Conversation, Fields
from tfcli.tasks.chat.encode import Encoded
from tfcli.tasks.chat.options import ChatConfig, ChatOptions
from tfcli.tasks.common import batch, resample
from tfcli.tasks.common.batch import Batch, Rows
from tfcli.tasks.common.report import Report, duplicates
from tfcli.tasks.common.split import GIVEN, split
from tfcli.tasks.lm.task import refuse
from tfcli.tasks.task import Application, Evaluation, Finetuning, Headline, Predictor, Start
from tfcli.text.chat.messages import ChatTemplate, prompt_ids, read_messages, with_template
from tfcli.text.data_report import Part
from tfcli.text.read import tables
from tfcli.text.tokenizers.codec import Codec

NONE = -1
"""The target of positions that foretell nothing."""
ROW = 512
"""Tokens of a packed row, where the settings do not say."""
LOGITS_AT_ONCE = 512
"""Positions whose logits are held at once."""
SPECIMEN = 64
"""New tokens of a sample."""
PADDED = ("tokens_BT", "mask_BT", "targets_BT", "segments_BT")


def loss(
    model: Transformer, part: Batch, *, dtype: torch.dtype | None = None, dropout: float = 0.0
) -> tuple[Tensor, int]:
    """Summed cross-entropy (nats, fp32) of the answers' ids, ends of turns included, and how many they are."""
    segments_BT = part["segments_BT"] if int(part["segments_BT"].max()) > 0 else None
    hidden_BTD = model(part["tokens_BT"], dtype=dtype, dropout=dropout, segments_BT=segments_BT)
    at_BT = part["targets_BT"] != NONE
    return model.loss(hidden_BTD[at_BT][None], part["targets_BT"][at_BT][None]), count(part)


def count(part: Batch) -> int:
    """Ids that a batch foretells."""
    return int((part["targets_BT"] != NONE).sum())


def examples(listed: Sequence[Sequence[Encoded]]) -> Batch:
    """Rows of conversations as a batch."""
    laid = [encode.lay(conversations) for conversations in listed]
    tokens = [row["tokens"].tolist() for row in laid]
    return Batch(
        {
            "tokens_BT": batch.pad(tokens),
            "mask_BT": batch.mask(tokens),
            "targets_BT": batch.pad([row["targets"].tolist() for row in laid], value=NONE),
            "segments_BT": batch.pad([row["segments"].tolist() for row in laid], value=-1),
        },
        padded=PADDED,
    )


@torch.inference_mode()
def score(model: Transformer, listed: Sequence[Encoded], runtime: Runtime) -> npt.NDArray[np.float64]:
    """Of each conversation (N, 3): the summed loss of its answers' ids, how many, and how many are the likeliest."""
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
    """loss (nats an id of the answers), perplexity and accuracy of ``score``, with 95 % intervals of conversations."""
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
    """Scores for people."""
    low, high = scores["interval"]["loss"]
    return [
        f"loss of the answers {scores['loss']:.4f} ({low:.4f} to {high:.4f}) nats a token, perplexity "
        f"{scores['perplexity']:.3f}, {scores['accuracy']:.1%} of tokens foretold "
        f"({scores['examples']:,} conversations, {scores['answer_tokens']:,} tokens)"
    ]


@dataclass(frozen=True, kw_only=True)
class Chatting(Finetuning):
    """Finetuning on conversations."""

    train: Sequence[Sequence[Encoded]]
    """Rows of one conversation or several."""
    val: Sequence[Encoded]
    held: Sequence[Conversation]
    """What ``val`` was made of."""
    codec: Codec
    """With the template that the conversations were written by: what is saved beside the model."""
    runtime: Runtime
    data_report: dict[str, Any]

    @property
    def size(self) -> int:
        """Rows."""
        return len(self.train)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.array([sum(len(one.ids) - 1 for one in row) for row in self.train], np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Those of the held-out conversations."""
        return sum(len(one.ids) for one in self.val)

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """The rows at ``indices``; they are the same in every epoch."""
        return examples([self.train[index] for index in indices])

    def count(self, rows: Rows) -> int:
        """Ids of answers."""
        assert isinstance(rows, Batch)
        return count(rows)

    def tokens(self, rows: Rows) -> int:
        """All that is read."""
        assert isinstance(rows, Batch)
        return rows.real_tokens

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """As the module's ``loss``."""
        return loss(model, rows, dtype=dtype, dropout=dropout)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Loss and accuracy of the held-out answers."""
        lost, ids, right = score(model, self.val, self.runtime).sum(axis=0).tolist()
        return {"val_loss": lost / ids, "val_accuracy": right / ids}

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """The loss."""
        return Headline(name="loss", value=scores["val_loss"])

    def sample(self, model: Transformer, seed: int) -> str | None:
        """The answer to the first held-out prompt, greedily; None where it leaves no room."""
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
        said = self.codec.decode([step.id for row in steps for step in row if step.id is not None])
        return f"{asked[-1]['content']}\n> {said}"

    def saved_codec(self, codec: Codec) -> Codec:
        """The tokenizer with the template that the conversations were written by."""
        return self.codec

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Scores of the held-out answers."""
        scores = as_numbers(score(model, self.val, self.runtime))
        return scores, table(scores)


@dataclass(frozen=True, kw_only=True)
class Answerer(Predictor):
    """A model that answers messages."""

    model: Transformer
    codec: Codec
    runtime: Runtime
    key: str = "prompt"

    def plain(self, line: str) -> list[dict[str, Any]]:
        """A line is what a user says."""
        return [{"role": "user", "content": line}]

    def parse(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """{"messages": [...]} or {"prompt": "..."}."""
        if "messages" in row:
            return read_messages(row)
        if not isinstance(row.get("prompt"), str):
            raise UserError('has neither "messages" with a list nor "prompt" with a string')
        return self.plain(row["prompt"])

    def predict(self, inputs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """{"response": "..."} of each, greedily; ``tfcli generate --chat`` samples."""
        sampling = Sampling(temperature=0.0)
        return [{"response": str(made)} for made in self._engine.generate_batch(inputs, sampling)]

    @cached_property
    def _engine(self) -> Engine:
        """What answers, with packed weights from the first answer on."""
        engine = Engine(self.model, self.codec, self.runtime)
        with self.runtime.active():
            pack_weights(self.model)
        return engine

    def show(self, answer: Mapping[str, Any]) -> str:
        """The answer in one line."""
        return " ".join(str(answer["response"]).split())

    def evaluate(self, data: Sequence[str], config: Any, *, limit: int | None) -> Evaluation:
        """Loss, perplexity and accuracy of the answers' ids, given all before them."""
        report = Report(strict=config.data.strict)
        read = _read(data, config, report)[:limit]
        context = self.model.config.context
        kept, encoded = _encoded(read, self.codec, min(config.data.context or context, context), report)
        columns = score(self.model, encoded, self.runtime)
        scores = as_numbers(columns) | {"data": report.as_json()}
        predictions = [
            {"messages": list(one.messages), "loss": lost / ids, "answer_tokens": int(ids)}
            for one, (lost, ids, _) in zip(kept, columns.tolist(), strict=True)
        ]
        return Evaluation(scores=scores, lines=table(scores), predictions=predictions, notes=tuple(report.lines()))


class Chat(Application):
    """--task chat."""

    name = "chat"
    config = ChatConfig

    def prepare(self, start: Start) -> Finetuning:
        """Read the conversations, write them by the model's template, and pack them."""
        config: ChatConfig = start.config
        refuse(start.model, "chat")
        context = start.model.config.context
        context = min(config.data.context or context, context)
        codec = with_template(start.codec, encode.template_for(start.codec))
        if start.codec.chat_template is None:
            start.note("the tokenizer has no chat template: it gets ChatML's")
        report = Report(strict=config.data.strict)
        train, val, how = _halves(start, report)
        learnt, encoded = _encoded(train, codec, context, report)
        held, tested = _encoded(val, codec, context, report)
        packed = _rows(encoded, config.chat, context)
        asked = [[_asked(one) for one in part] for part in (learnt, held)]
        twice = duplicates(*asked)
        report.note("held-out prompts that are in the training part too", twice["across_splits"])
        data_report = report.data_report(
            self.name,
            "conversations",
            ((one.where, len(ids.ids)) for one, ids in zip([*learnt, *held], [*encoded, *tested], strict=True)),
            split=how,
            train=_sizes(encoded, rows=len(packed)),
            val=_sizes(tested),
            twice=twice,
            tokenizer_hash=codec.hash,
            details={"context": context},
        )
        for line in report.lines():
            start.note(line)
        start.note(f"data: {len(encoded):,} conversations in {len(packed):,} rows, {len(tested):,} held out")
        return Chatting(
            train=packed, val=tested, held=held, codec=codec, runtime=start.runtime, data_report=data_report
        )

    def predictor(self, model: Transformer, codec: Codec, about: Mapping[str, Any], runtime: Runtime) -> Predictor:
        """Of a model with a chat template."""
        return Answerer(model=model, codec=codec, runtime=runtime)

    def next_step(self, directory: Path) -> str:
        """An answer to a prompt."""
        return f"tfcli generate --chat --model {directory}"


def _halves(start: Start, report: Report) -> tuple[list[Conversation], list[Conversation], Mapping[str, Any]]:
    """The training and the held-out part, and how it was chosen: the same prompt stays on one side."""
    config: ChatConfig = start.config
    report.part = "both" if config.data.val is None else "train"
    whole = _read(start.data, config, report)
    if config.data.val is not None:
        report.part = "val"
        return whole, _read([config.data.val], config, report), GIVEN
    groups = [_asked(one) for one in whole]
    made = split(
        len(whole), config.data.val_fraction, config.seed, groups=groups, things="conversations", report=report
    )
    return *made.of(whole), made.how


def _read(specs: Sequence[str], config: ChatConfig, report: Report) -> list[Conversation]:
    data = config.data
    fields = Fields(prompt=data.prompt_key, response=data.response_key, messages=data.messages_key)
    found: list[Conversation] = []
    for path in tables.expand(specs):
        found += rows.read(path, report, encoding=data.encoding, errors=data.errors, fields=fields)
    return found


def _encoded(
    conversations: Sequence[Conversation], codec: Codec, context: int, report: Report
) -> tuple[list[Conversation], list[Encoded]]:
    """The conversations that can be learnt from, and their ids. UserError where there are none."""
    assert codec.chat_template is not None
    template = ChatTemplate(codec.chat_template)
    kept: list[Conversation] = []
    made: list[Encoded] = []
    for conversation in conversations:
        whole = encode.encode(codec, template, conversation, report)
        fitted = None if whole is None else encode.fit(whole, context, report, conversation.where)
        if fitted is not None:
            kept.append(conversation)
            made.append(fitted)
    if not made:
        raise UserError(
            f"no conversation can be used: {'; '.join(report.lines())}", hint="or is the context too short?"
        )
    return kept, made


def _rows(encoded: Sequence[Encoded], options: ChatOptions, context: int) -> list[list[Encoded]]:
    if not options.pack:
        return [[one] for one in encoded]
    room = min(context, options.row or ROW)
    packed = encode.pack([len(one.ids) - 1 for one in encoded], room)
    return [[encoded[index] for index in row] for row in packed]


def _asked(conversation: Conversation) -> str:
    """What a conversation begins with, up to its first answer: the same stays on one side of a split."""
    return "\n".join(message["content"] for message in conversation.messages[: conversation.answers[0]])


def _sizes(encoded: Sequence[Encoded], *, rows: int | None = None) -> Part:
    lengths = np.array([len(one.ids) for one in encoded])
    return Part(
        documents=len(encoded),
        tokens=int(lengths.sum()),
        details={
            "rows": len(encoded) if rows is None else rows,
            "answer_tokens": int(sum(one.answer.sum() for one in encoded)),
            "longest": int(lengths.max()),
            "median": float(np.median(lengths)),
        },
    )


APPLICATION = Chat()
