"""tfcli evaluate: how well a model predicts a text."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfcli.cli import options
from tfcli.cli.options import Device, Encoding, Errors, Precision, Quantize, Strict, TextKey, Threads
from tfcli.cli.tasks import task_of
from tfcli.config import DataOptions, resolve
from tfcli.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tfcli.text.codec import Codec

SCORE = "Score"
SECONDS_BETWEEN_LINES = 10.0
BATCH = 1 << 22
"""Characters that are encoded at once, about."""


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, or a GGUF file.")],
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Files, directories or globs of text, or - for stdin.")
    ],
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
        typer.Option(
            "--limit", help="Score only the first N documents.", show_default="all", rich_help_panel=options.TEXT
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", help="Write each answer to this file, as JSON lines.", rich_help_panel=SCORE),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the task, such as data.label_key=topic.",
            rich_help_panel=options.TEXT,
        ),
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

    A model that was finetuned for a task is scored by that task on labelled data, with 95 % bootstrap intervals.

    Every token is scored once, with at least context - stride tokens before it where there are that many. Documents
    are joined by the end-of-text token, which is scored and counts as a token but not as a byte.

    Example: tfcli evaluate runs/first held-out.txt
    """
    import tempfile

    if stride is not None and stride < 1:
        raise UserError(f"--stride is {stride}", hint="it must be at least 1")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}", hint="it must be at least 1")
    finetuned = task_of(model)
    if finetuned is not None:
        flags: dict[str, str | bool | None] = {"data.encoding": encoding, "data.errors": errors}
        flags |= {"data.text_key": text_key, "data.strict": strict or None}
        _of_task(
            model,
            finetuned,
            data,
            sets or [],
            flags,
            limit,
            predictions,
            as_json,
            (device, precision, threads, quantize),
        )
        return
    of_tasks = {"--predictions": predictions, "--set": sets, "--encoding": encoding, "--strict": strict or None}
    for flag, given in of_tasks.items():
        if given is not None:
            raise UserError(f"{flag} goes with a model that was finetuned for a task", hint=f"{model} was not")
    data_options, _ = resolve(DataOptions, flags={"text_key": text_key, "errors": errors})
    from tfcli.infer.engine import load
    from tfcli.infer.score import evaluate as score

    engine = load(model, device=device, precision=precision, threads=threads, quantize=quantize)
    if stride is not None and stride > engine.model.config.context:
        raise UserError(
            f"--stride is {stride}, the model's context {engine.model.config.context}",
            hint="a longer stride would leave tokens out",
        )
    print(f"device: {engine.runtime.describe()}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="tfcli-") as folder:
        ids, text_bytes = _encode(
            data, data_options, engine.tokenizer, limit=limit, threads=threads, folder=Path(folder)
        )
        scores = score(
            engine.model,
            ids,
            text_bytes=text_bytes,
            first=engine.first_id,
            runtime=engine.runtime,
            stride=stride,
            on_progress=_Progress(),
        )
        del ids
    fields = dataclasses.asdict(scores.checked())
    if as_json:
        print(json.dumps(fields))
        return
    for name, value in fields.items():
        print(f"{name:14} {value:.4f}" if isinstance(value, float) else f"{name:14} {value}")


def _of_task(
    model: str,
    name: str,
    data: list[str],
    sets: list[str],
    flags: dict[str, str | bool | None],
    limit: int | None,
    predictions: Path | None,
    as_json: bool,
    machine: tuple[str | None, str | None, int | None, str | None],
) -> None:
    """Score a finetuned model on labelled data."""
    from tfcli.cli.tasks import load
    from tfcli.config import known_keys
    from tfcli.tasks.applications import application
    from tfcli.tasks.options import check

    kind = application(name).config
    unused = [key for key, value in flags.items() if value is not None and key not in known_keys(kind)]
    if unused:
        raise UserError(f"--{unused[0].partition('.')[2].replace('_', '-')} does not go with the task {name}")
    config, _ = resolve(kind, sets=sets, flags={key: value for key, value in flags.items() if value is not None})
    check(config)
    predictor = load(model, name, *machine)
    result = predictor.evaluate(data, config, limit=limit)
    for line in result.notes:
        print(line, file=sys.stderr)
    if predictions is not None:
        from tfcli.text import files

        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in result.predictions)
        files.write(predictions, "".join(lines).encode())
    if as_json:
        print(json.dumps(result.scores, ensure_ascii=False))
    else:
        print("\n".join(result.lines))


def _encode(
    data: list[str], options: DataOptions, tokenizer: Codec, *, limit: int | None, threads: int | None, folder: Path
) -> tuple[npt.NDArray[np.int32], int]:
    """The ids of all documents, in a memory-mapped file in ``folder``, and the bytes of their text."""
    import numpy as np

    from tfcli.text.sources import find, read, utf8_length

    sources = find(data, spool=folder, on_note=lambda line: print(line, file=sys.stderr))
    path = folder / "ids"
    text_bytes = documents = 0
    begins = True
    eos = np.array([tokenizer.eos_id], np.int32)
    waiting: list[tuple[str, bool]] = []

    def write() -> None:
        nonlocal documents
        texts, starts = [text for text, _ in waiting], [start for _, start in waiting]
        encoded = tokenizer.encode_arrays(texts, continuing=[not start for start in starts], threads=threads)
        for ids, start in zip(encoded, starts, strict=True):
            if start and documents:
                file.write(eos.tobytes())
            documents += start
            file.write(np.ascontiguousarray(ids, np.int32).tobytes())
        waiting.clear()

    with path.open("wb") as file:
        ended = held = 0
        for chunk in read(sources, options):
            waiting.append((chunk.text, begins))
            text_bytes += utf8_length(chunk.text)
            held += len(chunk.text) + 64
            begins = chunk.end
            ended += chunk.end
            if ended == limit:
                break
            if held > BATCH:
                write()
                held = 0
        write()
    if not text_bytes:
        raise UserError(f"there is no text in {', '.join(data)}", hint="the score of nothing is not defined")
    return np.memmap(path, np.int32, mode="r"), text_bytes


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
