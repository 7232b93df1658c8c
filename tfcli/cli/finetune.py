"""tfcli finetune: a model and labelled data in, a model directory for a task out."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from tfcli.cli import options
from tfcli.cli.help import by_task, rate
from tfcli.cli.options import LENGTH, RUN, TEXT
from tfcli.tasks.applications import APPLICATIONS, configs
from tfcli.tasks.common.options import BESIDE_MUON_LR, EPOCHS, LR, LR_WIDTH, MOST_LR, NEW_LR
from tfcli.tasks.translate.options import NEW_EPOCHS

EPOCHS_SHOWN = f"{EPOCHS:g}; {NEW_EPOCHS:g} for translate from scratch"
LR_SHOWN = (
    f"{rate(LR)} x {LR_WIDTH} / width, at most {rate(MOST_LR)}; {rate(NEW_LR)} with --lora; "
    f"{rate(BESIDE_MUON_LR)} from scratch"
)


def finetune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model directory, of tfcli or Hugging Face.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA...", help="Files: jsonl, json, csv, tsv, parquet, txt, CoNLL; or hf:NAME:SPLIT."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help=" or".join(", ".join(APPLICATIONS).rsplit(",", 1)) + ".", rich_help_panel=RUN),
    ] = None,
    out: options.Out = None,
    resume: options.Resume = False,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch", help="Only the shape and tokenizer of MODEL; translate needs none.", rich_help_panel=RUN
        ),
    ] = False,
    lora: Annotated[
        bool,
        typer.Option(
            "--lora",
            help="Adapters in place of all weights; --set lora.rank=, .alpha=, .targets=.",
            rich_help_panel=RUN,
        ),
    ] = False,
    config: options.Config = None,
    sets: Annotated[
        list[str] | None, options.sets("Any setting, such as data.label_key=topic; repeatable.", RUN)
    ] = None,
    seed: options.Seed = None,
    checkpoint_every: options.CheckpointEvery = None,
    as_json: options.ResultAsJson = False,
    epochs: Annotated[
        float | None,
        typer.Option("--epochs", help="Passes over the data.", show_default=EPOCHS_SHOWN, rich_help_panel=LENGTH),
    ] = None,
    steps: options.Steps = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            help="Examples a step.",
            show_default=by_task("train.batch_size", configs()),
            rich_help_panel=LENGTH,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate.", show_default=LR_SHOWN, rich_help_panel=LENGTH),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience",
            help="Stop after so many evaluations without a better one.",
            show_default="never",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    val: Annotated[
        str | None, typer.Option("--val", help="Hold out this file, or hf:NAME:SPLIT.", rich_help_panel=TEXT)
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            "--val-fraction",
            help="Else this part, drawn by --seed; of lm the end.",
            show_default=by_task("data.val_fraction", configs()),
            rich_help_panel=TEXT,
        ),
    ] = None,
    encoding: options.Encoding = None,
    errors: options.Errors = None,
    strict: options.Strict = False,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
) -> None:
    """Train a model for a task on labelled data; the best one on the held-out part is kept.

    Example: tfcli finetune all-MiniLM-L6-v2 reviews.csv --task classify --out runs/reviews
    """
    from tfcli.runtime import process_started

    started = process_started()
    from tfcli.cli.live import view
    from tfcli.train.finetune import finetune as run

    settings: dict[str, Any] = {
        "train.epochs": epochs,
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.patience": patience,
        "train.checkpoint_every": checkpoint_every,
        "optim.lr": lr,
        "data.val": val,
        "data.val_fraction": val_fraction,
        "data.encoding": encoding,
        "data.errors": errors,
        "data.strict": strict or None,
        "lora.on": lora or None,
        "seed": seed,
    }
    with view() as listen:
        result = run(
            model,
            data or [],
            task=task,
            out=out,
            settings=settings,
            config_file=config,
            sets=sets or [],
            from_scratch=from_scratch,
            resume=resume,
            device=device,
            precision=precision,
            threads=threads,
            listen=listen,
            started=started,
            command=["tfcli", *sys.argv[1:]],
        )
    for line in result.lines:
        print(line, file=sys.stderr)
    if as_json:
        record = {"model": str(result.directory), "steps": result.steps, **result.scores}
        print(json.dumps({**record, "seconds": round(time.time() - started, 3)}, ensure_ascii=False))
    else:
        from tfcli.tasks.applications import application

        print(f"{result.directory}: {application(result.task).next_step(result.directory)}")
