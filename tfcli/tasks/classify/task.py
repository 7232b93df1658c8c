"""Classification: a text, or a pair of texts, into one label, or into any number of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tfcli.errors import UserError
from tfcli.formats.hf.heads import pooling_of
from tfcli.model import heads
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.classify import data as labelled
from tfcli.tasks.classify import plot
from tfcli.tasks.classify.data import Example, Part
from tfcli.tasks.classify.options import ClassifyConfig
from tfcli.tasks.classify.predictor import ClassifyPredictor, Labelled, assess, run, score
from tfcli.tasks.common.batch import Batch, head_logits
from tfcli.tasks.common.report import Examples, Report
from tfcli.tasks.common.split import halves
from tfcli.tasks.task import Application, Headline, OverExamples, Start, label_ids, label_names
from tfcli.text.tokenizers.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Classification(OverExamples):
    """Labelled texts; the loss is cross-entropy, or binary cross-entropy over the labels of a text."""

    train: Labelled
    val: Labelled
    names: list[str]
    multi: bool
    config: ClassifyConfig
    context: int
    runtime: Runtime
    data_report: dict[str, Any]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return np.array([len(row) for row in self.train.encoded.ids], dtype=np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Number of tokens of the held-out part."""
        return sum(map(len, self.val.encoded.ids))

    @property
    def hf_config(self) -> dict[str, Any]:
        """Labels as transformers names them, and the columns by which predict finds a text."""
        settings: dict[str, Any] = {"context": self.context, "threshold": self.config.classify.threshold}
        named = {"text_key": self.config.data.text_key, "pair_key": self.config.data.pair_key}
        settings |= {key: value for key, value in named.items() if value is not None and not value.isdecimal()}
        kind = "multi_label_classification" if self.multi else "single_label_classification"
        return {**label_ids(self.names), "problem_type": kind, "tfcli": settings}

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """Return the examples at ``indices``, the same in every epoch."""
        return self.train.encoded.batch(indices.tolist(), {"targets": self.train.targets[torch.from_numpy(indices)]})

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Return the loss summed over examples, for several labels the mean over them, and the examples."""
        return self._loss(head_logits(model, rows, dtype=dtype, dropout=dropout), rows["targets"]), len(rows)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(logits.device)
        if self.multi:
            each = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
            return each.mean(dim=1).sum()
        return F.cross_entropy(logits, targets, weight=weights, reduction="sum")

    @cached_property
    def weights(self) -> Tensor | None:
        """Weights of balanced labels: N / (labels n), or with several labels per text (N - n) / n."""
        if self.config.classify.class_weights == "none":
            return None
        targets, total = self.train.targets, len(self.train.targets)
        if self.multi:
            counts = targets.sum(dim=0).clamp_min(1)
            return (total - counts).clamp_min(1) / counts
        counts = torch.bincount(targets, minlength=len(self.names)).clamp_min(1)
        return total / (len(self.names) * counts)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Return loss, accuracy and macro F1 of the held-out part."""
        logits = run(model, self.val.encoded, self.runtime)
        loss = float(self._loss(torch.from_numpy(logits), self.val.targets)) / max(1, len(logits))
        numbers = score(logits, self.val.targets.numpy(), multi=self.multi, threshold=self.config.classify.threshold)
        return {"val_loss": loss, **{f"val_{name}": value for name, value in numbers.items()}}

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Return the accuracy, or macro F1 where that is asked for."""
        metric = self.config.classify.metric
        return Headline.share(metric.replace("_f1", " F1"), scores[f"val_{metric}"], len(self.val.examples))

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Return the scores of the held-out part, with those of each label."""
        logits, targets = run(model, self.val.encoded, self.runtime), self.val.targets.numpy()
        threshold = self.config.classify.threshold
        numbers, lines = assess(logits, targets, self.names, multi=self.multi, threshold=threshold)
        return {f"val_{name}": value for name, value in numbers.items()}, lines

    def draw(self, directory: Path, scores: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Draw the confusion matrix of ``report`` as a PNG, where texts have one label each."""
        if self.multi:
            return
        if not plot.available():
            note(f"no {plot.FILE}: matplotlib is not installed ({plot.INSTALL})")
            return
        plot.write(directory / plot.FILE, np.array(scores["val_confusion"]), self.names)


class Classify(Application):
    """``--task classify``."""

    name = "classify"
    config = ClassifyConfig

    def prepare(self, start: Start) -> Classification:
        """Read, split, number and encode the data, and attach a head with an output for every label."""
        config: ClassifyConfig = start.config
        if start.model.config.encoder_depth:
            raise UserError(
                "classify needs an encoder or a decoder, and this model is both",
                hint="finetune a BERT, or a decoder such as Qwen, Llama or GPT-2",
            )
        report = Report.of(config.data)

        def read(specs: Sequence[str]) -> tuple[list[Example], tuple[Part, list[str]]]:
            name = "the held-out data" if report.part == "val" else "the data"
            part = labelled.read(specs, config.data, name=name, note=start.note, report=report)
            return part.examples, (part, [] if report.part == "val" else labelled.names_of(part))

        data = halves(
            start.data, config, report, read,
            things="examples", note=start.note, labels=lambda whole: [example.labels for example in whole],
        )  # fmt: skip
        (part, names), *given = data.infos
        before = label_names(start.hf_config)
        names = before if sorted(before) == sorted(names) else names  # in the order of a model with the same labels
        for held, _ in given:
            labelled.check_known(held, names, of="the training data")
            if held.multi and not part.multi:
                raise UserError("the held-out data has several labels a row, the training data one")
        train = [example for example in data.train if any(example.key)]
        for example in data.train:
            if not any(example.key):
                report.fault("examples with an empty text, left out of training", example.where)
        if not train or not data.held_out:
            raise UserError("nothing is held out for validation" if train else "there is nothing to train on")
        context = min(config.data.context or start.model.config.context, start.model.config.context)
        sets = [Labelled.of(each, names, part.multi, start.codec, context) for each in (train, data.held_out)]
        heads.fresh(start.model, "sequence", len(names), seed=config.seed, pooling=pooling_of(start.hf_config))
        for each in sets:
            for index in each.encoded.cut:
                report.note("texts longer than the context, cut", action="cut", where=each.examples[index].where)
        columns = [column for each, _ in data.infos for column in each.columns]
        data_report = report.data_report(
            self.name, "examples", *(_summary(each, names) for each in sets),
            split=data.how, tokenizer_hash=start.codec.hash,
            details={"several_labels": part.multi, "columns": columns},
            content_hash=hashlib.sha256("".join(each.hash for each, _ in data.infos).encode()).hexdigest(),
        )  # fmt: skip
        for line in [*_notes(data_report, names), *report.lines()]:
            start.note(line)
        return Classification(
            train=sets[0], val=sets[1], names=names, multi=part.multi, config=config, context=context,
            runtime=start.runtime, data_report=data_report,
        )  # fmt: skip

    def check_drawing(self, path: Path) -> None:
        """Raise UserError if matplotlib is missing, or the file is no PNG."""
        plot.check(path)

    def predictor(
        self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any], runtime: Runtime
    ) -> ClassifyPredictor:
        """Return the predictor of a model with a sequence head."""
        return ClassifyPredictor(model, codec, hf_config, runtime)


def _summary(part: Labelled, names: Sequence[str]) -> Examples:
    lengths = [len(row) for row in part.encoded.ids]
    counts = Counter(label for example in part.examples for label in example.labels)
    labels = {name: counts[name] for name in names}
    return Examples(
        documents=len(lengths),
        read=[(example.where, length) for example, length in zip(part.examples, lengths, strict=True)],
        keys=[example.key for example in part.examples],
        details={"labels": labels, "longest": max(lengths), "median": int(np.median(lengths))},
    )


def _notes(data_report: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return what a person should know of the data."""
    train, val, twice = data_report["train"], data_report["val"], data_report["duplicates"]
    counts = [train["labels"][name] for name in names]
    lines = [
        f"data: {train['documents']:,} examples to train on, {val['documents']:,} held out; {len(names)} labels of "
        f"{min(counts):,} to {max(counts):,} examples; {train['median']} tokens (median), {train['longest']} at most"
    ]
    if twice["across_splits"]:
        lines.append(f"{twice['across_splits']:,} held-out texts are in the training part too: scores are too good")
    absent = [name for name in names if not train["labels"][name]]
    if absent:
        lines.append(f"labels without an example to train on: {', '.join(absent[:10])}")
    return lines


APPLICATION = Classify()
