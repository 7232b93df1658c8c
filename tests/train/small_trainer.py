"""A Trainer on numbers: ids from a formula, so that neither files nor a tokenizer's training decide the losses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

from tfcli.config.options import PretrainConfig
from tfcli.config.resolve import resolve
from tfcli.model.transformer import Transformer, initialize
from tfcli.tasks.lm.task import LanguageModeling
from tfcli.text.corpus.shards import Shard, ShardWriter
from tfcli.train.checkpoint import TrainState
from tfcli.train.events import Event
from tfcli.train.metrics import Metrics
from tfcli.train.optim import Optimizers
from tfcli.train.plan import Plan
from tfcli.train.pretrain import loop_of
from tfcli.train.run import Run
from tfcli.train.trainer import Trainer

OPEN: list[Metrics] = []
"""Files that a fixture closes after each test, also one that ends in the middle of a run."""


def shard(path: Path, tokens: int) -> Shard:
    """Ids below 300 that follow a rule which can be learned: mostly, the two before decide the next."""
    ids = np.zeros(tokens, dtype=np.int64)
    for i in range(2, tokens):
        ids[i] = (3 * ids[i - 1] + ids[i - 2] + (i * i % 7 == 0) * i) % 300
    tokenizer = tiny_models.tokenizer()
    with ShardWriter(path, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size) as writer:
        writer.write(ids)
        writer.count(documents=1, bytes=2 * tokens)
    return Shard.open(path)


def task(folder: Path, *, tokens: int = 1200, context: int = 16) -> LanguageModeling:
    """The ids as a task."""
    return LanguageModeling(
        train=shard(folder / "train.bin", tokens),
        val=shard(folder / "val.bin", 100),
        tokenizer=tiny_models.tokenizer(),
        context=context,
        runtime=tiny_models.cpu(),
    )


def trainer(
    folder: Path,
    *,
    micro_batch: int = 8,
    dropout: float = 0.0,
    steps: int = 20,
    stop: Callable[[], bool] = lambda: False,
    listen: Callable[[Event], None] = lambda event: None,
    settings: dict[str, Any] | None = None,
    **of_task: Any,
) -> Trainer:
    """A trainer of two small blocks in ``folder``, with a clock that ticks a millisecond a look."""
    config = resolve(PretrainConfig, flags=settings)[0]
    shape = tiny_models.config(context=of_task.get("context", 16))
    model = Transformer(shape)
    initialize(model, seed=7)
    ticks = itertools.count()
    OPEN.append(Metrics(folder))
    return Trainer(
        run=Run(
            directory=folder,
            specs=[],
            config=config,
            sources={},
            runtime=tiny_models.cpu(),
            tell=listen,
            clock=lambda: next(ticks) / 1000,
            stop=stop,
        ),
        model=model,
        task=task(folder, **of_task),
        plan=Plan(
            model=shape,
            steps=steps,
            max_steps=steps,
            budget=None,
            batch_size=8,
            micro_batch=micro_batch,
            dropout=dropout,
            muon_lr=0.02,
            lr=0.01,
            compile=False,
        ),
        loop=loop_of(config),
        state=TrainState(),
        optimizers=Optimizers(model, config.optim, muon_lr=0.02, lr=0.01),
        metrics=OPEN[-1],
        save_model=lambda weights: None,
    )


def rows(made: Trainer, count: int = 8) -> Any:
    """The first examples."""
    zeros = np.zeros(count, dtype=np.int64)
    return made.task.rows(np.arange(count, dtype=np.int64), zeros)
