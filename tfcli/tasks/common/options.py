"""Settings of finetuning, beside those of pretraining in ``config``; a task adds its own by a subclass in its file.

Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tfcli.config.options import LoraOptions
from tfcli.errors import UserError

EPOCHS = 3.0
"""Passes over the data where no length is given."""
LR, LR_WIDTH, MOST_LR = 5e-5, 768, 3e-4
"""Peak learning rate of a model that was trained before, at that width (Devlin et al. 2019, A.3). It falls as the width
grows (Yang et al. 2022, table 3), down from what small encoders took best (Turc et al. 2019, 5)."""
NEW_LR = 1e-3
"""Of what is new, also LoRA."""
BESIDE_MUON_LR = 3e-3
"""Of a new model under Muon, of what AdamW has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneData:
    """Where the held-out part comes from, and how files are read."""

    val: str | None = None
    """A file to hold out."""
    val_fraction: float = 0.1
    """Else this part of the data, drawn by the seed, of classes alike; of a text its end."""
    encoding: str = "utf-8"
    """Of text files."""
    errors: Literal["strict", "replace"] = "strict"
    """What is invalid in that encoding: stop and say where, or replace and count."""
    context: int | None = None
    """Tokens of an example at most; left out: what the model has."""
    strict: bool = False
    """Rows that cannot be used stop the run, instead of being counted and left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOptim:
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up and decay; biases and norms are not decayed."""

    kind: Literal["adamw", "muon"] | None = None
    """muon: the blocks' matrices by Muon (Jordan et al. 2024), the rest by AdamW; left out: muon from scratch
    and for encoders that ``pretrain`` made with it."""
    lr: float | None = None
    """Peak learning rate; left out: 5e-5 at width 768 and as much more or less as a model is narrower or wider, 3e-4 at
    most; 1e-3 for LoRA; where muon is the default 1.5e-3, from scratch 3e-3."""
    muon_lr: float | None = None
    """Peak learning rate of the matrices under muon; left out: lr x 20 / 3."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the matrices."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon's."""
    warmup: float = 0.06
    """Share of the run over which the rate rises."""
    decay: float = 1.0
    """Last part of the run over which it falls to zero; it begins no sooner than the rise has ended."""
    clip: float = 1.0
    """Largest gradient norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTrain:
    """How long, how much at once, and how often to look."""

    epochs: float | None = None
    """Length as passes over the data; left out: 3, of a new model that translates 15."""
    steps: int | None = None
    """Length as optimizer steps."""
    batch_size: int = 32
    """Examples a step, over all micro-batches."""
    micro_batch: int | None = None
    """Examples at once; left out: about 4,096 tokens."""
    dropout: float = 0.1
    bucket: int = 16
    """Batches whose examples are sorted by length among each other; 1: none are."""
    eval_every: int | None = None
    """Steps between evaluations; left out: once an epoch, twice where there are only a few."""
    patience: int | None = None
    """Stop after this many evaluations without a better one."""
    sample_every: int | None = None
    checkpoint_every: int | None = None
    """Steps between checkpoints; left out: about once a minute."""
    margin: float = 1.0
    """Standard errors of an accuracy, or of the F1 of answers, by which an earlier model must be ahead to be kept for a
    later one. The best of several on few examples is the luckiest; 0: it is kept all the same."""
    keep: int = 2
    """Newest checkpoints kept; the best model is in the run directory itself."""
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderTrain(FinetuneTrain):
    """Rows of text are long, so a step takes few; decoders are finetuned without dropout."""

    batch_size: int = 8
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Everything that decides a finetuning run, machine and paths apart."""

    data: FinetuneData = field(default_factory=FinetuneData)
    optim: FinetuneOptim = field(default_factory=FinetuneOptim)
    train: FinetuneTrain = field(default_factory=FinetuneTrain)
    lora: LoraOptions = field(default_factory=LoraOptions)
    seed: int = 1337


def check(config: FinetuneConfig) -> None:
    """Raise UserError for a number that means nothing, or two lengths."""
    train, optim, data = config.train, config.optim, config.data
    if train.steps is not None and train.epochs is not None:
        raise UserError("two lengths are given: --epochs and --steps", hint="give one of them")
    at_least_1 = ("steps", "batch_size", "micro_batch", "bucket", "eval_every", "patience", "sample_every")
    for name in (*at_least_1, "checkpoint_every", "keep"):
        value = getattr(train, name)
        if value is not None and value < 1:
            raise UserError(f"train.{name} is {value}", hint="it must be at least 1")
    for key, number in {"train.epochs": train.epochs, "optim.clip": optim.clip, "optim.eps": optim.eps}.items():
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"{key} is {number}", hint="it must be more than 0")
    if not 0 <= train.margin < math.inf:
        raise UserError(f"train.margin is {train.margin}", hint="it must be at least 0")
    for name in ("lr", "muon_lr", "weight_decay"):
        number = getattr(optim, name)
        if number is not None and not 0 <= number < math.inf:
            raise UserError(f"optim.{name} is {number}", hint="it must be at least 0")
    shares = {"optim.beta1": optim.beta1, "optim.beta2": optim.beta2, "optim.momentum": optim.momentum}
    for key, number in {**shares, "train.dropout": train.dropout}.items():
        if not 0 <= number < 1:
            raise UserError(f"{key} is {number}", hint="it must be at least 0 and below 1")
    for key, number in {"optim.warmup": optim.warmup, "optim.decay": optim.decay}.items():
        if not 0 <= number <= 1:
            raise UserError(f"{key} is {number}", hint="it is a part of the run, from 0 to 1")
    if config.lora.rank < 1:
        raise UserError(f"lora.rank is {config.lora.rank}", hint="it must be at least 1")
    if not 0 < config.lora.alpha < math.inf:
        raise UserError(f"lora.alpha is {config.lora.alpha}", hint="it must be more than 0")
    if not config.lora.on and config.lora != LoraOptions():
        raise UserError("settings of LoRA are given, but not --lora", hint="add --lora, or leave them out")
    if not 0 < data.val_fraction < 1:
        raise UserError(f"data.val_fraction is {data.val_fraction}", hint="it must be between 0 and 1")
    if data.context is not None and data.context < 1:
        raise UserError(f"data.context is {data.context}", hint="it must be at least 1")
    if not -(2**63) <= config.seed < 2**63:
        raise UserError(f"seed is {config.seed}", hint="it must fit into 64 bits")
