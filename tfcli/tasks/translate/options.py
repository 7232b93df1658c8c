"""Settings of ``finetune --task translate``."""

from __future__ import annotations

from dataclasses import dataclass, field

from tfcli.config.options import TokenizerOptions
from tfcli.config.ranges import Count, Rate
from tfcli.tasks.common.options import FinetuneConfig, FinetuneData, FinetuneTrain

NEW_EPOCHS = 15.0
"""Default passes over the pairs for a new model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairData(FinetuneData):
    """Columns of tables. ``val`` may be two aligned files with a comma between, as the data may be two files."""

    source: str | None = None
    """Column with the text to translate; left out: source, src, the first language, or the first of two columns."""
    target: str | None = None
    """Column with its translation; left out: target, tgt, the second language, or the second of two columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTrain(FinetuneTrain):
    """Larger batches than for other tasks, for sentences are short."""

    batch_size: Count = 128
    """Pairs per step, over all micro-batches."""
    dropout: Rate = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class NewModel:
    """The shape of a new encoder-decoder (--from-scratch); what is left out follows from the number of pairs."""

    depth: int | None = None
    """Blocks of the encoder, and of the decoder; left out: 3 below 200,000 pairs, else 6."""
    width: int | None = None
    """Width of the residual stream; left out: 256 or 512. Heads are 64 wide, feed-forward layers four times that."""
    context: int = 256
    """Maximum tokens of a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TranslateOptions:
    """The loss and the search."""

    label_smoothing: Rate = 0.1
    """Share of the probability that is spread over the vocabulary (Szegedy et al. 2016)."""
    beam: Count = 4
    """Beam width; 1 is greedy."""
    length_penalty: float = 1.0
    """alpha of log P(Y) / |Y|^alpha."""
    watch: Count = 200
    """Held-out pairs that each evaluation translates, greedily; the final report translates all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TranslateConfig(FinetuneConfig):
    """Everything that decides a run of translation."""

    data: PairData = field(default_factory=PairData)
    train: PairTrain = field(default_factory=PairTrain)
    translate: TranslateOptions = field(default_factory=TranslateOptions)
    model: NewModel = field(default_factory=NewModel)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
