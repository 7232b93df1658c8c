"""tfcli finetune: a model and labeled data in, a model directory for a task out."""

from __future__ import annotations

import sys
import time
from typing import Annotated

from tfcli.cli import options
from tfcli.cli.help import by_task, rate
from tfcli.cli.options import LENGTH, RUN, TEXT, argument, flag, option
from tfcli.cli.output import note, show_json
from tfcli.tasks.applications import APPLICATIONS, application, configs
from tfcli.tasks.common.options import BESIDE_MUON_LR, EPOCHS, LR, LR_WIDTH, MOST_LR, NEW_LR
from tfcli.tasks.translate.options import NEW_EPOCHS

DATA = "Files: jsonl, json, csv, tsv, parquet, txt, CoNLL; or hf:NAME:SPLIT."
TASKS = " or".join(", ".join(APPLICATIONS).rsplit(",", 1)) + "."
EPOCHS_SHOWN = f"{EPOCHS:g}; {NEW_EPOCHS:g} for translate from scratch"
LR_SHOWN = (
    f"{rate(LR)} x {LR_WIDTH} / width, at most {rate(MOST_LR)}; {rate(NEW_LR)} with --lora; "
    f"{rate(BESIDE_MUON_LR)} from scratch"
)
BATCH_SIZE, VAL_FRACTION = (by_task(key, configs()) for key in ("train.batch_size", "data.val_fraction"))
FROM_SCRATCH = "Use only the shape and tokenizer of MODEL; translate needs no MODEL."
LORA = "Train LoRA adapters instead of all weights; --set lora.rank=, .alpha=, .targets=."


def finetune(
    model: Annotated[str | None, argument("MODEL", "Model directory, from tfcli or Hugging Face.")] = None,
    data: Annotated[list[str] | None, argument("DATA...", DATA)] = None,
    task: Annotated[str | None, option(TASKS, RUN)] = None,
    out: options.Out = None,
    resume: options.Resume = False,
    from_scratch: Annotated[bool, flag("--from-scratch", FROM_SCRATCH, RUN)] = False,
    lora: Annotated[bool, flag("--lora", LORA, RUN)] = False,
    config: options.Config = None,
    sets: Annotated[list[str] | None, options.sets("Any setting, e.g. data.label_key=topic; repeatable.", RUN)] = None,
    seed: options.Seed = None,
    checkpoint_every: options.CheckpointEvery = None,
    as_json: options.ResultAsJson = False,
    epochs: Annotated[float | None, option("Passes over the data.", LENGTH, EPOCHS_SHOWN)] = None,
    steps: options.Steps = None,
    batch_size: Annotated[int | None, option("Examples per step.", LENGTH, BATCH_SIZE)] = None,
    lr: Annotated[float | None, option("Peak learning rate.", LENGTH, LR_SHOWN)] = None,
    patience: Annotated[
        int | None, option("Stop after this many evaluations without improvement.", LENGTH, "never")
    ] = None,
    val: Annotated[str | None, option("Validate on this file or hf:NAME:SPLIT.", TEXT)] = None,
    val_fraction: Annotated[
        float | None, option("Else hold out this share, drawn by --seed; for lm, the end.", TEXT, VAL_FRACTION)
    ] = None,
    encoding: options.Encoding = None,
    errors: options.Errors = None,
    strict: options.Strict = False,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
) -> None:
    """Finetune a model for a task on labeled data and keep the model with the best validation score.

    Example: tfcli finetune all-MiniLM-L6-v2 reviews.csv --task classify --out runs/reviews
    """
    from tfcli.runtime import process_started

    started = process_started()
    from tfcli.cli.live import view
    from tfcli.train.finetune import finetune as run

    settings = {
        "train.epochs": epochs, "train.steps": steps, "train.batch_size": batch_size, "train.patience": patience,
        "train.checkpoint_every": checkpoint_every, "optim.lr": lr, "data.val": val, "data.val_fraction": val_fraction,
        "data.encoding": encoding, "data.errors": errors, "data.strict": strict or None, "lora.on": lora or None,
        "seed": seed,
    }  # fmt: skip
    with view() as listen:
        result = run(
            model, data or [], task=task, out=out, settings=settings, config_file=config, sets=sets or [],
            from_scratch=from_scratch, resume=resume, device=device, precision=precision, threads=threads,
            listen=listen, started=started, command=["tfcli", *sys.argv[1:]],
        )  # fmt: skip
    for line in result.lines:
        note(line)
    if as_json:
        record = {"model": str(result.directory), "steps": result.steps, **result.scores}
        show_json({**record, "seconds": round(time.time() - started, 3)})
    else:
        print(f"{result.directory}: {application(result.task).next_step(result.directory)}")
