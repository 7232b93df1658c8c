"""Settings of finetuning; each task adds its own by a subclass. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tfcli.config import ranges
from tfcli.config.options import LoraOptions
from tfcli.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, INSIDE_0_1, SEED, SHARE_OF_RUN
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
    val_fraction: Annotated[float, INSIDE_0_1] = 0.1
    """Fraction of the data to hold out otherwise, drawn by the seed and stratified by label; of a text, its end."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are invalid in that encoding: strict stops and says where, replace counts them."""
    context: Annotated[int | None, AT_LEAST_1] = None
    """Maximum tokens of an example; left out: the model's context."""
    strict: bool = False
    """Stop at a row that cannot be used, instead of skipping and counting it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOptim:
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up and decay; biases and norms are not decayed."""

    kind: Literal["adamw", "muon"] | None = None
    """muon: the blocks' matrices by Muon (Jordan et al. 2024), the rest by AdamW; left out: muon from scratch
    and for encoders that ``pretrain`` trained with it."""
    lr: Annotated[float | None, AT_LEAST_0] = None
    """Peak learning rate; left out: 5e-5 at width 768 and as much more or less as a model is narrower or wider, 3e-4 at
    most; 1e-3 for LoRA; where muon is the default 1.5e-3, from scratch 3e-3."""
    muon_lr: Annotated[float | None, AT_LEAST_0] = None
    """Peak learning rate of the matrices under muon; left out: lr x 20 / 3."""
    weight_decay: Annotated[float, AT_LEAST_0] = 0.01
    """Decoupled weight decay of the matrices."""
    beta1: Annotated[float, BELOW_1] = 0.9
    beta2: Annotated[float, BELOW_1] = 0.999
    eps: Annotated[float, ABOVE_0] = 1e-8
    momentum: Annotated[float, BELOW_1] = 0.95
    """Momentum of Muon."""
    warmup: Annotated[float, SHARE_OF_RUN] = 0.06
    """Share of the run over which the rate rises."""
    decay: Annotated[float, SHARE_OF_RUN] = 1.0
    """Last share of the run, over which it falls to zero; never before the rise has ended."""
    clip: Annotated[float, ABOVE_0] = 1.0
    """Maximum gradient norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTrain:
    """Length, batch size, and how often to evaluate."""

    epochs: Annotated[float | None, ABOVE_0] = None
    """Length as passes over the data; left out: 3, or 15 for a new translation model."""
    steps: Annotated[int | None, AT_LEAST_1] = None
    """Length as optimizer steps."""
    batch_size: Annotated[int, AT_LEAST_1] = 32
    """Examples per step, over all micro-batches."""
    micro_batch: Annotated[int | None, AT_LEAST_1] = None
    """Examples per forward pass; left out: about 4,096 tokens."""
    dropout: Annotated[float, BELOW_1] = 0.1
    bucket: Annotated[int, AT_LEAST_1] = 16
    """Batches whose examples are sorted by length together; 1: no sorting."""
    eval_every: Annotated[int | None, AT_LEAST_1] = None
    """Steps between evaluations; left out: once an epoch, twice in a run of few epochs."""
    patience: Annotated[int | None, AT_LEAST_1] = None
    """Stop after this many evaluations without an improvement."""
    sample_every: Annotated[int | None, AT_LEAST_1] = None
    checkpoint_every: Annotated[int | None, AT_LEAST_1] = None
    """Steps between checkpoints; left out: about once a minute."""
    margin: Annotated[float, AT_LEAST_0] = 1.0
    """Standard errors (of an accuracy, or of the F1 of answers) by which an earlier model must lead to be kept over a
    later one: the best of several on few examples is often the luckiest. 0: keep the best all the same."""
    keep: Annotated[int, AT_LEAST_1] = 2
    """Number of newest checkpoints kept; the best model is in the run directory itself."""
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderTrain(FinetuneTrain):
    """Defaults for decoders: few rows per step, for rows of text are long, and no dropout."""

    batch_size: Annotated[int, AT_LEAST_1] = 8
    dropout: Annotated[float, BELOW_1] = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Everything that decides a finetuning run, except the machine and paths."""

    data: FinetuneData = field(default_factory=FinetuneData)
    optim: FinetuneOptim = field(default_factory=FinetuneOptim)
    train: FinetuneTrain = field(default_factory=FinetuneTrain)
    lora: LoraOptions = field(default_factory=LoraOptions)
    seed: Annotated[int, SEED] = 1337


def check(config: FinetuneConfig) -> None:
    """Raise UserError for a number out of its range, two lengths, or settings of LoRA without it."""
    if config.train.steps is not None and config.train.epochs is not None:
        raise UserError("two lengths are given: --epochs and --steps", hint="give one of them")
    ranges.check(config)
    if not config.lora.on and config.lora != LoraOptions():
        raise UserError("settings of LoRA are given, but not --lora", hint="add --lora, or leave them out")
