"""Translation, or any other mapping of texts to texts: an encoder-decoder trained on pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.errors import UserError
from tfcli.infer.batches import by_length
from tfcli.infer.beam import Answer, Beams, answers
from tfcli.infer.engine import source_ids
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Batch
from tfcli.tasks.common.forcing import IGNORED, both_sides, forced
from tfcli.tasks.common.report import Examples, Report
from tfcli.tasks.common.split import Halves, halves
from tfcli.tasks.task import Application, Evaluation, Headline, OverExamples, Predictor, Start, settings_of
from tfcli.tasks.translate import new_model, scores
from tfcli.tasks.translate.data import Pair, read
from tfcli.tasks.translate.options import NEW_EPOCHS, TranslateConfig, TranslateOptions
from tfcli.text.tokenizers.codec import Codec

KEYS = ("source", "src", "text", "input")
"""Fields of an object that may hold the text to translate; the first present is taken."""


@dataclass(frozen=True, slots=True)
class Example:
    """Ids of both sides, each with its end-of-text id."""

    source: list[int]
    target: list[int]

    def __len__(self) -> int:
        return len(self.source) + len(self.target)


def encode(codec: Codec, pairs: Sequence[Pair]) -> list[Example]:
    """Encode pairs."""
    sources = source_ids(codec, [pair.source for pair in pairs])
    targets = codec.encode_batch([pair.target for pair in pairs])
    return [Example(s, [*t, codec.eos_id]) for s, t in zip(sources, targets, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Translation(OverExamples):
    """Pairs to train on, by teacher forcing with label smoothing; the decoder reads the end-of-text id first."""

    train: list[Example]
    val: list[Example]
    held: list[Pair]
    """Texts of ``val``."""
    codec: Codec
    config: TranslateConfig
    runtime: Runtime
    data_report: dict[str, Any] = field(repr=False)
    epochs: float | None = None

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of both sides of each pair."""
        return np.array([len(example) for example in self.train], dtype=np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Number of tokens of both sides, counted twice: for the loss, and for the translations."""
        return 2 * sum(map(len, self.val))

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """Return both sides, as ``tokens_BT`` and ``targets_BU``; the same in every epoch."""
        return _batch([self.train[index] for index in indices])

    def count(self, rows: Batch) -> int:
        """Return the number of target tokens."""
        return int((rows["targets_BU"] != IGNORED).sum())

    def tokens(self, rows: Batch) -> int:
        """Return the number of tokens of both sides."""
        return rows.real_tokens + self.count(rows)

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Return the summed smoothed cross-entropy of the targets (Vaswani et al. 2017, 5.4), and their number."""
        return self._loss(model, rows, dtype, dropout, self.config.translate.label_smoothing)

    def _loss(
        self, model: Transformer, rows: Batch, dtype: torch.dtype, dropout: float, smoothing: float
    ) -> tuple[Tensor, int]:
        hidden_ND, targets_N = forced(model, rows, start_id=self.codec.eos_id, dtype=dtype, dropout=dropout)
        return model.loss(hidden_ND, targets_N, smoothing=smoothing), len(targets_N)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Return val_loss (nats per token, unsmoothed) of the held-out part, BLEU and chrF of its first texts."""
        watched = self.config.translate.watch
        texts = translate(model, self.codec, [e.source for e in self.val[:watched]], Beams(width=1))[0]
        numbers = scores.score(texts, [pair.target for pair in self.held[:watched]])
        return {"val_loss": self._val_loss(model), **{f"val_{name}": value for name, value in numbers.items()}}

    @torch.inference_mode()
    def _val_loss(self, model: Transformer) -> float:
        total, count = 0.0, 0
        for chosen in by_length(list(map(len, self.val)), device=self.runtime.device):
            rows = _batch([self.val[index] for index in chosen]).to(self.runtime.device)
            loss, tokens = self._loss(model, rows, self.runtime.dtype, 0.0, 0.0)
            total, count = total + float(loss), count + tokens
        return total / count

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Return chrF: BLEU is often 0 for few or poor texts, and tells none apart."""
        return Headline(name="chrF", value=scores["val_chrf"], higher_is_better=True)

    def sample(self, model: Transformer, seed: int) -> str | None:
        """Return a held-out text and its translation."""
        index = seed % len(self.val)
        (text,), _ = translate(model, self.codec, [self.val[index].source], Beams(width=1))
        return f"{self.held[index].source} -> {text}"

    @property
    def hf_config(self) -> dict[str, Any]:
        """Settings of the beam search."""
        options = self.config.translate
        return {"tfcli": {"beam": options.beam, "length_penalty": options.length_penalty}}

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Return BLEU and chrF of the whole held-out part, by beam search."""
        beams = Beams(width=self.config.translate.beam, length_penalty=self.config.translate.length_penalty)
        texts = translate(model, self.codec, [e.source for e in self.val], beams)[0]
        return scores.assess(texts, [pair.target for pair in self.held])


def _batch(chosen: Sequence[Example]) -> Batch:
    return both_sides([example.source for example in chosen], [example.target for example in chosen])


def translate(
    model: Transformer, codec: Codec, sources: Sequence[Sequence[int]], beams: Beams
) -> tuple[list[str], list[Answer]]:
    """Return the text of the best answer to each source, and the answers."""
    best = answers(model, sources, beams, start_id=codec.eos_id, eos_ids=codec.eos_ids)
    return [codec.decode(answer.ids) for answer in best], best


class Translate(Application):
    """``--task translate``."""

    name = "translate"
    config = TranslateConfig
    sizes_models = True

    def fresh(
        self, specs: Sequence[str], config: TranslateConfig, runtime: Runtime, note: Callable[[str], None]
    ) -> tuple[Transformer, Codec, tuple[Report, Halves[Pair, str]]]:
        """Return a new model and its tokenizer for the training part of these files, and what was read of them."""
        report = Report.of(config.data)
        data = _halves(specs, config, report)
        return *new_model.make(data.train, config, runtime, note), (report, data)

    def prepare(self, start: Start) -> Translation:
        """Read, split and encode the pairs. Raises UserError for a model that is no encoder-decoder."""
        config: TranslateConfig = start.config
        scores.check()
        if not start.model.config.encoder_depth:
            raise UserError(
                "translate needs an encoder-decoder, and this model is none",
                hint="train a new one with --from-scratch, or finetune an mBART, or a model that translate made",
            )
        report, data = start.read or (Report.of(config.data), None)
        data = data or _halves(start.data, config, report)
        context = min(config.data.context or start.model.config.context, start.model.config.context)
        train_pairs, train = _fitting(data.train, start.codec, context, report)
        val_pairs, val = _fitting(data.held_out, start.codec, context, report)
        if not train or not val:
            raise UserError(f"no pair fits into a context of {context} tokens", hint="train with a larger context")
        known = {pair.source for pair in data.train}
        repeated = sum(pair.source in known for pair in data.held_out)
        data_report = report.data_report(
            self.name, "pairs", _summary(train_pairs, train, data.train), _summary(val_pairs, val, data.held_out),
            split=data.how, tokenizer_hash=start.codec.hash,
            details={"context": context, "sources_across_splits": repeated}, content_hash="".join(data.infos),
        )  # fmt: skip
        medians = [data_report["train"][side]["median"] for side in ("source", "target")]
        counts = f"{len(train):,} pairs to train on, {len(val):,} held out"
        start.note(f"data: {counts}; {medians[0]} and {medians[1]} tokens (medians)")
        for line in report.lines():
            start.note(line)
        if repeated:
            start.note(f"{repeated:,} held-out sources are in the training part too")
        return Translation(
            train=train, val=val, held=val_pairs, codec=start.codec, config=config, runtime=start.runtime,
            data_report=data_report, epochs=None if start.hf_config else NEW_EPOCHS,
        )  # fmt: skip

    def predictor(
        self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any], runtime: Runtime
    ) -> TranslatePredictor:
        """Return the predictor of an encoder-decoder."""
        return TranslatePredictor(model, codec, hf_config)


def _halves(specs: Sequence[str], config: TranslateConfig, report: Report) -> Halves[Pair, str]:
    """Return the pairs to train on and those held out, and the hashes of their files."""
    return halves(specs, config, report, lambda each: read(each, config.data, report), things="pairs")


def _fitting(pairs: Sequence[Pair], codec: Codec, context: int, report: Report) -> tuple[list[Pair], list[Example]]:
    """Return the pairs whose sides both fit into the context; the others are counted in the report."""
    kept, examples = [], []
    for pair, example in zip(pairs, encode(codec, pairs), strict=True):
        if max(len(example.source), len(example.target)) <= context:
            kept.append(pair)
            examples.append(example)
        else:
            report.fault(f"pairs longer than {context} tokens, left out", pair.where[0])
    return kept, examples


def _summary(pairs: Sequence[Pair], examples: Sequence[Example], whole: Sequence[Pair]) -> Examples:
    """Return the figures of the pairs that fit into the context; duplicates are counted among all of them."""
    read: list[tuple[str, int]] = []
    for pair, example in zip(pairs, examples, strict=True):
        sides = len(example.source), len(example.target)
        read += [(pair.where[0], sum(sides))] if len(pair.where) == 1 else zip(pair.where, sides, strict=True)
    lengths = {"source": [len(e.source) for e in examples], "target": [len(e.target) for e in examples]}
    return Examples(
        documents=len(examples),
        read=read,
        keys=whole,
        details={
            side: {"tokens": sum(n), "longest": max(n), "median": int(np.median(n))} for side, n in lengths.items()
        },
    )


class TranslatePredictor(Predictor):
    """A model that translates: the ``Predictor`` of ``translate``; ``beams`` are the settings of its search."""

    key = "source"

    def __init__(self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any]) -> None:
        if not model.config.encoder_depth:
            raise UserError(
                "this model is not an encoder-decoder", hint="train one with --task translate --from-scratch"
            )
        self.model, self.codec = model.requires_grad_(False), codec
        ours = settings_of(hf_config)
        usual = TranslateOptions()
        penalty = float(ours.get("length_penalty", usual.length_penalty))
        self.beams = Beams(width=int(ours.get("beam", usual.beam)), length_penalty=penalty)

    def search(self, width: int) -> None:
        """Set the beam width; 1 is greedy."""
        self.beams = replace(self.beams, width=width)

    def plain(self, line: str) -> str:
        """Parse a line as a text."""
        return line

    def parse(self, row: dict[str, Any]) -> str:
        """Parse the text under the first of ``KEYS`` that is present."""
        text = next((row[key] for key in KEYS if isinstance(row.get(key), str)), None)
        if text is None:
            raise UserError('has no "source" with a string')
        return text

    def predict(self, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """Return {"source", "translation", "score"}, log P(Y) / |Y|^alpha; "" for an empty text; long ones are cut."""
        sources = source_ids(self.codec, inputs)
        asked = [index for index, text in enumerate(inputs) if text.strip()]
        context = self.model.config.context
        cut = {index for index in asked if len(sources[index]) > context}
        rows = [[*sources[i][: context - 1], sources[i][-1]] if i in cut else sources[i] for i in asked]
        texts, best = translate(self.model, self.codec, rows, self.beams)
        answers: list[dict[str, Any]] = [{"source": text, "translation": "", "score": 0.0} for text in inputs]
        for index, text, answer in zip(asked, texts, best, strict=True):
            answers[index] |= {"translation": text, "score": round(answer.score, 6)}
            if index in cut:
                answers[index]["cut"] = True
        return answers

    def show(self, answer: Mapping[str, Any]) -> str:
        """Return the translation on one line."""
        return " ".join(str(answer["translation"]).split("\n"))

    def evaluate(self, data: Sequence[str], config: TranslateConfig, *, limit: int | None) -> Evaluation:
        """Return BLEU and chrF of pairs, and every translation."""
        scores.check()
        report = Report.of(config.data)
        pairs = read(data, config.data, report)[0][:limit]
        answers = self.predict([pair.source for pair in pairs])
        numbers, lines = scores.assess([row["translation"] for row in answers], [pair.target for pair in pairs])
        predictions = [{**row, "expected": pair.target} for row, pair in zip(answers, pairs, strict=True)]
        report.note("texts longer than the context, cut", sum("cut" in row for row in answers))
        return Evaluation(scores=numbers, lines=lines, predictions=predictions, notes=tuple(report.lines()))


APPLICATION = Translate()
