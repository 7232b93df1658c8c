"""tfcli predict: what a model says of texts, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from tfcli.cli.lines import note, read_objects, unread
from tfcli.cli.options import Device, Encoding, Precision, Quantize, Threads
from tfcli.config.resolve import default_of
from tfcli.errors import UserError, unknown
from tfcli.tasks.translate.options import TranslateConfig

FORMATS = ("json", "text")


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
    from tfcli.apply.predict import EMBED, FILL, TaskModel, choose_task
    from tfcli.formats.open import open_path
    from tfcli.runtime import Machine

    opened = open_path(model)
    name = choose_task(opened, task)
    if name == EMBED and form != "json":
        raise UserError(f"--format {form} goes with a finetuned model", hint=f"the task {name} gives JSON lines")
    machine = Machine(device=device, precision=precision, threads=threads, quantize=quantize)
    loaded = TaskModel.load(opened, task=name, beam=beam, machine=machine, on_note=note)
    predictor, failures = loaded.predictor, list[int]()
    if name == FILL and "[MASK]" in file and not Path(file).exists():
        inputs: Iterator[Any] = iter([predictor.plain(file)])
    else:
        inputs = read_objects(
            file, predictor.key, failures, predictor.parse, predictor.plain, encoding=encoding or "utf-8"
        )
    cut = 0
    for answer in loaded.predict(islice(inputs, limit)):
        cut += "cut" in answer
        print(predictor.show(answer) if form == "text" else json.dumps(answer, ensure_ascii=False), flush=True)
    if cut:
        note(f"{cut} inputs are longer than the model's context: what follows was left out")
    if failures:
        raise unread(failures)
