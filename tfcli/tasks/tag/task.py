"""Tagging words: named entities, or other labels of runs of words (Devlin et al. 2019, 5.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tfcli.errors import UserError
from tfcli.model import heads
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.common import batch
from tfcli.tasks.common.batch import Batch, head_logits
from tfcli.tasks.common.report import Examples, Report
from tfcli.tasks.common.split import Halves, halves
from tfcli.tasks.tag.chunks import Chunk
from tfcli.tasks.tag.data import Sentence
from tfcli.tasks.tag.options import TagConfig
from tfcli.tasks.tag.predictor import Predictions, TagPredictor, assess, note_unknown, note_words, read, rows_of
from tfcli.tasks.tag.schemes import TAG, Scheme, labels
from tfcli.tasks.tag.scores import score
from tfcli.tasks.task import Application, Headline, OverExamples, Start, check_head, label_ids, label_names, settings_of
from tfcli.text.tokenizers.codec import Codec

IGNORED = -100
"""Target of positions that are no word's first token."""


def loss(
    model: Transformer, part: Batch, *, dtype: torch.dtype | None = None, dropout: float = 0.0
) -> tuple[Tensor, int]:
    """Return the summed cross-entropy (nats, fp32) of the tags, each at its word's first token, and their number."""
    logits_NL = head_logits(model, part, dtype=dtype, dropout=dropout).flatten(0, 1)
    targets_N = part["labels_BT"].flatten()
    return F.cross_entropy(logits_NL, targets_N, ignore_index=IGNORED, reduction="sum"), count(part)


def count(part: Batch) -> int:
    """Return the number of tagged words in a batch."""
    return int((part["labels_BT"] != IGNORED).sum())


def examples(chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]) -> Batch:
    """Return rows as a batch; ``targets`` are the labels of each sentence's words."""
    tagged = []
    for chunk in chunks:
        row = [IGNORED] * len(chunk.ids)
        for word, at in zip(chunk.words, chunk.at, strict=True):
            row[at] = targets[chunk.index][word]
        tagged.append(row)
    ids = [chunk.ids for chunk in chunks]
    tensors = {"tokens_BT": batch.pad(ids), "mask_BT": batch.mask(ids), "labels_BT": batch.pad(tagged, value=IGNORED)}
    return Batch(tensors, padded=tuple(tensors))


@dataclass(frozen=True, kw_only=True)
class Tagging(OverExamples):
    """Sentences to train on and to be scored on: the ``Finetuning`` of ``tag``."""

    predictor: TagPredictor
    scheme: Scheme
    chunks: list[Chunk]
    targets: list[list[int]]
    """Labels of the words of each training sentence."""
    held_out: list[Sentence]
    held_chunks: list[Chunk]
    data_report: dict[str, Any]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row: a sentence, or a part of one that is longer than the model reads."""
        return np.array([len(chunk.ids) for chunk in self.chunks], np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Number of tokens of the held-out part."""
        return sum(len(chunk.ids) for chunk in self.held_chunks)

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """Return the rows at ``indices``, the same in every epoch."""
        return examples([self.chunks[index] for index in indices], self.targets)

    def count(self, rows: Batch) -> int:
        """Return the number of tagged words."""
        return count(rows)

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Return the summed cross-entropy of the tags, and their number."""
        return loss(model, rows, dtype=dtype, dropout=dropout)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Return precision, recall and F1 of entities, and the loss per word with a label that the model has."""
        tagged = self.predictor.tag(self.held_out, self.held_chunks)
        scores = score([sentence.entities for sentence in self.held_out], tagged.entities).all
        three = {"val_f1": scores.f1, "val_precision": scores.precision, "val_recall": scores.recall}
        return {**three, "val_loss": self._loss(tagged)}

    def _loss(self, tagged: Predictions) -> float:
        ids = {name: index for index, name in enumerate(self.predictor.names)}
        tags = [sentence.tags(self.scheme) for sentence in self.held_out]
        total, number = 0.0, 0
        for chunk, array in zip(self.held_chunks, tagged.shares, strict=True):
            for word, row in zip(chunk.words, array, strict=True):
                label = ids.get(tags[chunk.index][word])
                if label is not None:
                    total -= float(np.log(max(row[label], 1e-30)))
                    number += 1
        return total / max(1, number)

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Return F1."""
        return Headline(name="F1", value=scores["val_f1"], higher_is_better=True)

    @property
    def hf_config(self) -> dict[str, Any]:
        """Labels by their ids, and the maximum length of a row."""
        return {**label_ids(self.predictor.names), "tfcli": {"context": self.predictor.length}}

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Return the scores of the held-out part, with those of each label."""
        numbers, lines = assess(self.held_out, self.predictor.tag(self.held_out, self.held_chunks))
        return {f"val_{name}": value for name, value in numbers.items()}, lines


class Tag(Application):
    """``--task tag``."""

    name = "tag"
    config = TagConfig

    def prepare(self, start: Start) -> Tagging:
        """Read sentences, cut them into rows, and attach a head with a label for every tag."""
        config: TagConfig = start.config
        shape = start.model.config
        check_head(shape, heads.TokenHead.kind)
        report = Report.of(config.data)
        data = _halves(start, report)
        train, held_out = data.train, data.held_out
        scheme = data.infos[0] if config.tag.scheme == "auto" else config.tag.scheme
        names = _names(start, train, scheme)
        note_unknown(held_out, names, report)
        length = min(config.data.context or shape.context, shape.context)
        predictor = TagPredictor(
            model=start.model, codec=start.codec, names=names, length=length, runtime=start.runtime
        )
        cutter = predictor.cutter
        chunks = [chunk for chunk in rows_of(cutter, train) if chunk.words]
        if not chunks:
            raise UserError("the tokenizer leaves nothing of the words", hint="use a model for this language")
        held_chunks = rows_of(cutter, held_out)
        note_words(cutter, report)
        for line in report.lines():
            start.note(f"data: {line}")
        if tuple(label_names(start.hf_config)) != names:  # a head with these labels stays
            heads.detach(start.model)
        heads.fresh(start.model, heads.TokenHead.kind, len(names), seed=config.seed)
        ids = {name: index for index, name in enumerate(names)}
        data_report = report.data_report(
            self.name, "sentences", _summary(train, chunks), _summary(held_out, held_chunks),
            split=data.how, tokenizer_hash=start.codec.hash, details={"scheme": scheme},
        )  # fmt: skip
        targets = [[ids[tag] for tag in sentence.tags(scheme)] for sentence in train]
        return Tagging(
            predictor=predictor, scheme=scheme, chunks=chunks, targets=targets, held_out=held_out,
            held_chunks=held_chunks, data_report=data_report,
        )  # fmt: skip

    def predictor(
        self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any], runtime: Runtime
    ) -> TagPredictor:
        """Return the predictor of a directory with labels in its config.json, also one that tfcli did not write."""
        length, context = settings_of(hf_config).get("context"), model.config.context
        head = heads.of(model)
        names = tuple(label_names(hf_config))
        if not names or head is None or len(names) != head.labels:
            raise UserError("config.json does not name the labels of this model", hint='expected "id2label" in it')
        if not all(TAG.fullmatch(name) for name in names):  # no scheme: each run of a label is an entity
            names = tuple("O" if name == "O" else f"I-{name}" for name in names)
        length = min(length, context) if isinstance(length, int) else context
        return TagPredictor(model=model, codec=codec, names=names, length=length, runtime=runtime)


def _halves(start: Start, report: Report) -> Halves[Sentence, Scheme]:
    """Return the training and the held-out part; equal sentences stay on one side."""
    return halves(
        start.data, start.config, report, lambda specs: read(specs, start.config, report),
        things="sentences", note=start.note, groups=lambda whole: [sentence.text for sentence in whole],
    )  # fmt: skip


def _names(start: Start, train: Sequence[Sentence], scheme: Scheme) -> tuple[str, ...]:
    """Return the labels to train, in the order of the model that is finetuned where it has the same."""
    kinds = {entity.label for sentence in train for entity in sentence.entities}
    if not kinds:
        raise UserError(
            "the data has no entities: all its words are O", hint="expected tags such as B-person, I-person"
        )
    names = tuple(labels(kinds, scheme))
    before = tuple(label_names(start.hf_config))
    return before if sorted(before) == sorted(names) else names


def _summary(sentences: Sequence[Sentence], chunks: Sequence[Chunk]) -> Examples:
    tokens = [0] * len(sentences)
    for chunk in chunks:
        tokens[chunk.index] += len(chunk.ids)
    words = [len(sentence.words) for sentence in sentences]
    labels = Counter(entity.label for sentence in sentences for entity in sentence.entities)
    return Examples(
        documents=len(sentences),
        read=list(zip((sentence.where for sentence in sentences), tokens, strict=True)),
        keys=[sentence.text for sentence in sentences],
        details={"words": sum(words), "longest": max(words, default=0), "entities": dict(sorted(labels.items()))},
    )


APPLICATION = Tag()
