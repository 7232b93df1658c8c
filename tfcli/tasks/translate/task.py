"""Translation: any text into another, learnt from pairs, by an encoder-decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from tfcli.tasks.common.report import Report, duplicates
from tfcli.tasks.common.split import GIVEN, split
from tfcli.tasks.task import Application, Evaluation, Finetuning, Headline, Predictor, Start, settings_of
from tfcli.tasks.translate import new_model, scores
from tfcli.tasks.translate.data import Pair, Pairs
from tfcli.tasks.translate.data import read as read_pairs
from tfcli.tasks.translate.options import NEW_EPOCHS, TranslateConfig, TranslateOptions
from tfcli.text.data_report import Part
from tfcli.text.tokenizers.codec import Codec

KEYS = ("source", "src", "text", "input")
"""Fields of an object whose text is translated, the first that there is."""


@dataclass(frozen=True, slots=True)
class Example:
    """Ids of both sides, each with its end."""

    source: list[int]
    target: list[int]


def encode(codec: Codec, pairs: Sequence[Pair]) -> list[Example]:
    """Ids of pairs."""
    sources = source_ids(codec, [pair.source for pair in pairs])
    targets = codec.encode_batch([pair.target for pair in pairs])
    return [Example(s, [*t, codec.eos_id]) for s, t in zip(sources, targets, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Translation(Finetuning):
    """The task: teacher forcing with label smoothing; the decoder reads the end-of-text id first."""

    train: list[Example]
    val: list[Example]
    held: list[Pair]
    """The texts of ``val``."""
    codec: Codec
    config: TranslateConfig
    runtime: Runtime
    data_report: dict[str, Any] = field(repr=False)
    epochs: float | None = None
    """Passes where no length was asked for."""

    @property
    def size(self) -> int:
        """Pairs to train on."""
        return len(self.train)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of both sides."""
        return np.array([len(e.source) + len(e.target) for e in self.train], dtype=np.int64)

    @property
    def evaluation_tokens(self) -> int:
        """Of both sides, and of those that are translated a second time."""
        return 2 * sum(len(e.source) + len(e.target) for e in self.val)

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """Both sides: ``tokens_BT`` the source, ``targets_BU`` what is learnt, with ``IGNORED`` at its end."""
        return self._batch([self.train[index] for index in indices])

    def _batch(self, chosen: Sequence[Example]) -> Batch:
        sources, targets = [e.source for e in chosen], [e.target for e in chosen]
        return both_sides(sources, targets)

    def count(self, rows: Any) -> int:
        """Tokens of the targets."""
        return int((rows["targets_BU"] != IGNORED).sum())

    def tokens(self, rows: Any) -> int:
        """Tokens of both sides."""
        return int(rows.real_tokens) + self.count(rows)

    def loss(self, model: Transformer, rows: Any, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed smoothed cross-entropy of the targets (Vaswani et al. 2017, 5.4), and their tokens."""
        return self._loss(model, rows, dtype, dropout, self.config.translate.label_smoothing)

    def _loss(
        self, model: Transformer, rows: Batch, dtype: torch.dtype, dropout: float, smoothing: float
    ) -> tuple[Tensor, int]:
        hidden_ND, targets_N = forced(model, rows, start_id=self.codec.eos_id, dtype=dtype, dropout=dropout)
        return model.loss(hidden_ND, targets_N, smoothing=smoothing), len(targets_N)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """val_loss (nats a token, without smoothing) of the held-out part; val_bleu, val_chrf of its first texts."""
        watched = self.config.translate.watch
        texts = translate(model, self.codec, [e.source for e in self.val[:watched]], Beams(width=1))[0]
        found = scores.score(texts, [pair.target for pair in self.held[:watched]])
        return {"val_loss": self._val_loss(model), **{f"val_{name}": value for name, value in found.items()}}

    @torch.inference_mode()
    def _val_loss(self, model: Transformer) -> float:
        total, count = 0.0, 0
        for chosen in by_length([len(e.source) + len(e.target) for e in self.val], device=self.runtime.device):
            rows = self._batch([self.val[index] for index in chosen]).to(self.runtime.device)
            loss, tokens = self._loss(model, rows, self.runtime.dtype, 0.0, 0.0)
            total, count = total + float(loss), count + tokens
        return total / count

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """chrF decides: of few or poor texts BLEU is 0, for better ones as for worse."""
        return Headline(name="chrF", value=scores["val_chrf"], higher_is_better=True)

    def sample(self, model: Transformer, seed: int) -> str | None:
        """A held-out text and its translation."""
        index = seed % len(self.val)
        (text,), _ = translate(model, self.codec, [self.val[index].source], Beams(width=1))
        return f"{self.held[index].source} -> {text}"

    @property
    def about(self) -> dict[str, Any]:
        """How the model's answers are searched for."""
        options = self.config.translate
        return {"tfcli": {"beam": options.beam, "length_penalty": options.length_penalty}}

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """BLEU and chrF of the whole held-out part, by beam search."""
        texts = translate(model, self.codec, [e.source for e in self.val], self._beams)[0]
        return scores.assess(texts, [pair.target for pair in self.held])

    @property
    def _beams(self) -> Beams:
        return Beams(width=self.config.translate.beam, length_penalty=self.config.translate.length_penalty)


def translate(
    model: Transformer, codec: Codec, sources: Sequence[Sequence[int]], beams: Beams
) -> tuple[list[str], list[Answer]]:
    """The text of the best answer to each source, and the answers."""
    found = answers(model, sources, beams, start_id=codec.eos_id, eos_ids=codec.eos_ids)
    return [codec.decode(answer.ids) for answer in found], found


class Translate(Application):
    """The application."""

    name = "translate"
    config = TranslateConfig
    sizes_models = True

    def fresh(
        self, specs: Sequence[str], config: TranslateConfig, runtime: Runtime, note: Callable[[str], None]
    ) -> tuple[Transformer, Codec]:
        """A new model for these files, and its tokenizer, of the part that is trained on."""
        return new_model.make(_parts(specs, config)[0].pairs, config, runtime, note)

    def prepare(self, start: Start) -> Translation:
        """Read, split and encode the pairs. Raises UserError for a model that is no encoder-decoder."""
        config: TranslateConfig = start.config
        scores.check()
        if not start.model.config.encoder_depth:
            raise UserError(
                "translate needs an encoder-decoder, and this model is none",
                hint="begin a new one: --from-scratch, or finetune an mBART, or a model that translate made",
            )
        train, val, how = _parts(start.data, config)
        context = min(config.data.context or start.model.config.context, start.model.config.context)
        fitting = [_fitting(part, start.codec, context) for part in (train, val)]
        (_, learnt), (held, checked) = fitting
        if not learnt or not checked:
            raise UserError(f"no pair fits into a context of {context} tokens", hint="train with a larger context")
        data_report = _data_report(start.codec, train, val, fitting, how, context)
        for line in _lines(data_report, train.report):
            start.note(line)
        return Translation(
            train=learnt,
            val=checked,
            held=held,
            codec=start.codec,
            config=config,
            runtime=start.runtime,
            data_report=data_report,
            epochs=None if start.about else NEW_EPOCHS,
        )

    def predictor(
        self, model: Transformer, codec: Codec, about: Mapping[str, Any], runtime: Runtime
    ) -> TranslatePredictor:
        """Of an encoder-decoder."""
        return TranslatePredictor(model, codec, about)


def _parts(specs: Sequence[str], config: TranslateConfig) -> tuple[Pairs, Pairs, Mapping[str, Any]]:
    """What is trained on, what is held out, and how that was chosen; one report is of both."""
    report = Report(strict=config.data.strict, part="both" if config.data.val is None else "train")
    whole = read_pairs(specs, config.data, report)
    if config.data.val is not None:
        report.part = "val"
        return whole, read_pairs([config.data.val], config.data, report), GIVEN
    made = split(len(whole.pairs), config.data.val_fraction, config.seed, things="pairs", report=report)
    train, val = (Pairs(pairs=part, hash=whole.hash, report=report) for part in made.of(whole.pairs))
    return train, val, made.how


def _fitting(part: Pairs, codec: Codec, context: int) -> tuple[list[Pair], list[Example]]:
    """Pairs whose sides both fit into the context; others are counted in the report."""
    kept, examples = [], []
    for pair, example in zip(part.pairs, encode(codec, part.pairs), strict=True):
        if max(len(example.source), len(example.target)) <= context:
            kept.append(pair)
            examples.append(example)
        else:
            part.report.fault(f"pairs longer than {context} tokens, left out", pair.where[0])
    return kept, examples


def _data_report(
    codec: Codec,
    train: Pairs,
    val: Pairs,
    fitting: Sequence[tuple[list[Pair], list[Example]]],
    how: Mapping[str, Any],
    context: int,
) -> dict[str, Any]:
    """data.json."""
    known = {pair.source for pair in train.pairs}
    return train.report.data_report(
        "translate",
        "pairs",
        (
            each
            for pairs, examples in fitting
            for pair, e in zip(pairs, examples, strict=True)
            for each in _read(pair, e)
        ),
        split=how,
        train=_summary(fitting[0][1]),
        val=_summary(fitting[1][1]),
        twice=duplicates(train.pairs, val.pairs),
        tokenizer_hash=codec.hash,
        details={"context": context, "sources_across_splits": sum(pair.source in known for pair in val.pairs)},
        content_hash=train.hash + ("" if how != GIVEN else val.hash),
    )


def _read(pair: Pair, example: Example) -> list[tuple[str, int]]:
    """Where a pair was read, and its tokens there."""
    sides = len(example.source), len(example.target)
    return [(pair.where[0], sum(sides))] if len(pair.where) == 1 else list(zip(pair.where, sides, strict=True))


def _summary(examples: Sequence[Example]) -> Part:
    sides = {"source": [len(e.source) for e in examples], "target": [len(e.target) for e in examples]}
    return Part(
        documents=len(examples),
        tokens=sum(map(sum, sides.values())),
        details={side: {"tokens": sum(n), "longest": max(n), "median": int(np.median(n))} for side, n in sides.items()},
    )


def _lines(data_report: Mapping[str, Any], report: Report) -> list[str]:
    train, val, twice = data_report["train"], data_report["val"], data_report["details"]["sources_across_splits"]
    lines = [
        f"data: {train['documents']:,} pairs to train on, {val['documents']:,} held out; "
        f"{train['source']['median']} and {train['target']['median']} tokens (medians)",
        *report.lines(),
    ]
    if twice:
        lines.append(f"{twice:,} held-out sources are in the training part too")
    return lines


class TranslatePredictor(Predictor):
    """Translations of texts; ``beams`` says how they are searched for."""

    key = "source"

    def __init__(self, model: Transformer, codec: Codec, about: Mapping[str, Any]) -> None:
        if not model.config.encoder_depth:
            raise UserError("this model is no encoder-decoder", hint="make one: --task translate --from-scratch")
        self.model, self.codec = model.requires_grad_(False), codec
        ours = settings_of(about)
        usual = TranslateOptions()
        penalty = float(ours.get("length_penalty", usual.length_penalty))
        self.beams = Beams(width=int(ours.get("beam", usual.beam)), length_penalty=penalty)

    def search(self, width: int) -> None:
        """Search with so many beams; 1 is greedy."""
        self.beams = replace(self.beams, width=width)

    def plain(self, line: str) -> str:
        """A line is a text."""
        return line

    def parse(self, row: dict[str, Any]) -> str:
        """The text under the first of ``KEYS`` that there is."""
        text = next((row[key] for key in KEYS if isinstance(row.get(key), str)), None)
        if text is None:
            raise UserError('has no "source" with a string')
        return text

    def predict(self, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """{"source", "translation", "score"}: log P(Y) / |Y|^alpha. Of an empty text nothing; a long one is cut."""
        sources = source_ids(self.codec, inputs)
        asked = [index for index, text in enumerate(inputs) if text.strip()]
        context = self.model.config.context
        cut = {index for index in asked if len(sources[index]) > context}
        rows = [[*sources[i][: context - 1], sources[i][-1]] if i in cut else sources[i] for i in asked]
        texts, found = translate(self.model, self.codec, rows, self.beams)
        said: list[dict[str, Any]] = [{"source": text, "translation": "", "score": 0.0} for text in inputs]
        for index, text, answer in zip(asked, texts, found, strict=True):
            said[index] |= {"translation": text, "score": round(answer.score, 6)}
            if index in cut:
                said[index]["cut"] = True
        return said

    def show(self, answer: Mapping[str, Any]) -> str:
        """The translation, on one line."""
        return " ".join(str(answer["translation"]).split("\n"))

    def evaluate(self, data: Sequence[str], config: TranslateConfig, *, limit: int | None) -> Evaluation:
        """BLEU and chrF of pairs, and every translation."""
        scores.check()
        part = read_pairs(data, config.data)
        pairs = part.pairs[:limit]
        said = self.predict([pair.source for pair in pairs])
        found, lines = scores.assess([row["translation"] for row in said], [pair.target for pair in pairs])
        predictions = [{**row, "expected": pair.target} for row, pair in zip(said, pairs, strict=True)]
        cut = sum("cut" in row for row in said)
        notes = [*part.report.lines(), *([f"{cut:,} texts were longer than the context: cut"] if cut else [])]
        return Evaluation(scores=found, lines=lines, predictions=predictions, notes=tuple(notes))


APPLICATION = Translate()
