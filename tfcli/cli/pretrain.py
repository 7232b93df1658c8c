"""tfcli pretrain: text in, model directory out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from tfcli.cli import options
from tfcli.cli.options import LENGTH, RUN, TEXT, argument, flag, option
from tfcli.cli.output import show_json
from tfcli.config.options import DEFAULT_BUDGET, HELD_OUT_BYTES, PretrainConfig
from tfcli.config.resolve import PRESETS, default_of
from tfcli.objectives.table import OBJECTIVES

SIZE = "Size"
ARCHS = "; ".join(f"{name}: {line.does}" for name, line in OBJECTIVES.items()) + "."
ARCH = default_of(PretrainConfig, "model.arch")
CORPUS = "Files, directories, globs, hf:NAME:SPLIT or - for stdin: txt, jsonl, csv, tsv, parquet, token shards."
VAL_FRACTION = f"{default_of(PretrainConfig, 'data.val_fraction')}, at most {HELD_OUT_BYTES // 1000} kB"


def pretrain(
    corpus: Annotated[list[str] | None, argument("CORPUS...", CORPUS)] = None,
    out: options.Out = None,
    resume: options.Resume = False,
    config: options.Config = None,
    sets: Annotated[list[str] | None, options.sets("Any setting, e.g. optim.muon_lr=0.01; repeatable.", RUN)] = None,
    seed: options.Seed = None,
    checkpoint_every: options.CheckpointEvery = None,
    tensorboard: Annotated[bool, flag("--tensorboard", "Also write TensorBoard events.", RUN)] = False,
    as_json: options.ResultAsJson = False,
    budget: Annotated[str | None, option("Wall-clock time: 90s, 10m, 1h.", LENGTH, DEFAULT_BUDGET)] = None,
    steps: options.Steps = None,
    tokens: Annotated[int | None, option("Training tokens.", LENGTH)] = None,
    epochs: Annotated[float | None, option("Passes over the text.", LENGTH)] = None,
    arch: Annotated[str | None, option(ARCHS, SIZE, ARCH)] = None,
    depth: Annotated[int | None, option("Blocks; width, heads and rates follow.", SIZE, "what fits the time")] = None,
    context: Annotated[int | None, option("Context length in tokens.", SIZE, "by depth")] = None,
    batch_size: Annotated[int | None, option("Sequences per step.", SIZE, "by depth")] = None,
    preset: Annotated[str | None, option(f"A named configuration: {', '.join(PRESETS)}.", SIZE)] = None,
    tokenizer: Annotated[
        Path | None, option("A tokenizer.model file or a model directory.", TEXT, "trained on the text")
    ] = None,
    vocab_size: Annotated[int | None, option("Vocabulary of a new tokenizer.", TEXT, "by size of text")] = None,
    val: Annotated[str | None, option("Validate on this file instead.", TEXT)] = None,
    val_fraction: Annotated[float | None, option("Held-out share, from the end.", TEXT, VAL_FRACTION)] = None,
    text_key: options.TextKey = None,
    errors: options.Errors = None,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
) -> None:
    """Pretrain a language model: train a tokenizer, train and evaluate the model, and write a Hugging Face directory.

    Example: tfcli pretrain corpus.txt --budget 10m
    """
    from tfcli.runtime import process_started

    started = process_started()
    from tfcli.cli.live import view
    from tfcli.objectives.table import objective
    from tfcli.train.pretrain import pretrain as run

    settings = {
        "train.steps": steps, "train.tokens": tokens, "train.epochs": epochs, "train.budget": budget,
        "train.batch_size": batch_size, "train.checkpoint_every": checkpoint_every,
        "train.tensorboard": tensorboard or None, "model.arch": arch, "model.depth": depth, "model.context": context,
        "tokenizer.vocab_size": vocab_size, "data.val": val, "data.val_fraction": val_fraction,
        "data.text_key": text_key, "data.errors": errors, "seed": seed,
    }  # fmt: skip
    with view() as listen:
        result = run(
            corpus or [], out=out, tokenizer=tokenizer, settings=settings, preset=preset, config_file=config,
            sets=sets or [], resume=resume, device=device, precision=precision, threads=threads, listen=listen,
            started=started, command=["tfcli", *sys.argv[1:]],
        )  # fmt: skip
    trained = objective(result.arch)
    if as_json:
        record = {"model": str(result.directory), "steps": result.steps, f"val_{trained.score}": result.score}
        show_json({**record, "seconds": round(time.time() - started, 3)})
        return
    score = "" if result.score is None else f" (validation: {result.score:.4f} {trained.unit})"
    print(f"{result.directory}{score}: {trained.next_step(result.directory)}")
