"""tfcli evaluate: how well a model predicts a text, or does its task."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from tfcli.cli import options
from tfcli.cli.options import TEXT, argument, flag, option
from tfcli.cli.output import Ticker, note, show_json
from tfcli.config.options import WINDOW_TOKENS

SCORE = "Score"
DATA = "Files, directories or globs, hf:NAME:SPLIT, or - for stdin."
CONTEXT = f"as in pretraining, else the model's, at most {WINDOW_TOKENS}"


def evaluate(
    model: Annotated[str, argument("MODEL", "Model directory or GGUF file.")],
    data: Annotated[list[str], argument("DATA...", DATA)],
    context: Annotated[int | None, option("Window length in tokens.", SCORE, CONTEXT)] = None,
    stride: Annotated[
        int | None, option("Tokens from window to window; the context is fastest.", SCORE, "3/4 of the context")
    ] = None,
    limit: Annotated[int | None, option("Score only the first N documents.", TEXT, "all")] = None,
    predictions: Annotated[Path | None, option("Write all predictions to this file, as JSON lines.", SCORE)] = None,
    confusion: Annotated[Path | None, option("For classify: draw the confusion matrix as this PNG.", SCORE)] = None,
    sets: Annotated[list[str] | None, options.sets("A setting of the task, e.g. data.label_key=topic.", TEXT)] = None,
    text_key: options.TextKey = None,
    encoding: options.Encoding = None,
    errors: options.Errors = None,
    strict: options.Strict = False,
    as_json: Annotated[bool, flag("--json", "Print one JSON object.", SCORE)] = False,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
    quantize: options.Quantize = None,
) -> None:
    """Score a model on text: loss (nats per token), perplexity, and bits per UTF-8 byte.

    A finetuned model is scored by its task on labeled data, with 95 % bootstrap intervals. A masked language model is
    scored on tokens masked as in its training, the same ones every time.

    Every token is scored once, with at least context - stride preceding tokens where the text has that many. Each
    document ends with the end-of-text token, which is scored and counts as a token but not as a byte, as in training.

    Example: tfcli evaluate runs/first held-out.txt
    """
    from tfcli.apply.evaluate import EvaluateOptions
    from tfcli.apply.evaluate import evaluate as score

    how = EvaluateOptions(
        context=context, stride=stride, limit=limit, text_key=text_key, encoding=encoding, errors=errors,
        strict=strict, sets=sets or (), predictions=predictions, confusion=confusion,
    )  # fmt: skip
    ticker = Ticker()

    def progress(done: int, total: int) -> None:
        if ticker.due():
            speed = done / (time.monotonic() - ticker.start)
            note(f"{done} of {total} tokens, {speed:.0f} tokens/s, {(total - done) / speed:.0f} s left")

    result = score(
        model, data, how, device=device, precision=precision, threads=threads, quantize=quantize, on_note=note,
        on_progress=progress,
    )  # fmt: skip
    for line in result.notes:
        note(line)
    if as_json:
        show_json(result.scores)
    else:
        print("\n".join(result.lines))
