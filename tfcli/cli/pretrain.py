"""tfcli pretrain: text in, model directory out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfcli.cli import options
from tfcli.cli.options import LENGTH, RUN, TEXT
from tfcli.config.options import DEFAULT_BUDGET, HELD_OUT_BYTES, PretrainConfig
from tfcli.config.resolve import default_of
from tfcli.objectives.table import OBJECTIVES

if TYPE_CHECKING:
    from tfcli.train.pretrain import Result

SIZE = "Size"


def pretrain(
    corpus: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CORPUS...",
            help="Files, directories, globs, hf:NAME:SPLIT, - for stdin: txt, jsonl, csv, tsv, parquet; packed too.",
        ),
    ] = None,
    out: options.Out = None,
    resume: options.Resume = False,
    config: options.Config = None,
    sets: Annotated[list[str] | None, options.sets("Any setting, such as optim.muon_lr=0.01; repeatable.", RUN)] = None,
    seed: options.Seed = None,
    checkpoint_every: options.CheckpointEvery = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard events.", rich_help_panel=RUN)
    ] = False,
    as_json: options.ResultAsJson = False,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="Wall-clock time, as 90s, 10m, 1h.", show_default=DEFAULT_BUDGET, rich_help_panel=LENGTH
        ),
    ] = None,
    steps: options.Steps = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Training tokens.", rich_help_panel=LENGTH)] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Passes over the text.", rich_help_panel=LENGTH)
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            help="; ".join(f"{name}: {line.does}" for name, line in OBJECTIVES.items()) + ".",
            show_default=default_of(PretrainConfig, "model.arch"),
            rich_help_panel=SIZE,
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth",
            help="Blocks; width, heads and rates follow.",
            show_default="what fits the time",
            rich_help_panel=SIZE,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", help="Tokens seen at once.", show_default="by depth", rich_help_panel=SIZE),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Sequences a step.", show_default="by depth", rich_help_panel=SIZE),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="A known point: tiny, small, nanogpt-cpu, 12m, gpt2-124m.", rich_help_panel=SIZE),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            help="A tokenizer.model or model directory.",
            show_default="trained on the text",
            rich_help_panel=TEXT,
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size", help="Pieces of a new tokenizer.", show_default="by size of text", rich_help_panel=TEXT
        ),
    ] = None,
    val: Annotated[str | None, typer.Option("--val", help="Hold out this file instead.", rich_help_panel=TEXT)] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            "--val-fraction",
            help="Held-out part, from the end.",
            show_default=f"{default_of(PretrainConfig, 'data.val_fraction')}, at most {HELD_OUT_BYTES // 1000} kB",
            rich_help_panel=TEXT,
        ),
    ] = None,
    text_key: options.TextKey = None,
    errors: options.Errors = None,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
) -> None:
    """Train a language model on text: tokenizer, training, evaluation, and a model directory that works everywhere.

    Example: tfcli pretrain corpus.txt --budget 10m
    """
    from tfcli.runtime import process_started

    started = process_started()
    from tfcli.cli.live import view
    from tfcli.train.pretrain import pretrain as run

    settings: dict[str, Any] = {
        "train.steps": steps,
        "train.tokens": tokens,
        "train.epochs": epochs,
        "train.budget": budget,
        "train.batch_size": batch_size,
        "train.checkpoint_every": checkpoint_every,
        "train.tensorboard": tensorboard or None,
        "model.arch": arch,
        "model.depth": depth,
        "model.context": context,
        "tokenizer.vocab_size": vocab_size,
        "data.val": val,
        "data.val_fraction": val_fraction,
        "data.text_key": text_key,
        "data.errors": errors,
        "seed": seed,
    }
    with view() as listen:
        result = run(
            corpus or [],
            out=out,
            tokenizer=tokenizer,
            settings=settings,
            preset=preset,
            config_file=config,
            sets=sets or [],
            resume=resume,
            device=device,
            precision=precision,
            threads=threads,
            listen=listen,
            started=started,
            command=["tfcli", *sys.argv[1:]],
        )
    _show(result, as_json, started)


def _show(result: Result, as_json: bool, started: float) -> None:
    """Where the model is, how good, and what to do with it."""
    from tfcli.objectives.table import objective

    made = objective(result.arch)
    then = made.next_step(result.directory)
    if as_json:
        record = {"model": str(result.directory), "steps": result.steps, f"val_{made.score}": result.score}
        print(json.dumps({**record, "seconds": round(time.time() - started, 3)}))
        return
    score = "" if result.score is None else f" ({result.score:.4f} {made.unit} held out)"
    print(f"{result.directory}{score}: {then}")
