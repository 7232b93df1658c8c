"""tfcli evaluate: how well a model predicts a text."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfcli.cli import options
from tfcli.cli.lines import note
from tfcli.cli.options import TEXT, Device, Encoding, Errors, Machine, Precision, Quantize, Strict, TextKey, Threads
from tfcli.cli.tasks import task_of
from tfcli.config.options import WINDOW_TOKENS, DataOptions
from tfcli.config.resolve import resolve
from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.formats.open import Opened
    from tfcli.model.base import Model
    from tfcli.runtime import Runtime
    from tfcli.text.corpus.encoding import Encoded
    from tfcli.text.read.sources import Chunk
    from tfcli.text.tokenizers.codec import Codec

SCORE = "Score"
SECONDS_BETWEEN_LINES = 10.0


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, or a GGUF file.")],
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Files, directories or globs of text, hf:NAME:SPLIT, or -.")
    ],
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="Tokens of a window.",
            show_default=f"as in pretraining, else the model's, {WINDOW_TOKENS} at most",
            rich_help_panel=SCORE,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            help="Tokens from window to window; the context is fastest.",
            show_default="3/4 of the context",
            rich_help_panel=SCORE,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Score only the first N documents.", show_default="all", rich_help_panel=TEXT),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", help="Write each answer to this file, as JSON lines.", rich_help_panel=SCORE),
    ] = None,
    confusion: Annotated[
        Path | None,
        typer.Option("--confusion", help="Of classify: draw the confusion matrix as this PNG.", rich_help_panel=SCORE),
    ] = None,
    sets: Annotated[
        list[str] | None, options.sets("A setting of the task, such as data.label_key=topic.", TEXT)
    ] = None,
    text_key: TextKey = None,
    encoding: Encoding = None,
    errors: Errors = None,
    strict: Strict = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.", rich_help_panel=SCORE)] = False,
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    quantize: Quantize = None,
) -> None:
    """Score a text: loss (nats per token), perplexity and bits per byte of its UTF-8 form.

    A model that was finetuned for a task is scored by that task on labelled data, with 95 % bootstrap intervals. An
    encoder that fills in is scored on pieces that are covered up as in its training, the same ones every time.

    Every token is scored once, with at least context - stride tokens before it where there are that many. Each document
    ends with the end-of-text token, which is scored and counts as a token but not as a byte, as in training.

    Example: tfcli evaluate runs/first held-out.txt
    """
    from tfcli.formats.open import open_path
    from tfcli.text.read import hf_data

    for spec in data:
        hf_data.check_split(spec, f"tfcli evaluate {model}")
    for name, number in {"context": context, "stride": stride, "limit": limit}.items():
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}", hint="it must be at least 1")
    machine = Machine(device=device, precision=precision, threads=threads, quantize=quantize)
    opened = open_path(model)
    finetuned = task_of(opened)
    if finetuned is not None:
        _refuse({"--context": context, "--stride": stride}, model, "a model of text")
        flags: dict[str, str | bool | None] = {"data.encoding": encoding, "data.errors": errors}
        flags |= {"data.text_key": text_key, "data.strict": strict or None}
        _of_task(opened, finetuned, data, sets or [], flags, limit, predictions, confusion, as_json, machine)
        return
    masked = opened.head == "masked"
    of_tasks: dict[str, object] = {"--predictions": predictions, "--confusion": confusion}
    of_tasks |= {"--encoding": encoding, "--strict": strict or None} | ({} if masked else {"--set": sets})
    _refuse(of_tasks, model, "a model that was finetuned for a task")
    if masked:
        _refuse({"--stride": stride}, model, "a decoder")
    data_options, _ = resolve(DataOptions, flags={"text_key": text_key, "errors": errors})
    if masked:
        _of_masked(opened, data, sets or [], data_options, context, limit, as_json, machine)
    else:
        _of_text(opened, data, data_options, context, stride, limit, as_json, machine)


def _of_text(
    model: Opened,
    data: list[str],
    options: DataOptions,
    context: int | None,
    stride: int | None,
    limit: int | None,
    as_json: bool,
    machine: Machine,
) -> None:
    """Score a model that continues text on all of its tokens."""
    import tempfile

    from tfcli.infer.score import evaluate as score

    decoder, codec, runtime = _load(model, machine)
    print(f"device: {runtime.describe()}", file=sys.stderr)
    context = _window(context, decoder.config.context, _run_of(model.path))
    if stride is not None and stride > context:
        raise UserError(f"--stride is {stride}, the context {context}", hint="a longer stride would leave tokens out")
    with tempfile.TemporaryDirectory(prefix="tfcli-") as folder:
        text = _encode(data, options, codec, begin=True, limit=limit, threads=machine.threads, folder=Path(folder))
        scores = score(
            decoder,
            text.ids,
            text_bytes=text.bytes,
            codec=codec,
            runtime=runtime,
            context=context,
            stride=stride,
            on_progress=_Progress(),
        )
        del text
    _show(dataclasses.asdict(scores.checked()), as_json)


def _refuse(flags: Mapping[str, object], model: str, whose: str) -> None:
    """UserError for a flag that is given (not None) and goes with other models."""
    for flag, given in flags.items():
        if given is not None:
            raise UserError(f"{flag} goes with {whose}", hint=f"{model} is none")


def _window(asked: int | None, most: int, run: dict[str, Any]) -> int:
    """Tokens of a window of a model that reads ``most``; said where it is not all of them.

    What ``run`` says that tfcli pretrained is scored in windows of its whole context, as it was then.
    """
    if asked is not None and asked > most:
        raise UserError(f"--context is {asked}, the model reads {most} tokens", hint="it may be less, not more")
    if asked is None and "config" in run and run.get("kind") != "finetune":
        return most
    if asked is None and most > WINDOW_TOKENS:
        print(
            f"windows of {WINDOW_TOKENS} of the {most} tokens that the model reads; --context gives others",
            file=sys.stderr,
        )
    return asked or min(most, WINDOW_TOKENS)


def _show(fields: dict[str, float | int], as_json: bool) -> None:
    if as_json:
        print(json.dumps(fields))
        return
    for name, value in fields.items():
        print(f"{name:14} {value:.4f}" if isinstance(value, float) else f"{name:14} {value}")


def _of_masked(
    model: Opened,
    data: list[str],
    sets: list[str],
    options: DataOptions,
    context: int | None,
    limit: int | None,
    as_json: bool,
    machine: Machine,
) -> None:
    """Score an encoder on text, with pieces covered up as it learnt it."""
    import math
    import tempfile

    from tfcli.cli.tasks import filler
    from tfcli.errors import RunError
    from tfcli.objectives.masked import Masking, MaskingConfig, check_shares, score

    run = _run_of(model.path)
    masks = resolve(MaskingConfig, sets=[*_trained_masks(run), *sets])[0].mlm
    check_shares(masks)
    made = filler(model, *machine).filler
    masking = Masking(tokenizer=made.codec, options=masks)
    context = _window(context, made.model.config.context, run)
    if masking.room(context) < 1:
        raise UserError(f"--context is {context}", hint="it has no room for a text")
    runtime = machine.runtime()
    with tempfile.TemporaryDirectory(prefix="tfcli-") as folder:
        threads, place = machine.threads, Path(folder)
        text = _encode(data, options, made.codec, begin=False, limit=limit, threads=threads, folder=place)
        found = score(made.model, text.ids, masking, context=context, runtime=runtime, on_progress=_Progress())
        text_bytes = text.bytes
        del text
    if not math.isfinite(found.masked_loss):
        raise RunError(f"the loss of the text is {found.masked_loss}", hint="try --precision fp32")
    _show({**dataclasses.asdict(found), "bytes": text_bytes}, as_json)


def _run_of(model: Path) -> dict[str, Any]:
    """What run.json says of the run that left the model; {} where there is none."""
    try:
        run = json.loads((model / "run.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def _trained_masks(run: dict[str, Any]) -> list[str]:
    """How tokens were masked when tfcli trained the model, as settings; [] where that is not known."""
    try:
        return [f"mlm.{name}={json.dumps(value)}" for name, value in run["config"]["mlm"].items()]
    except (KeyError, TypeError, AttributeError):
        return []


def _load(model: Opened, machine: Machine) -> tuple[Model, Codec, Runtime]:
    """The model to score, a baseline too, and its tokenizer."""
    from tfcli.objectives.table import of_format

    own = of_format(model.hf_config)
    if own is None:
        runtime = machine.runtime()
        made, codec = model.load(runtime=runtime, quantize=machine.quantize)
        return made.requires_grad_(False), codec, runtime
    if machine.quantize is not None:
        raise UserError(f"--quantize does not go with {own.called}", hint="leave it out")
    runtime = machine.runtime()
    return *own.load(model.path, model.hf_config, runtime), runtime


def _of_task(
    model: Opened,
    name: str,
    data: list[str],
    sets: list[str],
    flags: dict[str, str | bool | None],
    limit: int | None,
    predictions: Path | None,
    confusion: Path | None,
    as_json: bool,
    machine: Machine,
) -> None:
    """Score a finetuned model on labelled data."""
    from tfcli.cli.tasks import load
    from tfcli.config.resolve import known_keys
    from tfcli.tasks.applications import application
    from tfcli.tasks.common.options import check

    app = application(name)
    kind = app.config
    unused = [key for key, value in flags.items() if value is not None and key not in known_keys(kind)]
    if unused:
        raise UserError(f"--{unused[0].partition('.')[2].replace('_', '-')} does not go with the task {name}")
    config, _ = resolve(kind, sets=sets, flags={key: value for key, value in flags.items() if value is not None})
    check(config)
    for written in (predictions, confusion):
        if written is not None and not written.parent.is_dir():
            raise UserError(f"no such directory: {written.parent}", hint=f"make it, for {written.name} to be written")
    if confusion is not None:
        app.check_drawing(confusion)
    predictor = load(model, name, *machine)
    if confusion is not None and predictor.multi:
        raise UserError("--confusion goes with one label a text, this model gives several")
    result = predictor.evaluate(data, config, limit=limit)
    for line in result.notes:
        print(line, file=sys.stderr)
    if predictions is not None:
        from tfcli import disk

        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in result.predictions)
        disk.write(predictions, "".join(lines).encode())
    if confusion is not None:
        predictor.draw(confusion, result.scores)
    if as_json:
        print(json.dumps(result.scores, ensure_ascii=False))
    else:
        print("\n".join(result.lines))


def _encode(
    data: list[str],
    options: DataOptions,
    codec: Codec,
    *,
    begin: bool,
    limit: int | None,
    threads: int | None,
    folder: Path,
) -> Encoded:
    """The ids of all documents, in a memory-mapped file in ``folder``; ``begin`` is False for an encoder."""
    from tfcli.text.corpus.encoding import encode
    from tfcli.text.read.sources import find, read

    chunks = _first(read(find(data, spool=folder, on_note=note), options), limit)
    text = encode(chunks, codec, begin=begin, threads=threads, file=folder / "ids")
    if not text.bytes:
        raise UserError(f"there is no text in {', '.join(data)}", hint="the score of nothing is not defined")
    return text


def _first(chunks: Iterable[Chunk], limit: int | None) -> Iterator[Chunk]:
    """The chunks of the first ``limit`` documents."""
    ended = 0
    for chunk in chunks:
        yield chunk
        ended += chunk.end
        if ended == limit:
            return


class _Progress:
    """A line on stderr every ten seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = done / (now - self._start)
        left = (total - done) / rate
        print(f"{done} of {total} tokens, {rate:.0f} tokens/s, {left:.0f} s left", file=sys.stderr)
