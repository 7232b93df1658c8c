"""tfcli predict: what a model says of texts, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Annotated

import typer

from tfcli.cli.lines import read_lines
from tfcli.cli.options import Device, Precision, Quantize, Threads
from tfcli.errors import RunError, unknown

TASKS = ("embed",)
WINDOW = 1024
"""Texts that are held at once."""


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory.")],
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", show_default="stdin", help="One text a line, or .jsonl.")
    ] = "-",
    task: Annotated[str, typer.Option("--task", help="embed: texts as vectors.")] = "embed",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, show_default="all", help="Only the first N texts.")
    ] = None,
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    quantize: Quantize = None,
) -> None:
    """Say what a model makes of each text: one JSON object a line, in the order of the input.

    Input is a text a line, or JSON lines with "text". embed gives the mean of the last hidden states as a vector of
    length 1; it computes in fp32 unless --precision says otherwise.

    Example: echo "A sentence." | tfcli predict all-MiniLM-L6-v2 --task embed
    """  # fmt: skip
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    from tfcli.infer.engine import load

    failures: list[int] = []
    texts = read_lines(file, "text", failures)
    engine = load(model, device=device, precision=precision or "fp32", threads=threads, quantize=quantize)
    print(f"device: {engine.runtime.describe()}", file=sys.stderr)
    lines: Iterator[str] = islice(texts, limit)
    cut = 0
    while window := list(islice(lines, WINDOW)):
        for text in window:
            cut += engine.fitted(text)[1] > 0
        for text, vector in zip(window, engine.embed(window), strict=True):
            rounded = [round(float(number), 7) for number in vector]
            print(json.dumps({"text": text, "embedding": rounded}, ensure_ascii=False))
        sys.stdout.flush()
    if cut:
        context = engine.model.config.context
        print(f"{cut} texts are longer than the model's {context} tokens: what follows was left out", file=sys.stderr)
    if failures:
        raise RunError(f"{len(failures)} lines could not be read, as said above", hint="the others are done")
