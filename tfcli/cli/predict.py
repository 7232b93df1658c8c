"""tfcli predict: what a model says of texts, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfcli.cli.lines import read_lines, read_objects, unread
from tfcli.cli.options import Device, Encoding, Machine, Precision, Quantize, Threads
from tfcli.cli.tasks import filler, task_of
from tfcli.cli.tasks import load as load_task
from tfcli.config.resolve import default_of
from tfcli.errors import UserError, unknown
from tfcli.tasks.translate.options import TranslateConfig

if TYPE_CHECKING:
    from tfcli.formats.open import Opened

TASKS = ("embed", "fill")
FORMATS = ("json", "text")
WINDOW = 1024
"""Texts that are held at once."""


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory.")],
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", show_default="stdin", help="One text a line, or .jsonl; of fill, a text.")
    ] = "-",
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="embed: texts as vectors; fill: words for [MASK].",
            show_default="what it was finetuned for, else embed",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="json, or text: a line for people (of finetuned models).")
    ] = "json",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, show_default="all", help="Only the first N texts.")
    ] = None,
    beam: Annotated[
        int | None,
        typer.Option(
            "--beam",
            min=1,
            help="Beams of a translation; 1 is greedy.",
            show_default=f"the model's, else {default_of(TranslateConfig, 'translate.beam')}",
        ),
    ] = None,
    encoding: Encoding = None,
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    quantize: Quantize = None,
) -> None:
    """Say what a model makes of each text: one JSON object a line, in the order of the input.

    Input is a text a line, or JSON lines with "text". A finetuned model answers its task: a classifier gives "label"
    and "probabilities". embed gives the mean of the last hidden states as a vector of
    length 1; it computes in fp32 unless --precision says otherwise. fill gives the likeliest words for each [MASK] of
    a text, which may stand in the place of FILE.

    Example: echo "A sentence." | tfcli predict all-MiniLM-L6-v2 --task embed
    """  # fmt: skip
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    from tfcli.formats.open import open_path

    encoding = encoding or "utf-8"
    opened = open_path(model)
    finetuned = task_of(opened)
    name = task or finetuned or "embed"
    if name in (finetuned, "fill"):
        machine = Machine(device=device, precision=precision, threads=threads, quantize=quantize)
        _answer(opened, name, file, limit, form, beam, encoding, machine)
        return
    if name not in TASKS:
        from tfcli.tasks.applications import APPLICATIONS

        if name in APPLICATIONS:
            raise UserError(f"{model} was not finetuned for {name}", hint=f"tfcli finetune {model} DATA --task {name}")
        raise unknown("task", name, (*TASKS, *APPLICATIONS))
    if form != "json":
        raise UserError(f"--format {form} goes with a finetuned model", hint=f"the task {name} gives JSON lines")
    from tfcli.infer.engine import Engine

    failures: list[int] = []
    texts = read_lines(file, "text", failures, encoding=encoding)
    runtime = Machine(device, precision or "fp32", threads).runtime()
    engine = Engine(*opened.load(runtime=runtime, quantize=quantize), runtime)
    print(f"device: {engine.runtime.describe()}", file=sys.stderr)
    lines: Iterator[str] = islice(texts, limit)
    cut = 0
    while window := list(islice(lines, WINDOW)):
        encoded = [engine.fitted(text) for text in window]
        cut += sum(one.cut > 0 for one in encoded)
        for text, vector in zip(window, engine.embed(encoded), strict=True):
            rounded = [round(float(number), 7) for number in vector]
            print(json.dumps({"text": text, "embedding": rounded}, ensure_ascii=False))
        sys.stdout.flush()
    if cut:
        context = engine.model.config.context
        print(f"{cut} texts are longer than the model's {context} tokens: what follows was left out", file=sys.stderr)
    if failures:
        raise unread(failures)


def _answer(
    model: Opened,
    name: str,
    file: str,
    limit: int | None,
    form: str,
    beam: int | None,
    encoding: str,
    machine: Machine,
) -> None:
    """The answers of a finetuned model, a window of inputs at a time; ``beam`` of one that translates."""
    predictor = filler(model, *machine) if name == "fill" else load_task(model, name, *machine)
    if beam is not None:
        predictor.search(beam)
    failures: list[int] = []
    if name == "fill" and "[MASK]" in file and not Path(file).exists():
        lines: Iterator[Any] = iter([predictor.plain(file)])
    else:
        objects = read_objects(file, predictor.key, failures, predictor.parse, predictor.plain, encoding=encoding)
        lines = islice(objects, limit)
    cut = 0
    while window := list(islice(lines, WINDOW)):
        for answer in predictor.predict(window):
            cut += bool(answer.get("cut"))
            print(predictor.show(answer) if form == "text" else json.dumps(answer, ensure_ascii=False))
        sys.stdout.flush()
    if cut:
        print(f"{cut} inputs are longer than the model's context: what follows was left out", file=sys.stderr)
    if failures:
        raise unread(failures)
