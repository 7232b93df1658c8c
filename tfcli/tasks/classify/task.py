"""Classification: a text, or a pair of texts, into one label, or into any number of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tfcli.errors import UserError
from tfcli.formats.hf.heads import pooling_of
from tfcli.infer.batches import by_length
from tfcli.model import heads
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.classify import data as labelled
from tfcli.tasks.classify import plot, scores
from tfcli.tasks.classify.data import Example
from tfcli.tasks.classify.options import ClassifyConfig
from tfcli.tasks.common.batch import Batch, mask, pad
from tfcli.tasks.common.report import Report
from tfcli.tasks.common.split import GIVEN, split
from tfcli.tasks.task import Application, Evaluation, Finetuning, Headline, Predictor, Start, label_ids, settings_of
from tfcli.text.data_report import Part
from tfcli.text.tokenizers.codec import Codec

PAIRED = ("text", "pair")
SHOWN = 40
"""Labels of a table for people at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Texts as a model is fed them."""

    ids: list[list[int]]
    types: list[list[int]]
    cut: list[int]
    """Which were longer than the model's context; what follows was left out."""

    def batch(self, chosen: Sequence[int], more: Mapping[str, Tensor]) -> Batch:
        """Some of them."""
        rows = [self.ids[i] for i in chosen]
        tensors = {"tokens_BT": pad(rows), "mask_BT": mask(rows), "types_BT": pad([self.types[i] for i in chosen])}
        return Batch({**tensors, **more}, padded=tuple(tensors))


def encode(codec: Codec, texts: Sequence[str], pairs: Sequence[str | None], context: int) -> Encoded:
    """Ids of texts, or of pairs with the suffix between, at most ``context`` of them: the longer text is cut first.

    Of BERT ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]`` with types 0 and 1 (Devlin et al. 2019, 3); where a tokenizer
    has no suffix, the end-of-text id stands between the two.
    """
    prefix, suffix = list(codec.prefix_ids), list(codec.suffix_ids)
    between = suffix or [codec.eos_id]
    first = codec.encode_batch(list(texts))
    paired = [index for index, pair in enumerate(pairs) if pair is not None]
    second = dict(zip(paired, codec.encode_batch([pairs[index] or "" for index in paired]), strict=True))
    ids, types, cut = [], [], []
    for index, a in enumerate(first):
        b = second.get(index)
        fixed = len(prefix) + len(suffix) + (0 if b is None else len(between))
        room = context - fixed
        if room < 1:
            raise UserError(f"a context of {context} has no room for a text beside {fixed} special tokens")
        if b is None:
            cut += [index] if len(a) > room else []
            row = [*prefix, *a[:room], *suffix] or [codec.eos_id]
            ids.append(row)
            types.append([0] * len(row))
            continue
        cut += [index] if len(a) + len(b) > room else []
        keep_b = max(min(len(b), room // 2), min(len(b), room - len(a)))
        head = [*prefix, *a[: room - keep_b], *between]
        tail = [*b[:keep_b], *suffix]
        ids.append(head + tail)
        types.append([0] * len(head) + [1] * len(tail))
    return Encoded(ids=ids, types=types, cut=cut)


def logits_of(model: Transformer, batch: Batch, *, dtype: torch.dtype, dropout: float = 0.0) -> Tensor:
    """(B, labels) in fp32."""
    types_BT = batch["types_BT"] if model.config.architecture.embedding.token_types > 1 else None
    hidden_BTD = model(batch["tokens_BT"], mask_BT=batch["mask_BT"], types_BT=types_BT, dtype=dtype, dropout=dropout)
    head = heads.of(model)
    assert head is not None
    logits: Tensor = head(hidden_BTD, batch["mask_BT"], dropout)
    return logits


@torch.inference_mode()
def run(model: Transformer, encoded: Encoded, runtime: Runtime) -> npt.NDArray[np.float32]:
    """The logits (N, labels) of texts, in their order; those of similar length are read together."""
    head = heads.of(model)
    assert head is not None
    out = np.empty((len(encoded.ids), head.labels), np.float32)
    for chosen in by_length([len(row) for row in encoded.ids], device=runtime.device):
        batch = encoded.batch(chosen, {}).to(runtime.device)
        out[chosen] = logits_of(model, batch, dtype=runtime.dtype).cpu().numpy()
    return out


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Examples with their numbers: targets (N,) of one label each, or (N, labels) of 0 and 1."""

    examples: Sequence[Example]
    encoded: Encoded
    targets: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], names: Sequence[str], multi: bool, codec: Codec, context: int) -> Labelled:
        """Encode and number them."""
        number = {name: index for index, name in enumerate(names)}
        if multi:
            targets = torch.zeros(len(examples), len(names))
            for row, example in enumerate(examples):
                targets[row, [number[label] for label in example.labels]] = 1.0
        else:
            targets = torch.tensor([number[example.labels[0]] for example in examples], dtype=torch.int64)
        encoded = encode(codec, [e.text for e in examples], [e.pair for e in examples], context)
        return cls(examples=examples, encoded=encoded, targets=targets)


@dataclass(frozen=True, kw_only=True)
class Classification(Finetuning):
    """What the trainer sees. The loss is cross-entropy, or binary cross-entropy over the labels of a text."""

    train: Labelled
    val: Labelled
    names: list[str]
    multi: bool
    config: ClassifyConfig
    context: int
    runtime: Runtime
    data_report: dict[str, Any]

    @property
    def size(self) -> int:
        """Examples."""
        return len(self.train.examples)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each."""
        return np.array([len(row) for row in self.train.encoded.ids], dtype=np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Of the held-out part."""
        return sum(map(len, self.val.encoded.ids))

    @property
    def about(self) -> dict[str, Any]:
        """Entries of config.json, as transformers names them, and the columns by which predict finds a text."""
        settings: dict[str, Any] = {"context": self.context, "threshold": self.config.classify.threshold}
        named = {"text_key": self.config.data.text_key, "pair_key": self.config.data.pair_key}
        settings |= {key: value for key, value in named.items() if value is not None and not value.isdecimal()}
        return {
            **label_ids(self.names),
            "problem_type": "multi_label_classification" if self.multi else "single_label_classification",
            "tfcli": settings,
        }

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """Examples, the same in every epoch."""
        return self.train.encoded.batch(indices.tolist(), {"targets": self.train.targets[torch.from_numpy(indices)]})

    def count(self, rows: Batch) -> int:
        """Examples."""
        return len(rows)

    def tokens(self, rows: Batch) -> int:
        """Without padding."""
        return rows.real_tokens

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed over examples; of several labels the mean over the labels of each."""
        logits = logits_of(model, rows, dtype=dtype, dropout=dropout)
        return self._loss(logits, rows["targets"]), len(rows)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = self.weights
        weights = None if weights is None else weights.to(logits.device)
        if self.multi:
            each = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
            return each.mean(dim=1).sum()
        return F.cross_entropy(logits, targets, weight=weights, reduction="sum")

    @property
    def weights(self) -> Tensor | None:
        """Of the labels, where they are balanced: N / (labels n), or of several labels (N - n) / n."""
        if self.config.classify.class_weights == "none":
            return None
        targets, total = self.train.targets, len(self.train.targets)
        if self.multi:
            counts = targets.sum(dim=0).clamp_min(1)
            return (total - counts).clamp_min(1) / counts
        counts = torch.bincount(targets, minlength=len(self.names)).clamp_min(1)
        return total / (len(self.names) * counts)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Loss, accuracy and macro F1 of the held-out part."""
        logits = run(model, self.val.encoded, self.runtime)
        loss = float(self._loss(torch.from_numpy(logits), self.val.targets)) / max(1, len(logits))
        found = score(logits, self.val.targets.numpy(), multi=self.multi, threshold=self.config.classify.threshold)
        return {"val_loss": loss, **{f"val_{name}": value for name, value in found.items()}}

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Accuracy, or macro F1 where that is asked for."""
        metric = self.config.classify.metric
        said = {"accuracy": "accuracy", "macro_f1": "macro F1"}[metric]
        return Headline.share(said, scores[f"val_{metric}"], len(self.val.examples))

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Of the held-out part, with a report of each label."""
        logits = run(model, self.val.encoded, self.runtime)
        made = assess(
            logits, self.val.targets.numpy(), self.names, multi=self.multi, threshold=self.config.classify.threshold
        )
        return {f"val_{name}": value for name, value in made[0].items()}, made[1]

    def draw(self, directory: Path, scores: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """The confusion matrix of ``report`` as a PNG, of one label each."""
        if self.multi:
            return
        if not plot.available():
            note(f"no {plot.FILE}: matplotlib is not installed ({plot.INSTALL})")
            return
        plot.write(directory / plot.FILE, np.array(scores["val_confusion"]), self.names)


def probabilities(logits: npt.NDArray[np.float32], *, multi: bool) -> npt.NDArray[np.float64]:
    """Of each label (N, labels): a softmax, or of several labels a sigmoid each."""
    x = torch.from_numpy(logits).double()
    return (torch.sigmoid(x) if multi else torch.softmax(x, dim=-1)).numpy()


def score(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[Any], *, multi: bool, threshold: float
) -> dict[str, float]:
    """The scores of logits (N, labels)."""
    if multi:
        return scores.multi(targets > 0, probabilities(logits, multi=True) >= threshold)
    return scores.single(targets, logits.argmax(axis=1), logits.shape[1])


def assess(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[Any], names: Sequence[str], *, multi: bool, threshold: float
) -> tuple[dict[str, Any], list[str]]:
    """Scores with their intervals, and tables for people."""
    found: dict[str, Any] = dict(score(logits, targets, multi=multi, threshold=threshold))
    if multi:
        true, predicted = targets > 0, probabilities(logits, multi=True) >= threshold
    else:
        true, predicted = np.eye(len(names), dtype=bool)[targets], np.eye(len(names), dtype=bool)[logits.argmax(axis=1)]
    classes, bounds = scores.by_class(true, predicted, names), scores.intervals(true, predicted, multi=multi)
    lines = [
        f"{name:9} {found[name]:.4f}  (95 % interval {bounds[name][0]:.4f} to {bounds[name][1]:.4f})"
        for name in ("accuracy", "macro_f1")
    ]
    lines += ["", *scores.report(classes if len(classes) <= SHOWN else sorted(classes, key=lambda c: c.f1)[:SHOWN])]
    if len(classes) > SHOWN:
        lines.append(f"(the {SHOWN} labels with the lowest F1 of {len(classes)})")
    found["examples"] = len(logits)
    found["interval"] = bounds
    found["labels"] = {
        c.label: {"precision": c.precision, "recall": c.recall, "f1": c.f1, "examples": c.support} for c in classes
    }
    if not multi:
        matrix = scores.confusion(targets, logits.argmax(axis=1), len(names))
        lines += ["", *scores.table(matrix, names)]
        found["confusion"] = matrix.tolist()
    return found, lines


class Classify(Application):
    """The application."""

    name = "classify"
    config = ClassifyConfig

    def prepare(self, start: Start) -> Classification:
        """Read, split, number and encode the data, and give the model its head."""
        config: ClassifyConfig = start.config
        if start.model.config.encoder_depth:
            raise UserError(
                "classify needs an encoder or a decoder, and this model is both",
                hint="finetune a BERT, or a decoder such as Qwen, Llama or GPT-2",
            )
        report = Report(part="both" if config.data.val is None else "train")
        part = labelled.read(start.data, config.data, name="the data", note=start.note, report=report)
        names = self._names(labelled.names_of(part), start.about)
        if config.data.val is not None:
            report.part = "val"
            val_spec, called = [config.data.val], "the held-out data"
            held = labelled.read(val_spec, config.data, name=called, note=start.note, report=report)
            labelled.check_known(held, names, of="the training data")
            if held.multi and not part.multi:
                raise UserError("the held-out data has several labels a row, the training data one")
            train, val, how = part.examples, held.examples, GIVEN
        else:
            held = None
            every = [example.labels for example in part.examples]
            made = split(len(every), config.data.val_fraction, config.seed, labels=every)
            (train, val), how = made.of(part.examples), made.how
            said = f"held out: {len(val):,} of {len(part.examples):,} examples, {how['rule']}"
            start.note(f"{said}; --val FILE gives others")
        kept = [e for e in train if e.text.strip() or (e.pair or "").strip()]
        if len(kept) < len(train):
            start.note(f"{len(train) - len(kept)} examples with an empty text are left out of training")
            for example in train:
                if not example.text.strip() and not (example.pair or "").strip():
                    report.fault("examples with an empty text, left out of training", example.where)
        if not kept or not val:
            raise UserError("there is nothing to train on" if not kept else "nothing is held out for validation")
        context = min(config.data.context or start.model.config.context, start.model.config.context)
        sets = [Labelled.of(each, names, part.multi, start.codec, context) for each in (kept, val)]
        pooling = pooling_of(start.about)
        heads.fresh(start.model, "sequence", len(names), seed=config.seed, pooling=pooling)
        details = {"several_labels": part.multi, "columns": [c for p in (part, held) if p for c in p.columns]}
        hashes = "".join(each.hash for each in (part, held) if each)
        data_report = _data_report(start.codec, report, sets, names, how, details, hashes)
        for line in _notes(data_report, names, context):
            start.note(line)
        return Classification(
            train=sets[0],
            val=sets[1],
            names=names,
            multi=part.multi,
            config=config,
            context=context,
            runtime=start.runtime,
            data_report=data_report,
        )

    def _names(self, found: list[str], about: Mapping[str, Any]) -> list[str]:
        """The labels in the order of the model, where it has the same ones."""
        given = label_names(about)
        return given if sorted(given) == sorted(found) else found

    def check_drawing(self, path: Path) -> None:
        """Raise UserError where matplotlib is missing, or the file is no PNG."""
        plot.check(path)

    def predictor(
        self, model: Transformer, codec: Codec, about: Mapping[str, Any], runtime: Runtime
    ) -> ClassifyPredictor:
        """Of a model with a sequence head."""
        return ClassifyPredictor(model, codec, about, runtime)


def label_names(about: Mapping[str, Any]) -> list[str]:
    """The labels that a config.json names, in order; [] for none."""
    named = about.get("id2label")
    if not isinstance(named, Mapping):
        return []
    return [str(named[key]) for key in sorted(named, key=int)] if all(str(k).isdecimal() for k in named) else []


def _data_report(
    codec: Codec,
    report: Report,
    sets: Sequence[Labelled],
    names: Sequence[str],
    how: Mapping[str, Any],
    details: Mapping[str, Any],
    hashes: str,
) -> dict[str, Any]:
    """data.json."""
    for each in sets:
        for index in each.encoded.cut:
            report.note("texts longer than the context, cut", action="cut", where=each.examples[index].where)
    train, val = (_summary(each, names) for each in sets)
    return report.data_report(
        "classify",
        "examples",
        ((e.where, len(ids)) for each in sets for e, ids in zip(each.examples, each.encoded.ids, strict=True)),
        split=how,
        train=train,
        val=val,
        twice=labelled.duplicates(sets[0].examples, sets[1].examples),
        tokenizer_hash=codec.hash,
        details=details,
        content_hash=hashlib.sha256(hashes.encode()).hexdigest(),
    )


def _summary(part: Labelled, names: Sequence[str]) -> Part:
    lengths = [len(row) for row in part.encoded.ids]
    labels = dict.fromkeys(names, 0)
    for example in part.examples:
        for label in example.labels:
            labels[label] += 1
    return Part(
        documents=len(lengths),
        tokens=sum(lengths),
        details={"labels": labels, "longest": max(lengths), "median": int(np.median(lengths))},
    )


def _notes(data_report: Mapping[str, Any], names: Sequence[str], context: int) -> list[str]:
    """What a person should know of the data."""
    train, val, twice = data_report["train"], data_report["val"], data_report["duplicates"]
    counts = [train["labels"][name] for name in names]
    lines = [
        f"data: {train['documents']:,} examples to train on, {val['documents']:,} held out; {len(names)} labels of "
        f"{min(counts):,} to {max(counts):,} examples; {train['median']} tokens (median), {train['longest']} at most"
    ]
    if cut := data_report["cut"]["count"]:
        lines.append(f"{cut:,} texts are longer than {context} tokens: what follows is left out")
    if twice["across_splits"]:
        lines.append(f"{twice['across_splits']:,} held-out texts are in the training part too: scores are too good")
    absent = [name for name in names if not train["labels"][name]]
    if absent:
        lines.append(f"labels without an example to train on: {', '.join(absent[:10])}")
    return lines


class ClassifyPredictor(Predictor):
    """Labels of texts."""

    def __init__(self, model: Transformer, codec: Codec, about: Mapping[str, Any], runtime: Runtime) -> None:
        head = heads.of(model)
        if head is None or head.kind != "sequence" or not head.labels:
            raise UserError("this model has no head that classifies", hint="finetune it with --task classify")
        self.model, self.codec, self.runtime = model, codec, runtime
        self.names = label_names(about)
        if len(self.names) != head.labels:
            self.names = [f"LABEL_{index}" for index in range(head.labels)]
        self.multi = about.get("problem_type") == "multi_label_classification"
        settings = settings_of(about)
        self.context = min(int(settings.get("context", model.config.context)), model.config.context)
        self.threshold = float(settings.get("threshold", 0.5))
        named = {key: settings.get(key) for key in ("text_key", "pair_key")}
        self.text_keys, self.pair_keys = ([name] if isinstance(name, str) else [] for name in named.values())
        self.key = next(iter(self.text_keys), "text")

    def plain(self, line: str) -> tuple[str, str | None]:
        """A line is a text."""
        return line, None

    def parse(self, row: dict[str, Any]) -> tuple[str, str | None]:
        """The text, and the second where there is one, under the names that training takes them by."""
        text = next((row[key] for key in (*self.text_keys, *labelled.TEXTS) if isinstance(row.get(key), str)), None)
        if text is None:
            raise UserError(f'has no "{self.key}" with a string')
        pairs = (*self.pair_keys, *labelled.PAIRS)
        return text, next((row[key] for key in pairs if isinstance(row.get(key), str)), None)

    def encoded(self, inputs: Sequence[tuple[str, str | None]]) -> Encoded:
        """As the model is fed them."""
        return encode(self.codec, [text for text, _ in inputs], [pair for _, pair in inputs], self.context)

    def predict(self, inputs: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
        """{"text", "label", "score", "probabilities"}, or "labels" of a model that gives several."""
        encoded = self.encoded(inputs)
        rows = probabilities(run(self.model, encoded, self.runtime), multi=self.multi)
        answers = [self._answer(text, pair, row) for (text, pair), row in zip(inputs, rows, strict=True)]
        for index in encoded.cut:
            answers[index]["cut"] = True
        return answers

    def _answer(self, text: str, pair: str | None, row: npt.NDArray[np.float64]) -> dict[str, Any]:
        said: dict[str, Any] = dict(zip(PAIRED, (text, pair), strict=True)) if pair is not None else {"text": text}
        rounded = {name: round(float(p), 6) for name, p in zip(self.names, row, strict=True)}
        if self.multi:
            chosen = [name for name, p in zip(self.names, row, strict=True) if p >= self.threshold]
            return {**said, "labels": chosen, "probabilities": rounded}
        best = self.names[int(row.argmax())]
        return {**said, "label": best, "score": rounded[best], "probabilities": rounded}

    def show(self, answer: Mapping[str, Any]) -> str:
        """The label, its probability and the text, with tabs between."""
        text = " ".join(str(answer["text"]).split())
        if self.multi:
            return f"{','.join(answer['labels'])}\t{text}"
        return f"{answer['label']}\t{answer['score']:.4f}\t{text}"

    def evaluate(self, data: Sequence[str], config: ClassifyConfig, *, limit: int | None) -> Evaluation:
        """Scores of labelled files. Raises UserError for labels that the model does not know."""
        notes: list[str] = []
        part = labelled.read(data, config.data, name="the data", note=notes.append)
        part.examples = part.examples[:limit]
        if not part.examples:
            raise UserError("there are no rows with a label", hint="the score of nothing is not defined")
        labelled.check_known(part, self.names, of="the model")
        if part.multi and not self.multi and any(len(example.labels) != 1 for example in part.examples):
            raise UserError("the data has several labels a row, and this model gives one")
        made = Labelled.of(part.examples, self.names, self.multi, self.codec, self.context)
        logits, targets = run(self.model, made.encoded, self.runtime), made.targets.numpy()
        if made.encoded.cut:
            notes.append(f"{len(made.encoded.cut):,} texts are longer than {self.context} tokens: they were cut")
        found, lines = assess(logits, targets, self.names, multi=self.multi, threshold=self.threshold)
        rows = probabilities(logits, multi=self.multi)
        predictions = []
        for example, row in zip(part.examples, rows, strict=True):
            right = list(example.labels) if self.multi else example.labels[0]
            answer = self._answer(example.text, example.pair, row)
            given = sorted(answer["labels"]) if self.multi else answer["label"]
            correct = given == (sorted(right) if isinstance(right, list) else right)
            predictions.append({**answer, "expected": right, "correct": correct})
        return Evaluation(scores=found, lines=lines, predictions=predictions, notes=tuple(notes))

    def draw(self, path: Path, scores: Mapping[str, Any]) -> None:
        """The confusion matrix, of one label a text."""
        plot.write(path, np.array(scores["confusion"]), self.names)


APPLICATION = Classify()
