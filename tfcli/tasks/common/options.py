"""Settings of finetuning; each task adds its own by a subclass. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tfcli.config.options import LoopOptions, LoraOptions
from tfcli.config.ranges import Count, Fraction, NotNegative, Positive, Rate, RunShare, Seed
from tfcli.errors import UserError

EPOCHS = 3.0
"""Default passes over the data."""
LR, LR_WIDTH, MOST_LR = 5e-5, 768, 3e-4
"""Peak learning rate of a pretrained model, at that width (Devlin et al. 2019, A.3). It falls as the width
grows (Yang et al. 2022, table 3), down from what small encoders took best (Turc et al. 2019, 5)."""
NEW_LR = 1e-3
"""Peak learning rate of new weights, LoRA included."""
BESIDE_MUON_LR = 3e-3
"""Peak learning rate of what AdamW updates in a new model under Muon."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneData:
    """The held-out part, and the reading of files."""

    val: str | None = None
    """A validation file."""
    val_fraction: Fraction = 0.1
    """Fraction of the data to hold out otherwise, drawn by the seed and stratified by label; of a text, its end."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are invalid in that encoding: strict stops and says where, replace counts them."""
    context: Count | None = None
    """Maximum tokens of an example; left out: the model's context."""
    strict: bool = False
    """Stop at a row that cannot be used, instead of skipping and counting it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOptim:
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up and decay; biases and norms are not decayed."""

    kind: Literal["adamw", "muon"] | None = None
    """muon: the blocks' matrices by Muon (Jordan et al. 2024), the rest by AdamW; left out: muon from scratch
    and for encoders that ``pretrain`` trained with it."""
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
    """Momentum of Muon."""
    warmup: RunShare = 0.06
    """Share of the run over which the rate rises."""
    decay: RunShare = 1.0
    """Last share of the run, over which it falls to zero; never before the rise has ended."""
    clip: Positive = 1.0
    """Maximum gradient norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTrain(LoopOptions):
    """Length and batch size of finetuning, and which model is kept."""

    batch_size: Count = 32
    """Examples per step, over all micro-batches."""
    dropout: Rate = 0.1
    bucket: Count = 16
    """Batches whose examples are sorted by length together; 1: no sorting."""
    patience: Count | None = None
    """Stop after this many evaluations without improvement."""
    margin: NotNegative = 1.0
    """Standard errors (of an accuracy, or of the F1 of answers) by which an earlier model must lead to be kept over a
    later one: the best of several on few examples is often the luckiest. 0: keep the best all the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderTrain(FinetuneTrain):
    """Defaults for decoders: few rows per step, for rows of text are long, and no dropout."""

    batch_size: Count = 8
    dropout: Rate = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Everything that decides a finetuning run, except the machine and paths."""

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
