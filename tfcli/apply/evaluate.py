"""Evaluation of a model on text, or on labeled data of the task that it was finetuned for."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tfcli import disk
from tfcli.apply.predict import Note, load_whole, runtime_of, silent, task_of
from tfcli.config.options import WINDOW_TOKENS, DataOptions
from tfcli.config.ranges import Count, check_ranges
from tfcli.config.resolve import known_keys, resolve
from tfcli.errors import RunError, UserError
from tfcli.formats.open import Opened, open_path
from tfcli.infer import score
from tfcli.model.base import Model
from tfcli.objectives import masked
from tfcli.objectives.fill import FillPredictor
from tfcli.objectives.table import of_format
from tfcli.runtime import Machine, Runtime
from tfcli.tasks.applications import application
from tfcli.tasks.common.options import check
from tfcli.tasks.task import Evaluation
from tfcli.text.corpus.encoding import Encoded, encode
from tfcli.text.read import hf_data
from tfcli.text.read.sources import Chunk, find, read
from tfcli.text.tokenizers.codec import Codec
from tfcli.train import notebook


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """Options of reading and scoring data. An option that does not go with the model is an error."""

    context: Count | None = None
    """Tokens of a window; None: as in pretraining, else what the model reads, ``WINDOW_TOKENS`` at most. For text."""
    stride: Count | None = None
    """Tokens from window to window; None: three quarters of a window. For decoders."""
    limit: Count | None = None
    """Most documents, or rows of labeled data."""
    text_key: str | None = None
    """The field with the text; None: text, content or the only one."""
    encoding: str | None = None
    """Encoding of labeled data; None: utf-8."""
    errors: str | None = None
    """Bytes that are invalid in the encoding: "strict" (or None) is an error, "replace" replaces and counts them."""
    strict: bool = False
    """True if unusable rows of labeled data are an error, instead of being counted."""
    sets: Sequence[str] = ()
    """Other settings of the task as KEY=VALUE, such as data.label_key=topic; for a masked-language model, its masks."""
    predictions: Path | None = None
    """A file for the answers, as JSON lines. For finetuned models."""
    confusion: Path | None = None
    """A PNG of the confusion matrix. For classifiers."""


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
    """Score a model on text, or one that was finetuned for a task on labeled data.

    ``data`` names files, directories, globs, hf:NAME:SPLIT, or "-". The ``scores`` of a decoder are loss (nats per
    token), perplexity and bits_per_byte of the UTF-8 text; each token is scored once. A masked-language model is scored
    on masked tokens, the same ones every time; a task by its own metrics (accuracy, macro_f1, f1, exact_match, bleu and
    the like) with 95 % bootstrap intervals, and ``predictions`` holds every answer. ``on_note`` receives the device,
    ``on_progress`` (tokens done, tokens in total) of text. ``device``, ``precision``, ``threads`` and ``quantize`` are
    as in ``load``. Raises UserError for data that cannot be read or scored, and for an option that does not go with the
    model; RunError where the loss is not finite.

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
    check_ranges(asked, "--")
    scoring = _Scoring(
        opened=opened,
        data=specs,
        options=asked,
        machine=Machine(device=device, precision=precision, threads=threads, quantize=quantize),
        note=on_note or silent,
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
        """Score a decoder or baseline on all tokens of a text."""
        self._refuse_labeled({"--set": self.options.sets})
        options = self._data_options()
        decoder, codec, runtime = self._decoder()
        context, stride = self._window(decoder.config.context), self.options.stride
        if stride is not None and stride > context:
            raise UserError(f"--stride is {stride}, the context {context}", hint="a longer stride would skip tokens")
        with runtime.active(), tempfile.TemporaryDirectory(prefix="tfcli-") as folder:
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
        """Score a masked-language model on masked tokens of a text, masked as in its training."""
        self._refuse_labeled({})
        self._refuse({"--stride": self.options.stride}, "a decoder")
        options = self._data_options()
        masks = resolve(masked.MaskingConfig, sets=[*_trained_masks(self._run), *self.options.sets])[0].mlm
        masked.check_shares(masks)
        loaded, runtime = load_whole(self.opened, self.machine, self.note)
        codec = FillPredictor(loaded.model, loaded.codec).filler.codec  # raises UserError for other models
        masking = masked.Masking(tokenizer=codec, options=masks)
        context = self._window(loaded.model.config.context)
        if masking.room(context) < 1:
            raise UserError(f"--context is {context}", hint="it has no room for a text")
        on_progress = self.on_progress or notebook.counter("tokens")
        with runtime.active(), tempfile.TemporaryDirectory(prefix="tfcli-") as folder:
            text = self._encode(options, codec, begin=False, folder=Path(folder))
            scores = masked.score(
                loaded.model, text.ids, masking, context=context, runtime=runtime, on_progress=on_progress
            )
            text_bytes = text.bytes
            del text
        if not math.isfinite(scores.masked_loss):
            raise RunError(f"the loss of the text is {scores.masked_loss}", hint="try --precision fp32")
        return _plain({**dataclasses.asdict(scores), "bytes": text_bytes})

    def of_task(self, name: str) -> Evaluation:
        """Score a finetuned model on labeled data, and write the files that are asked for."""
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
                raise UserError(f"no such directory: {written.parent}", hint=f"make it, for {written.name}")
        if asked.confusion is not None:
            application(name).check_drawing(asked.confusion)
        loaded, runtime = load_whole(self.opened, self.machine, self.note)
        predictor = application(name).predictor(loaded.model, loaded.codec, loaded.hf_config, runtime)
        if asked.confusion is not None and predictor.multi:
            raise UserError("--confusion goes with one label a text, this model gives several")
        with runtime.active():
            result = predictor.evaluate(self.data, config, limit=asked.limit)
        if asked.predictions is not None:
            lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in result.predictions)
            disk.write(asked.predictions, "".join(lines).encode())
        if asked.confusion is not None:
            predictor.draw(asked.confusion, result.scores)
        return result

    def _refuse(self, given: Mapping[str, object], whose: str) -> None:
        """Raise UserError for a given option that goes with other models."""
        for flag, value in given.items():
            if value:
                raise UserError(f"{flag} goes with {whose}", hint=f"{self.opened.path} is none")

    def _refuse_labeled(self, given: Mapping[str, object]) -> None:
        """Raise UserError for a given option of labeled data, or of ``given``."""
        asked = self.options
        of_tasks = {"--predictions": asked.predictions, "--confusion": asked.confusion, "--encoding": asked.encoding}
        self._refuse({**of_tasks, "--strict": asked.strict, **given}, "a model that was finetuned for a task")

    def _data_options(self) -> DataOptions:
        return resolve(DataOptions, flags={"text_key": self.options.text_key, "errors": self.options.errors})[0]

    @cached_property
    def _run(self) -> dict[str, Any]:
        """The content of run.json in the model's directory; {} if there is none."""
        try:
            run = json.loads((self.opened.path / "run.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return run if isinstance(run, dict) else {}

    def _window(self, most: int) -> int:
        """Tokens of a window of a model that reads ``most``, with a note where that is not all of them.

        A model that tfcli pretrained is scored in windows of its whole context, as in training.
        """
        asked, run = self.options.context, self._run
        if asked is not None and asked > most:
            raise UserError(f"--context is {asked}, the model reads {most} tokens", hint="it may be less, not more")
        if asked is None and "config" in run and run.get("kind") != "finetune":
            return most
        if asked is None and most > WINDOW_TOKENS:
            self.note(f"windows of {WINDOW_TOKENS} of the {most} tokens that the model reads; --context gives others")
        return asked or min(most, WINDOW_TOKENS)

    def _decoder(self) -> tuple[Model, Codec, Runtime]:
        """The model to score, which may be a baseline, and its tokenizer."""
        own, quantize = of_format(self.opened.hf_config), self.machine.quantize
        if own is not None and quantize is not None:
            raise UserError(f"--quantize does not go with {own.called}", hint="leave it out")
        runtime = runtime_of(self.machine, self.note)
        if own is not None:
            return *own.load(self.opened.path, self.opened.hf_config, runtime), runtime
        with runtime.active():
            model, codec = self.opened.load(runtime=runtime, quantize=quantize)
        return model.requires_grad_(False), codec, runtime

    def _encode(self, options: DataOptions, codec: Codec, *, begin: bool, folder: Path) -> Encoded:
        """The ids of all documents, in a memory-mapped file in ``folder``; ``begin`` is False for encoders."""
        chunks = _first(read(find(self.data, spool=folder, on_note=self.note), options), self.options.limit)
        text = encode(chunks, codec, begin=begin, threads=self.machine.threads, file=folder / "ids")
        if not text.bytes:
            raise UserError(f"there is no text in {', '.join(self.data)}", hint="name files that have some")
        return text


def _trained_masks(run: dict[str, Any]) -> list[str]:
    """The masking with which tfcli trained the model, as settings; [] where that is unknown."""
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
    """Scores of a text, as values and as lines for people."""
    lines = [f"{name:14} {f'{value:.4f}' if isinstance(value, float) else value}" for name, value in scores.items()]
    return Evaluation(scores=dict(scores), lines=lines, predictions=[])
