"""tfcli evaluate: how well a model predicts a text."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tfcli.cli import options
from tfcli.cli.lines import note
from tfcli.cli.options import TEXT, Device, Encoding, Errors, Precision, Quantize, Strict, TextKey, Threads
from tfcli.config.options import WINDOW_TOKENS

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
    from tfcli.apply.evaluate import EvaluateOptions
    from tfcli.apply.evaluate import evaluate as score

    result = score(
        model,
        data,
        EvaluateOptions(
            context=context,
            stride=stride,
            limit=limit,
            text_key=text_key,
            encoding=encoding,
            errors=errors,
            strict=strict,
            sets=sets or (),
            predictions=predictions,
            confusion=confusion,
        ),
        device=device,
        precision=precision,
        threads=threads,
        quantize=quantize,
        on_note=note,
        on_progress=_Progress(),
    )
    for line in result.notes:
        note(line)
    print(json.dumps(result.scores, ensure_ascii=False) if as_json else "\n".join(result.lines))


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
