"""tfcli predict: what a model predicts for texts, as JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from tfcli.cli import options
from tfcli.cli.lines import read_objects, unread
from tfcli.cli.options import argument, option
from tfcli.cli.output import note, show_json
from tfcli.config.resolve import default_of
from tfcli.errors import UserError, unknown
from tfcli.tasks.translate.options import TranslateConfig

FORMATS = ("json", "text")
FILE = "One text per line, or .jsonl; for fill, also a text."
BEAM = f"the model's, else {default_of(TranslateConfig, 'translate.beam')}"


def predict(
    model: Annotated[str, argument("MODEL", "Model directory.")],
    file: Annotated[str, argument("[FILE]", FILE, "stdin")] = "-",
    task: Annotated[
        str | None,
        option("embed: sentence vectors; fill: words for [MASK].", None, "what it was finetuned for, else embed"),
    ] = None,
    form: Annotated[str, option("json, or text to read (finetuned models only).", name="--format")] = "json",
    limit: Annotated[int | None, option("Only the first N texts.", None, "all", min=1)] = None,
    beam: Annotated[int | None, option("Beam width of a translation; 1 is greedy.", None, BEAM, min=1)] = None,
    encoding: options.Encoding = None,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
    quantize: options.Quantize = None,
) -> None:
    """Apply a model to each text: one JSON object per line, in input order.

    The input is one text per line, or JSON lines with "text". A finetuned model performs its task: a classifier gives
    "label" and "probabilities". embed gives the mean of the last hidden states as a unit vector; it computes in fp32
    unless --precision says otherwise. fill gives the likeliest words for each [MASK] of a text, which may be given in
    place of FILE.

    Example: echo "A sentence." | tfcli predict all-MiniLM-L6-v2 --task embed
    """
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
    truncated = 0
    for answer in loaded.predict(islice(inputs, limit)):
        truncated += "cut" in answer
        if form == "text":
            print(predictor.show(answer), flush=True)
        else:
            show_json(answer)
    if truncated:
        note(f"{truncated} inputs are longer than the model's context and were truncated")
    if failures:
        raise unread(failures)
