"""Predict and evaluate: a model of any kind applied to texts, and scored on text or labelled data."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tfcli import disk
from tfcli.config.options import WINDOW_TOKENS, DataOptions
from tfcli.config.resolve import known_keys, resolve
from tfcli.errors import RunError, UserError, unknown
from tfcli.formats import lstm
from tfcli.formats.hf.heads import Loaded
from tfcli.formats.hf.stored import LSTM
from tfcli.formats.open import Opened, open_path
from tfcli.infer import score
from tfcli.infer.engine import Engine
from tfcli.model.lstm import Lstm
from tfcli.model.quant.quantize import Quantization, quantize_model
from tfcli.model.transformer import Transformer
from tfcli.objectives import masked
from tfcli.objectives.fill import FillPredictor
from tfcli.runtime import Machine, Runtime
from tfcli.tasks.applications import APPLICATIONS, KINDS, application
from tfcli.tasks.common.options import check
from tfcli.tasks.task import Evaluation, Predictor
from tfcli.text.corpus.encoding import Encoded, encode
from tfcli.text.read import hf_data
from tfcli.text.read.sources import Chunk, find, read
from tfcli.text.tokenizers.codec import Codec
from tfcli.train import notebook

Note: TypeAlias = Callable[[str], None]
EMBED, FILL = "embed", "fill"
"""Tasks beside those that a model is finetuned for: texts as vectors, words for [MASK]."""
WINDOW = 1024
"""Inputs that are held at once."""


def _silent(line: str) -> None:
    return


def predict(
    model: str | Path | Opened,
    texts: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]],
    *,
    task: str | None = None,
    beam: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    on_note: Note | None = None,
) -> list[dict[str, Any]]:
    """Answer each text by the model's task: one object for each, in their order, as ``tfcli predict`` prints them.

    A text is a string, or an object with the fields that the task reads, such as {"question": ..., "context": ...}.
    ``task`` defaults to the one that the model was finetuned for, else "embed": vectors of length 1, computed in fp32
    unless ``precision`` says otherwise; "fill" gives words for each [MASK]. ``beam`` is the width of a translation's
    search. An answer has "cut" where its text was longer than the model's context. ``device``, ``precision``,
    ``threads`` and ``quantize`` as in ``load``. Raises UserError for a task that the model does not have, and for a
    text that is none.

    To ask a loaded model again, or to answer a stream of texts, use ``TaskModel``.

    Example:
        >>> import tfcli
        >>> [answer] = tfcli.predict("runs/reviews", ["A lovely film."])
        >>> sorted(answer)
        ['label', 'probabilities', 'score', 'text']
        >>> [len(answer["embedding"]) for answer in tfcli.predict("runs/first", ["a king", "a well"], task="embed")]
        [32, 32]
    """
    machine = Machine(device=device, precision=precision, threads=threads, quantize=quantize)
    loaded = TaskModel.load(model, task=task, beam=beam, machine=machine, on_note=on_note)
    rows = [texts] if isinstance(texts, str | Mapping) else texts
    total = len(rows) if isinstance(rows, Sequence) else 0
    tell = notebook.counter("texts")
    answers: list[dict[str, Any]] = []
    for answer in loaded.predict(loaded.parsed(rows)):
        answers.append(answer)
        if len(answers) % WINDOW == 0 or len(answers) == total:
            tell(len(answers), total)
    return answers


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A model that is loaded and answers one task, as often as it is asked.

    Example:
        >>> from tfcli.apply import TaskModel
        >>> model = TaskModel.load("runs/reviews")
        >>> model.task
        'classify'
        >>> for answer in model.predict(model.parsed(["Lovely.", "Dull."])):
        ...     print(answer["text"])
        Lovely.
        Dull.
    """

    task: str
    predictor: Predictor | FillPredictor | EmbedPredictor

    @classmethod
    def load(
        cls,
        model: str | Path | Opened,
        *,
        task: str | None = None,
        beam: int | None = None,
        machine: Machine | None = None,
        on_note: Note | None = None,
    ) -> TaskModel:
        """The model at a path, ready for ``task``; ``on_note`` is told the device. Raises UserError as ``predict``."""
        opened = model if isinstance(model, Opened) else open_path(model)
        machine, note = machine or Machine(), on_note or _silent
        name = choose_task(opened, task)
        predictor = load_predictor(opened, name, machine, note)
        if beam is not None:
            search = getattr(predictor, "search", None)
            if search is None:
                raise UserError("--beam goes with models that translate", hint=f"this one answers the task {name}")
            search(beam)
        return cls(task=name, predictor=predictor)

    def parsed(self, texts: Iterable[str | Mapping[str, Any]]) -> Iterator[Any]:
        """What ``predict`` takes, of strings and objects. Raises UserError for one that the task does not read."""
        for number, text in enumerate(texts, 1):
            try:
                yield self.predictor.plain(text) if isinstance(text, str) else self.predictor.parse(dict(text))
            except UserError as error:
                raise UserError(f"text {number} {error.message}", hint=error.hint) from None

    def predict(self, inputs: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The answer of each input as the predictor parsed it, in order; of any number in bounded memory."""
        inputs = iter(inputs)
        while window := list(islice(inputs, WINDOW)):
            yield from self.predictor.predict(window)


class EmbedPredictor:
    """Vectors of texts: the mean of the last hidden states, of length 1."""

    key = "text"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def plain(self, line: str) -> str:
        """A line is a text."""
        return line

    def parse(self, row: dict[str, Any]) -> str:
        """The "text" of an object."""
        text = row.get(self.key)
        if not isinstance(text, str):
            raise UserError(f'has no "{self.key}" with a string')
        return text

    def predict(self, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """{"text", "embedding"}, with "cut" where the text was longer than the context."""
        encoded = [self.engine.fitted(text) for text in inputs]
        vectors = self.engine.embed(encoded)
        return [
            {"text": text, "embedding": [round(float(number), 7) for number in vector]}
            | ({"cut": True} if one.cut else {})
            for text, vector, one in zip(inputs, vectors, encoded, strict=True)
        ]

    def show(self, answer: Mapping[str, Any]) -> str:
        """The text, a tab and the numbers of its vector."""
        return f"{' '.join(answer['text'].split())}\t{' '.join(map(str, answer['embedding']))}"


def task_of(model: Opened) -> str | None:
    """The task that a model was finetuned for; None for none and for files.

    Raises UserError where there is nothing.
    """
    ours = model.hf_config.get("tfcli")
    name = ours.get("task") if isinstance(ours, dict) else None
    name = name or KINDS.get(model.head or "")
    return name if isinstance(name, str) and name in APPLICATIONS else None


def choose_task(model: Opened, asked: str | None) -> str:
    """The task that is asked for, else what the model was finetuned for, else "embed".

    Raises UserError for a task that it does not have.
    """
    finetuned = task_of(model)
    name = asked or finetuned or EMBED
    if name in (finetuned, EMBED, FILL):
        return name
    if name in APPLICATIONS:
        path = model.path
        raise UserError(f"{path} was not finetuned for {name}", hint=f"tfcli finetune {path} DATA --task {name}")
    raise unknown("task", name, (EMBED, FILL, *APPLICATIONS))


def load_predictor(
    model: Opened, task: str, machine: Machine, note: Note
) -> Predictor | FillPredictor | EmbedPredictor:
    """The model, ready to answer a task of its own. Raises UserError as ``Opened.load_whole`` does."""
    if task == EMBED:
        machine = replace(machine, precision=machine.precision or "fp32")
        runtime = _runtime(machine, note)
        return EmbedPredictor(Engine(*model.load(runtime=runtime, quantize=machine.quantize), runtime))
    loaded, runtime = _loaded(model, machine, note)
    if task == FILL:
        return FillPredictor(loaded.model, loaded.codec)
    return application(task).predictor(loaded.model, loaded.codec, loaded.hf_config, runtime)


def _loaded(model: Opened, machine: Machine, note: Note) -> tuple[Loaded, Runtime]:
    """The model with its head, quantized where that is asked for."""
    runtime = _runtime(machine, note)
    loaded = model.load_whole(runtime=runtime, on_note=note)
    if machine.quantize is not None:
        quantize_model(loaded.model, Quantization.of(machine.quantize), name=str(model.path))
    loaded.model.requires_grad_(False)
    return loaded, runtime


def _runtime(machine: Machine, note: Note) -> Runtime:
    runtime = machine.runtime()
    note(f"device: {runtime.describe()}")
    return runtime


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """How data is read and scored. What does not go with the model is refused, not ignored."""

    context: int | None = None
    """Tokens of a window; None: as in pretraining, else the model's, ``WINDOW_TOKENS`` at most. Of text."""
    stride: int | None = None
    """Tokens from window to window; None: three quarters of a window. Of a decoder."""
    limit: int | None = None
    """Only the first so many documents, or rows of labelled data."""
    text_key: str | None = None
    """The field with the text; None: text, content or the only one."""
    encoding: str | None = None
    """Of files of labelled data; None: utf-8."""
    errors: str | None = None
    """What is invalid in that encoding: "strict" is an error (None too), "replace" replaces and counts it."""
    strict: bool = False
    """Rows of labelled data that cannot be used are an error, instead of being counted."""
    sets: Sequence[str] = ()
    """KEY=VALUE of other settings of the task, such as data.label_key=topic; of an encoder that fills in its masks."""
    predictions: Path | None = None
    """A file for each answer, as JSON lines. Of a finetuned model."""
    confusion: Path | None = None
    """A PNG of the confusion matrix. Of a classifier."""


def evaluate(
    model: str | Path | Opened,
    data: str | Path | Sequence[str | Path],
    options: EvaluateOptions | None = None,
    *,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    on_note: Note | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a model on text, or one that was finetuned for a task on labelled data.

    ``data`` names files, directories, globs, hf:NAME:SPLIT, or "-". The ``scores`` of a decoder are loss (nats per
    token), perplexity and bits_per_byte of the UTF-8 text; each token is scored once. An encoder that fills in is
    scored on masked tokens, the same ones every time; a task by its own numbers (accuracy, macro_f1, f1, exact_match,
    bleu and the like) with 95 % bootstrap intervals, and ``predictions`` holds every answer. ``on_note`` is told the
    device, ``on_progress`` (tokens done, tokens in all) of text. ``device``, ``precision``, ``threads`` and
    ``quantize`` as in ``load``. Raises UserError for data that cannot be read or scored, and for an option that does
    not go with the model; RunError where the loss is not a number.

    Example:
        >>> import tfcli
        >>> result = tfcli.evaluate("runs/first", "corpus.txt")
        >>> list(result.scores)
        ['loss', 'perplexity', 'bits_per_byte', 'tokens', 'bytes']
        >>> first = tfcli.evaluate("runs/reviews", "reviews.csv", tfcli.EvaluateOptions(limit=8))
        >>> first.scores["examples"], 0 <= first.scores["accuracy"] <= 1
        (8, True)
    """
    specs = [str(spec) for spec in ([data] if isinstance(data, str | Path) else data)]
    opened = model if isinstance(model, Opened) else open_path(model)
    for spec in specs:
        hf_data.check_split(spec, f"tfcli evaluate {opened.path}")
    asked = options or EvaluateOptions()
    for name, number in {"context": asked.context, "stride": asked.stride, "limit": asked.limit}.items():
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}", hint="it must be at least 1")
    scoring = _Scoring(
        opened=opened,
        data=specs,
        options=asked,
        machine=Machine(device=device, precision=precision, threads=threads, quantize=quantize),
        note=on_note or _silent,
        on_progress=on_progress,
    )
    task = task_of(opened)
    if task is not None:
        return scoring.of_task(task)
    return scoring.of_masked() if opened.head == "masked" else scoring.of_text()


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """One call of ``evaluate``."""

    opened: Opened
    data: list[str]
    options: EvaluateOptions
    machine: Machine
    note: Note
    on_progress: Callable[[int, int], None] | None

    def of_text(self) -> Evaluation:
        """Score a model that continues text on all of its tokens."""
        self._refuse_labelled({"--set": self.options.sets})
        options = self._data_options()
        decoder, codec, runtime = self._decoder()
        context, stride = self._window(decoder.config.context), self.options.stride
        if stride is not None and stride > context:
            raise UserError(
                f"--stride is {stride}, the context {context}", hint="a longer stride would leave tokens out"
            )
        with tempfile.TemporaryDirectory(prefix="tfcli-") as folder:
            text = self._encode(options, codec, begin=True, folder=Path(folder))
            scores = score.evaluate(
                decoder,
                text.ids,
                text_bytes=text.bytes,
                codec=codec,
                runtime=runtime,
                context=context,
                stride=stride,
                on_progress=self.on_progress or notebook.counter("tokens"),
            )
            del text
        return _plain(dataclasses.asdict(scores.checked()))

    def of_masked(self) -> Evaluation:
        """Score an encoder on text, with tokens masked as it learnt it."""
        self._refuse_labelled({})
        self._refuse({"--stride": self.options.stride}, "a decoder")
        options = self._data_options()
        masks = resolve(masked.MaskingConfig, sets=[*_trained_masks(self._run), *self.options.sets])[0].mlm
        masked.check_shares(masks)
        loaded, runtime = _loaded(self.opened, self.machine, self.note)
        codec = FillPredictor(loaded.model, loaded.codec).filler.codec  # which refuses what does not fill in
        masking = masked.Masking(tokenizer=codec, options=masks)
        context = self._window(loaded.model.config.context)
        if masking.room(context) < 1:
            raise UserError(f"--context is {context}", hint="it has no room for a text")
        on_progress = self.on_progress or notebook.counter("tokens")
        with tempfile.TemporaryDirectory(prefix="tfcli-") as folder:
            text = self._encode(options, codec, begin=False, folder=Path(folder))
            found = masked.score(
                loaded.model, text.ids, masking, context=context, runtime=runtime, on_progress=on_progress
            )
            text_bytes = text.bytes
            del text
        if not math.isfinite(found.masked_loss):
            raise RunError(f"the loss of the text is {found.masked_loss}", hint="try --precision fp32")
        return _plain({**dataclasses.asdict(found), "bytes": text_bytes})

    def of_task(self, name: str) -> Evaluation:
        """Score a finetuned model on labelled data, and write what is to be written."""
        asked, kind = self.options, application(name).config
        self._refuse({"--context": asked.context, "--stride": asked.stride}, "a model of text")
        flags: dict[str, str | bool | None] = {"data.encoding": asked.encoding, "data.errors": asked.errors}
        flags |= {"data.text_key": asked.text_key, "data.strict": asked.strict or None}
        given = {key: value for key, value in flags.items() if value is not None}
        unused = [key for key in given if key not in known_keys(kind)]
        if unused:
            raise UserError(f"--{unused[0].partition('.')[2].replace('_', '-')} does not go with the task {name}")
        config, _ = resolve(kind, sets=asked.sets, flags=given)
        check(config)
        for written in (asked.predictions, asked.confusion):
            if written is not None and not written.parent.is_dir():
                raise UserError(
                    f"no such directory: {written.parent}", hint=f"make it, for {written.name} to be written"
                )
        if asked.confusion is not None:
            from tfcli.tasks.classify import plot

            if name != "classify":
                raise UserError(f"--confusion goes with a model that classifies, this one is of the task {name}")
            plot.check(asked.confusion)
        loaded, runtime = _loaded(self.opened, self.machine, self.note)
        predictor = application(name).predictor(loaded.model, loaded.codec, loaded.hf_config, runtime)
        if asked.confusion is not None and getattr(predictor, "multi", False):
            raise UserError("--confusion goes with one label a text, this model gives several")
        result = predictor.evaluate(self.data, config, limit=asked.limit)
        if asked.predictions is not None:
            lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in result.predictions)
            disk.write(asked.predictions, "".join(lines).encode())
        if asked.confusion is not None:
            plot.write(asked.confusion, np.array(result.scores["confusion"]), predictor.names)  # type: ignore[attr-defined]
        return result

    def _refuse(self, given: Mapping[str, object], whose: str) -> None:
        """UserError for an option that is given and goes with other models."""
        for flag, value in given.items():
            if value:
                raise UserError(f"{flag} goes with {whose}", hint=f"{self.opened.path} is none")

    def _refuse_labelled(self, given: Mapping[str, object]) -> None:
        """UserError for an option of labelled data, or one more of ``given``."""
        asked = self.options
        of_tasks = {"--predictions": asked.predictions, "--confusion": asked.confusion, "--encoding": asked.encoding}
        self._refuse({**of_tasks, "--strict": asked.strict, **given}, "a model that was finetuned for a task")

    def _data_options(self) -> DataOptions:
        return resolve(DataOptions, flags={"text_key": self.options.text_key, "errors": self.options.errors})[0]

    @cached_property
    def _run(self) -> dict[str, Any]:
        """What run.json says of the run that left the model; {} where there is none."""
        try:
            run = json.loads((self.opened.path / "run.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return run if isinstance(run, dict) else {}

    def _window(self, most: int) -> int:
        """Tokens of a window of a model that reads ``most``; said where it is not all of them.

        What tfcli pretrained is scored in windows of its whole context, as it was then.
        """
        asked, run = self.options.context, self._run
        if asked is not None and asked > most:
            raise UserError(f"--context is {asked}, the model reads {most} tokens", hint="it may be less, not more")
        if asked is None and "config" in run and run.get("kind") != "finetune":
            return most
        if asked is None and most > WINDOW_TOKENS:
            self.note(f"windows of {WINDOW_TOKENS} of the {most} tokens that the model reads; --context gives others")
        return asked or min(most, WINDOW_TOKENS)

    def _decoder(self) -> tuple[Transformer | Lstm, Codec, Runtime]:
        """The model to score, a baseline too, and its tokenizer."""
        if self.opened.hf_config.get("model_type") != LSTM:
            runtime = _runtime(self.machine, self.note)
            made, codec = self.opened.load(runtime=runtime, quantize=self.machine.quantize)
            return made.requires_grad_(False), codec, runtime
        if self.machine.quantize is not None:
            raise UserError("--quantize does not go with an LSTM", hint="leave it out")
        runtime = _runtime(self.machine, self.note)
        return *lstm.load(self.opened.path, runtime=runtime, hf_config=self.opened.hf_config), runtime

    def _encode(self, options: DataOptions, codec: Codec, *, begin: bool, folder: Path) -> Encoded:
        """The ids of all documents, in a memory-mapped file in ``folder``; ``begin`` is False for an encoder."""
        chunks = _first(read(find(self.data, spool=folder, on_note=self.note), options), self.options.limit)
        text = encode(chunks, codec, begin=begin, threads=self.machine.threads, file=folder / "ids")
        if not text.bytes:
            raise UserError(f"there is no text in {', '.join(self.data)}", hint="the score of nothing is not defined")
        return text


def _trained_masks(run: dict[str, Any]) -> list[str]:
    """How tokens were masked when tfcli trained the model, as settings; [] where that is not known."""
    try:
        return [f"mlm.{name}={json.dumps(value)}" for name, value in run["config"]["mlm"].items()]
    except (KeyError, TypeError, AttributeError):
        return []


def _first(chunks: Iterable[Chunk], limit: int | None) -> Iterator[Chunk]:
    """The chunks of the first ``limit`` documents."""
    ended = 0
    for chunk in chunks:
        yield chunk
        ended += chunk.end
        if ended == limit:
            return


def _plain(scores: dict[str, float | int]) -> Evaluation:
    """Scores of a text, for programs and for people."""
    lines = [f"{name:14} {f'{value:.4f}' if isinstance(value, float) else value}" for name, value in scores.items()]
    return Evaluation(scores=dict(scores), lines=lines, predictions=[])
