"""A model that labels texts: its answers for people and programs, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.errors import UserError
from tfcli.infer.batches import by_length
from tfcli.model import heads
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.classify import data as labelled
from tfcli.tasks.classify import plot, scores
from tfcli.tasks.classify.data import Example
from tfcli.tasks.classify.options import ClassifyConfig
from tfcli.tasks.common.batch import Batch, head_logits, mask, pad
from tfcli.tasks.common.report import Report
from tfcli.tasks.task import Evaluation, Predictor, label_names, settings_of
from tfcli.text.tokenizers.codec import Codec

SHOWN = 40
"""Maximum labels of a table for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Texts as ids, for a model to read."""

    ids: list[list[int]]
    types: list[list[int]]
    cut: list[int]
    """Indices of texts that were truncated to the model's context."""

    def batch(self, chosen: Sequence[int], more: Mapping[str, Tensor]) -> Batch:
        """Return some of the texts as a batch, with ``more`` tensors."""
        rows = [self.ids[i] for i in chosen]
        tensors = {"tokens_BT": pad(rows), "mask_BT": mask(rows), "types_BT": pad([self.types[i] for i in chosen])}
        return Batch({**tensors, **more}, padded=tuple(tensors))


def encode(codec: Codec, texts: Sequence[str], pairs: Sequence[str | None], context: int) -> Encoded:
    """Encode texts, or pairs with the suffix between, to at most ``context`` ids; the longer text is truncated first.

    For BERT ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]`` with types 0 and 1 (Devlin et al. 2019, 3). Where a
    tokenizer has no suffix, the end-of-text id is between the two.
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
        cut += [index] if len(a) + len(b or ()) > room else []
        if b is None:
            head, tail = [*prefix, *a[:room], *suffix] or [codec.eos_id], []
        else:
            keep_b = max(min(len(b), room // 2), min(len(b), room - len(a)))
            head, tail = [*prefix, *a[: room - keep_b], *between], [*b[:keep_b], *suffix]
        ids.append(head + tail)
        types.append([0] * len(head) + [1] * len(tail))
    return Encoded(ids=ids, types=types, cut=cut)


@torch.inference_mode()
def run(model: Transformer, encoded: Encoded, runtime: Runtime) -> npt.NDArray[np.float32]:
    """Return the logits (N, labels) of texts, in their order; texts of similar length are batched together."""
    head = heads.of(model)
    assert head is not None
    out = np.empty((len(encoded.ids), head.labels), np.float32)
    for chosen in by_length([len(row) for row in encoded.ids], device=runtime.device):
        batch = encoded.batch(chosen, {}).to(runtime.device)
        out[chosen] = head_logits(model, batch, dtype=runtime.dtype).cpu().numpy()
    return out


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Encoded examples with targets: (N,) of one label each, or (N, labels) of 0 and 1."""

    examples: Sequence[Example]
    encoded: Encoded
    targets: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], names: Sequence[str], multi: bool, codec: Codec, context: int) -> Labelled:
        """Encode examples and number their labels."""
        number = {name: index for index, name in enumerate(names)}
        if multi:
            targets = torch.zeros(len(examples), len(names))
            for row, example in enumerate(examples):
                targets[row, [number[label] for label in example.labels]] = 1.0
        else:
            targets = torch.tensor([number[example.labels[0]] for example in examples], dtype=torch.int64)
        encoded = encode(codec, [e.text for e in examples], [e.pair for e in examples], context)
        return cls(examples=examples, encoded=encoded, targets=targets)


def probabilities(logits: npt.NDArray[np.float32], *, multi: bool) -> npt.NDArray[np.float64]:
    """Return the probabilities (N, labels): a softmax, or with several labels per text a sigmoid each."""
    x = torch.from_numpy(logits).double()
    return (torch.sigmoid(x) if multi else torch.softmax(x, dim=-1)).numpy()


def score(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[Any], *, multi: bool, threshold: float
) -> dict[str, float]:
    """Return the scores of logits (N, labels)."""
    if multi:
        return scores.multi(targets > 0, probabilities(logits, multi=True) >= threshold)
    return scores.single(targets, logits.argmax(axis=1), logits.shape[1])


def assess(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[Any], names: Sequence[str], *, multi: bool, threshold: float
) -> tuple[dict[str, Any], list[str]]:
    """Return scores with their intervals, and tables for people."""
    numbers: dict[str, Any] = dict(score(logits, targets, multi=multi, threshold=threshold))
    if multi:
        true, predicted = targets > 0, probabilities(logits, multi=True) >= threshold
    else:
        true, predicted = np.eye(len(names), dtype=bool)[targets], np.eye(len(names), dtype=bool)[logits.argmax(axis=1)]
    classes, bounds = scores.by_class(true, predicted, names), scores.intervals(true, predicted, multi=multi)
    lines = [
        f"{name:9} {numbers[name]:.4f}  (95 % interval {bounds[name][0]:.4f} to {bounds[name][1]:.4f})"
        for name in ("accuracy", "macro_f1")
    ]
    lines += ["", *scores.report(classes if len(classes) <= SHOWN else sorted(classes, key=lambda c: c.f1)[:SHOWN])]
    if len(classes) > SHOWN:
        lines.append(f"(the {SHOWN} labels with the lowest F1 of {len(classes)})")
    numbers |= {"examples": len(logits), "interval": bounds}
    numbers["labels"] = {
        c.label: {"precision": c.precision, "recall": c.recall, "f1": c.f1, "examples": c.support} for c in classes
    }
    if not multi:
        matrix = scores.confusion(targets, logits.argmax(axis=1), len(names))
        lines += ["", *scores.table(matrix, names)]
        numbers["confusion"] = matrix.tolist()
    return numbers, lines


class ClassifyPredictor(Predictor):
    """A finetuned model that labels texts: the ``Predictor`` of ``classify``."""

    def __init__(self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any], runtime: Runtime) -> None:
        head = heads.of(model)
        if head is None or head.kind != "sequence" or not head.labels:
            raise UserError("this model has no head that classifies", hint="finetune it with --task classify")
        self.model, self.codec, self.runtime = model, codec, runtime
        self.names = label_names(hf_config)
        if len(self.names) != head.labels:
            self.names = [f"LABEL_{index}" for index in range(head.labels)]
        self.multi = hf_config.get("problem_type") == "multi_label_classification"
        settings = settings_of(hf_config)
        self.context = min(int(settings.get("context", model.config.context)), model.config.context)
        self.threshold = float(settings.get("threshold", 0.5))
        named = {key: settings.get(key) for key in ("text_key", "pair_key")}
        self.text_keys, self.pair_keys = ([name] if isinstance(name, str) else [] for name in named.values())
        self.key = next(iter(self.text_keys), "text")

    def plain(self, line: str) -> tuple[str, str | None]:
        """Parse a line as a text."""
        return line, None

    def parse(self, row: dict[str, Any]) -> tuple[str, str | None]:
        """Parse the text, and the second where there is one, under the names that training knows."""
        text = next((row[key] for key in (*self.text_keys, *labelled.TEXTS) if isinstance(row.get(key), str)), None)
        if text is None:
            raise UserError(f'has no "{self.key}" with a string')
        pairs = (*self.pair_keys, *labelled.PAIRS)
        return text, next((row[key] for key in pairs if isinstance(row.get(key), str)), None)

    def predict(self, inputs: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
        """Return {"text", "label", "score", "probabilities"}, or "labels" of a model that gives several."""
        encoded = encode(self.codec, [text for text, _ in inputs], [pair for _, pair in inputs], self.context)
        rows = probabilities(run(self.model, encoded, self.runtime), multi=self.multi)
        answers = [self._answer(text, pair, row) for (text, pair), row in zip(inputs, rows, strict=True)]
        for index in encoded.cut:
            answers[index]["cut"] = True
        return answers

    def _answer(self, text: str, pair: str | None, row: npt.NDArray[np.float64]) -> dict[str, Any]:
        texts = {"text": text} if pair is None else {"text": text, "pair": pair}
        rounded = {name: round(float(p), 6) for name, p in zip(self.names, row, strict=True)}
        if self.multi:
            chosen = [name for name, p in zip(self.names, row, strict=True) if p >= self.threshold]
            return {**texts, "labels": chosen, "probabilities": rounded}
        best = self.names[int(row.argmax())]
        return {**texts, "label": best, "score": rounded[best], "probabilities": rounded}

    def show(self, answer: Mapping[str, Any]) -> str:
        """Return the label, its probability and the text, with tabs between."""
        text = " ".join(str(answer["text"]).split())
        if self.multi:
            return f"{','.join(answer['labels'])}\t{text}"
        return f"{answer['label']}\t{answer['score']:.4f}\t{text}"

    def evaluate(self, data: Sequence[str], config: ClassifyConfig, *, limit: int | None) -> Evaluation:
        """Score labelled files. Raises UserError for labels that the model does not have."""
        notes: list[str] = []
        report = Report.of(config.data)
        part = labelled.read(data, config.data, name="the data", note=notes.append, report=report)
        part.examples = part.examples[:limit]
        if not part.examples:
            raise UserError("there are no rows with a label", hint="the score of nothing is not defined")
        labelled.check_known(part, self.names, of="the model")
        if part.multi and not self.multi and any(len(example.labels) != 1 for example in part.examples):
            raise UserError("the data has several labels a row, and this model gives one")
        targeted = Labelled.of(part.examples, self.names, self.multi, self.codec, self.context)
        logits, targets = run(self.model, targeted.encoded, self.runtime), targeted.targets.numpy()
        report.note("texts longer than the context, cut", len(targeted.encoded.cut))
        numbers, lines = assess(logits, targets, self.names, multi=self.multi, threshold=self.threshold)
        rows = probabilities(logits, multi=self.multi)
        predictions = []
        for example, row in zip(part.examples, rows, strict=True):
            right = list(example.labels) if self.multi else example.labels[0]
            answer = self._answer(example.text, example.pair, row)
            given = sorted(answer["labels"]) if self.multi else answer["label"]
            correct = given == (sorted(right) if isinstance(right, list) else right)
            predictions.append({**answer, "expected": right, "correct": correct})
        return Evaluation(scores=numbers, lines=lines, predictions=predictions, notes=(*notes, *report.lines()))

    def draw(self, path: Path, scores: Mapping[str, Any]) -> None:
        """Draw the confusion matrix, of one label per text."""
        plot.write(path, np.array(scores["confusion"]), self.names)
