"""Tagging words: named entities, or whatever else runs of words are labelled with (Devlin et al. 2019, 5.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from tfcli.tasks.common.batch import Batch
from tfcli.tasks.common.report import Report, duplicates
from tfcli.tasks.common.split import GIVEN, split
from tfcli.tasks.tag import data as rows
from tfcli.tasks.tag.chunks import Chunk, Cutter
from tfcli.tasks.tag.data import Sentence
from tfcli.tasks.tag.options import TagConfig
from tfcli.tasks.tag.predictor import Found, Tagger, accuracy, answers, logits, placed, rows_of
from tfcli.tasks.tag.schemes import TAG, Scheme, labels
from tfcli.tasks.tag.scores import as_numbers, score, table
from tfcli.tasks.task import Application, Evaluation, JudgedByF1, Predictor, Start, check_head, label_ids, settings_of
from tfcli.text.data_report import Part
from tfcli.text.read import tables
from tfcli.text.tokenizers.codec import Codec

IGNORED = -100
"""The label of positions that are no word's first piece."""


def loss(
    model: Transformer, part: Batch, *, dtype: torch.dtype | None = None, dropout: float = 0.0
) -> tuple[Tensor, int]:
    """Summed cross-entropy (nats, fp32) of the tags of all words, each at its first piece, and how many they are."""
    logits_BTL = logits(model, part, dtype=dtype, dropout=dropout)
    targets = part["labels_BT"].flatten()
    return F.cross_entropy(logits_BTL.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"), count(part)


def count(part: Batch) -> int:
    """Words that are tagged in a batch."""
    return int((part["labels_BT"] != IGNORED).sum())


def examples(chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]) -> Batch:
    """Rows as a batch; ``targets`` are the labels of each sentence's words."""
    tagged = []
    for chunk in chunks:
        row = [IGNORED] * len(chunk.ids)
        for word, at in zip(chunk.words, chunk.at, strict=True):
            row[at] = targets[chunk.index][word]
        tagged.append(row)
    ids = [chunk.ids for chunk in chunks]
    return Batch(
        {"tokens_BT": batch.pad(ids), "mask_BT": batch.mask(ids), "labels_BT": batch.pad(tagged, value=IGNORED)},
        padded=("tokens_BT", "mask_BT", "labels_BT"),
    )


def read(data: Sequence[str], config: TagConfig, report: Report) -> tuple[list[Sentence], Scheme]:
    """The sentences of all files, and the scheme that they are written in: BIOES where one of them is.

    UserError where none of them has tags or spans.
    """
    options = config.data
    keys = rows.Keys(tokens=options.tokens_key, tags=options.tags_key, text=options.text_key, spans=options.spans_key)
    found = [
        rows.read(path, report, repair=config.tag.repair, encoding=options.encoding, errors=options.errors, keys=keys)
        for path in tables.expand(data)
    ]
    if all(each.bare for each in found):
        raise UserError(f"{', '.join(data)}: no sentence has words and tags, or a text and spans", hint=rows.EXPECTED)
    scheme: Scheme = "bioes" if any(each.scheme == "bioes" for each in found) else "bio"
    return [sentence for each in found for sentence in each.sentences], scheme


def odd_words(cutter: Cutter, report: Report) -> None:
    """What became of words on their way to pieces."""
    report.note("words that the tokenizer leaves nothing of, tagged O", cutter.without_pieces)
    report.note("words longer than the model reads, cut", cutter.cut_words, action="cut")
    report.note("sentences longer than the model reads, in parts that overlap", cutter.long)


@dataclass(frozen=True, kw_only=True)
class Tagging(JudgedByF1):
    """Sentences to learn from and to be scored on: the ``Finetuning`` of ``tag``."""

    tagger: Tagger
    scheme: Scheme
    chunks: list[Chunk]
    targets: list[list[int]]
    """Labels of the words of each sentence to learn from."""
    held_out: list[Sentence]
    held_chunks: list[Chunk]
    data_report: dict[str, Any]

    @property
    def size(self) -> int:
        """Rows in one epoch: sentences, but for those longer than the model."""
        return len(self.chunks)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.array([len(chunk.ids) for chunk in self.chunks], np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Of the held-out part."""
        return sum(len(chunk.ids) for chunk in self.held_chunks)

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """The same in every epoch."""
        return examples([self.chunks[index] for index in indices], self.targets)

    def count(self, rows: Batch) -> int:
        """Tagged words."""
        return count(rows)

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed cross-entropy of the tags."""
        return loss(model, rows, dtype=dtype, dropout=dropout)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """F1 of entities, and the loss a word; words with labels that the model does not have are left out of it."""
        found = self.tagger.find(self.held_out, self.held_chunks)
        scores = score([sentence.entities for sentence in self.held_out], found.entities).all
        three = {"val_f1": scores.f1, "val_precision": scores.precision, "val_recall": scores.recall}
        return {**three, "val_loss": self._loss(found)}

    def _loss(self, found: Found) -> float:
        ids = {name: index for index, name in enumerate(self.tagger.names)}
        tags = [sentence.tags(self.scheme) for sentence in self.held_out]
        total, number = 0.0, 0
        for chunk, array in zip(self.held_chunks, found.shares, strict=True):
            for word, row in zip(chunk.words, array, strict=True):
                label = ids.get(tags[chunk.index][word])
                if label is not None:
                    total -= float(np.log(max(row[label], 1e-30)))
                    number += 1
        return total / max(1, number)

    @property
    def about(self) -> dict[str, Any]:
        """Labels by their ids, and how long rows are."""
        return {**label_ids(self.tagger.names), "tfcli": {"context": self.tagger.length}}

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Scores of the held-out part, with those of each label."""
        found = self.tagger.find(self.held_out, self.held_chunks)
        numbers, lines = _scores(self.held_out, found)
        return {f"val_{name}": value for name, value in numbers.items()}, lines


def _scores(sentences: Sequence[Sentence], found: Found) -> tuple[dict[str, Any], list[str]]:
    scores = score([sentence.entities for sentence in sentences], found.entities)
    numbers = {**as_numbers(scores), "accuracy": accuracy(sentences, found), "examples": len(sentences)}
    return numbers, table(scores)


@dataclass(kw_only=True)
class TagPredictor(Tagger, Predictor):
    """A finetuned model that tags: the ``Predictor`` of ``tag``."""

    def evaluate(self, specs: Sequence[str], config: TagConfig, *, limit: int | None) -> Evaluation:
        """Precision, recall and F1 of entities as seqeval's, with 95 % bootstrap intervals over sentences."""
        report = Report(strict=config.data.strict)
        sentences = read(specs, config, report)[0][:limit]
        unknown(sentences, self.names, report)
        cutter = self.cutter
        found = self.find(sentences, rows_of(cutter, sentences))
        odd_words(cutter, report)
        numbers, lines = _scores(sentences, found)
        predictions = answers(sentences, found)
        for answer, sentence in zip(predictions, sentences, strict=True):
            answer["expected"] = [placed(sentence, entity) for entity in sentence.entities]
        numbers["data"] = report.as_json()
        return Evaluation(scores=numbers, lines=lines, predictions=predictions, notes=tuple(report.lines()))


def unknown(sentences: Sequence[Sentence], names: Sequence[str], report: Report) -> None:
    """Tell the report of sentences with labels that are not learnt."""
    known = {name[2:] for name in names}
    for sentence in sentences:
        if not {entity.label for entity in sentence.entities} <= known:
            kind = "held-out sentences with labels that the model does not have, missed"
            report.fault(kind, sentence.where, None)


class Tag(Application):
    """``--task tag``."""

    name = "tag"
    config = TagConfig

    def prepare(self, start: Start) -> Tagging:
        """Read sentences, cut them into rows, and attach a head with a label for every tag."""
        config: TagConfig = start.config
        shape = start.model.config
        check_head(shape, heads.TokenHead.kind)
        report = Report(strict=config.data.strict)
        train, held_out, scheme, how = _halves(start, report)
        if config.tag.scheme != "auto":
            scheme = config.tag.scheme
        names = _names(start, train, scheme)
        unknown(held_out, names, report)
        tagger = Tagger(
            model=start.model,
            codec=start.codec,
            names=names,
            length=min(config.data.context or shape.context, shape.context),
            runtime=start.runtime,
        )
        cutter = tagger.cutter
        chunks = [chunk for chunk in rows_of(cutter, train) if chunk.words]
        if not chunks:
            raise UserError("the tokenizer leaves nothing of the words", hint="use a model for this language")
        held_chunks = rows_of(cutter, held_out)
        odd_words(cutter, report)
        for line in report.lines():
            start.note(f"data: {line}")
        _attach(start, names)
        ids = {name: index for index, name in enumerate(names)}
        return Tagging(
            tagger=tagger,
            scheme=scheme,
            chunks=chunks,
            targets=[[ids[tag] for tag in sentence.tags(scheme)] for sentence in train],
            held_out=held_out,
            held_chunks=held_chunks,
            data_report=report.data_report(
                self.name,
                "sentences",
                _tokens(zip((train, held_out), (chunks, held_chunks), strict=True)),
                split=how,
                train=_summary(train, chunks),
                val=_summary(held_out, held_chunks),
                twice=duplicates([s.text for s in train], [s.text for s in held_out]),
                tokenizer_hash=start.codec.hash,
                details={"scheme": scheme},
            ),
        )

    def predictor(self, model: Transformer, codec: Codec, about: Mapping[str, Any], runtime: Runtime) -> TagPredictor:
        """Of a directory with labels in its config.json, ours or another's."""
        length, context = settings_of(about).get("context"), model.config.context
        head = heads.of(model)
        names = names_of(about)
        if names is None or head is None or len(names) != head.labels:
            raise UserError("config.json does not name the labels of this model", hint='expected "id2label" in it')
        if not all(TAG.fullmatch(name) for name in names):  # no scheme: each run of a label is an entity
            names = tuple("O" if name == "O" else f"I-{name}" for name in names)
        length = min(length, context) if isinstance(length, int) else context
        return TagPredictor(model=model, codec=codec, names=names, length=length, runtime=runtime)


def names_of(about: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels that a config.json names, in the order of their ids; None where it has none."""
    listed = about.get("id2label")
    if not isinstance(listed, dict) or sorted(listed) != sorted(map(str, range(len(listed)))):
        return None
    return tuple(str(listed[str(index)]) for index in range(len(listed)))


def _halves(start: Start, report: Report) -> tuple[list[Sentence], list[Sentence], Scheme, Mapping[str, Any]]:
    """The training and the held-out part, the scheme, and how the part was chosen."""
    config: TagConfig = start.config
    report.part = "both" if config.data.val is None else "train"
    whole, scheme = read(start.data, config, report)
    if config.data.val is not None:
        report.part = "val"
        return whole, read([config.data.val], config, report)[0], scheme, GIVEN
    made = split(
        len(whole),
        config.data.val_fraction,
        config.seed,
        groups=[sentence.text for sentence in whole],
        things="sentences",
        report=report,
    )
    train, held = made.of(whole)
    start.note(f"held out: {len(held):,} of {len(whole):,} sentences, drawn at random")
    return train, held, scheme, made.how


def _names(start: Start, train: Sequence[Sentence], scheme: Scheme) -> tuple[str, ...]:
    """The labels to learn; in the order of the model that is finetuned, where it has the same."""
    kinds = {entity.label for sentence in train for entity in sentence.entities}
    if not kinds:
        raise UserError(
            "the data has no entities: all its words are O", hint="expected tags such as B-person, I-person"
        )
    names = tuple(labels(kinds, scheme))
    before = names_of(start.about)
    return before if before is not None and sorted(before) == sorted(names) else names


def _attach(start: Start, names: tuple[str, ...]) -> None:
    """A new head; the one that the model came with stays where it has these labels."""
    if names_of(start.about) != names:
        heads.detach(start.model)
    heads.fresh(start.model, heads.TokenHead.kind, len(names), seed=start.config.seed)


def _tokens(parts: Iterable[tuple[Sequence[Sentence], Sequence[Chunk]]]) -> Iterator[tuple[str, int]]:
    """Where each sentence was read, and its tokens."""
    for sentences, chunks in parts:
        tokens = [0] * len(sentences)
        for chunk in chunks:
            tokens[chunk.index] += len(chunk.ids)
        yield from zip((sentence.where for sentence in sentences), tokens, strict=True)


def _summary(sentences: Sequence[Sentence], chunks: Sequence[Chunk]) -> Part:
    found = Counter(entity.label for sentence in sentences for entity in sentence.entities)
    return Part(
        documents=len(sentences),
        tokens=sum(len(chunk.ids) for chunk in chunks),
        details={
            "words": sum(len(sentence.words) for sentence in sentences),
            "longest": max((len(sentence.words) for sentence in sentences), default=0),
            "entities": dict(sorted(found.items())),
        },
    )


APPLICATION = Tag()
