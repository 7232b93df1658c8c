"""Settings of finetuning, beside those of pretraining in ``config``; a task adds its own by a subclass in its file.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tfcli.config.options import LoopOptions, LoraOptions
from tfcli.config.ranges import Count, Fraction, NotNegative, Positive, Rate, RunShare, Seed
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
    val_fraction: Fraction = 0.1
    """Else this part of the data, drawn by the seed, of classes alike; of a text its end."""
    encoding: str = "utf-8"
    """Of text files."""
    errors: Literal["strict", "replace"] = "strict"
    """What is invalid in that encoding: stop and say where, or replace and count."""
    context: Count | None = None
    """Tokens of an example at most; left out: what the model has."""
    strict: bool = False
    """Rows that cannot be used stop the run, instead of being counted and left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOptim:
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up and decay; biases and norms are not decayed."""

    kind: Literal["adamw", "muon"] | None = None
    """muon: the blocks' matrices by Muon (Jordan et al. 2024), the rest by AdamW; left out: muon from scratch
    and for encoders that ``pretrain`` made with it."""
    lr: NotNegative | None = None
    """Peak learning rate; left out: 5e-5 at width 768 and as much more or less as a model is narrower or wider, 3e-4 at
    most; 1e-3 for LoRA; where muon is the default 1.5e-3, from scratch 3e-3."""
    muon_lr: NotNegative | None = None
    """Peak learning rate of the matrices under muon; left out: lr x 20 / 3."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of the matrices."""
    beta1: Rate = 0.9
    beta2: Rate = 0.999
    eps: Positive = 1e-8
    momentum: Rate = 0.95
    """Muon's."""
    warmup: RunShare = 0.06
    """Share of the run over which the rate rises."""
    decay: RunShare = 1.0
    """Last part of the run over which it falls to zero; it begins no sooner than the rise has ended."""
    clip: Positive = 1.0
    """Largest gradient norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTrain(LoopOptions):
    """Length and batch size of finetuning, and which model is kept."""

    batch_size: Count = 32
    """Examples per step, over all micro-batches."""
    dropout: Rate = 0.1
    bucket: Count = 16
    """Batches whose examples are sorted by length among each other; 1: none are."""
    patience: Count | None = None
    """Stop after this many evaluations without improvement."""
    margin: NotNegative = 1.0
    """Standard errors of an accuracy, or of the F1 of answers, by which an earlier model must be better to be kept over
    a later one. The best of several on few examples is the luckiest; 0: it is kept all the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderTrain(FinetuneTrain):
    """Rows of text are long, so a step takes few; decoders are finetuned without dropout."""

    batch_size: Count = 8
    dropout: Rate = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Everything that decides a finetuning run, machine and paths apart."""

    data: FinetuneData = field(default_factory=FinetuneData)
    optim: FinetuneOptim = field(default_factory=FinetuneOptim)
    train: FinetuneTrain = field(default_factory=FinetuneTrain)
    lora: LoraOptions = field(default_factory=LoraOptions)
    seed: Seed = 1337


def check(config: FinetuneConfig) -> None:
    """Raise UserError for two lengths, or settings of LoRA without it."""
    if config.train.steps is not None and config.train.epochs is not None:
        raise UserError("two lengths are given: --epochs and --steps", hint="give one of them")
    if not config.lora.on and config.lora != LoraOptions():
        raise UserError("settings of LoRA are given, but not --lora", hint="add --lora, or leave them out")
