"""The settings of pretraining, and those that finetuning and generation share with it.

``None`` means that the plan decides; ``run.json`` then holds what it decided. Standard library only, so that ``--help``
stays instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tfcli.config.ranges import Count, Fraction, NotNegative, Positive, Range, Rate, RunShare, Seed, Share

DEFAULT_BUDGET = "10m"
"""Default length of a pretraining run."""
HELD_OUT_BYTES = 500_000
"""Largest validation split of a pretraining text, unless its fraction was given."""
DEFAULT_VOCAB_SIZE = 8192
"""The default vocabulary of a new tokenizer, if there is enough text."""
MAX_TOKENS = 256
"""Most new tokens of a text, where ``Sampling.max_tokens`` is left out."""
WINDOW_TOKENS = 2048
"""Most tokens of a scored window, unless asked for: the cost of attention is quadratic."""
WARMUP_STEPS = 10
"""Steps of warm-up where ``OptimOptions.warmup`` is left out."""
WarmupShare = Annotated[
    float,
    Range(
        at_least=0,
        below=1,
        hint=f"it is a share of the run, from 0 to 1, not a number of steps; left out it is {WARMUP_STEPS} steps",
    ),
]
Size = Annotated[int, Range(at_least=1, hint="it must be at least 1; leave it out to let it follow")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """The shape of a new model; what is left out follows from ``depth``."""

    arch: str = "gpt"
    """gpt: a decoder that continues text; bert: an encoder that predicts masked tokens; transformer: an
    encoder-decoder that predicts masked spans; lstm: a recurrent baseline with as many parameters as the GPT."""
    depth: Size | None = None
    """Number of blocks, from which width, heads and learning rate follow."""
    context: Size | None = None
    """Longest sequence, in tokens."""
    width: Size | None = None
    """Residual stream width; must be a multiple of ``heads``."""
    heads: Size | None = None
    """Query heads."""
    kv_heads: Size | None = None
    """Key/value heads; fewer than ``heads`` is grouped-query attention."""
    ffn_width: Size | None = None
    """Inner width of the feed-forward layer."""
    tied: bool = True
    """True if embedding and output head share their weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerOptions:
    """Settings of tokenizer training (SentencePiece, Kudo and Richardson 2018)."""

    type: Literal["bpe", "unigram"] = "bpe"
    """Algorithm: byte-pair encoding (Sennrich et al. 2016) or unigram (Kudo 2018)."""
    vocab_size: Count | None = None
    """Number of tokens; left out, it follows from the size of the corpus."""
    character_coverage: float = 0.9995
    """Share of characters that get a token of their own; the rest fall back to bytes."""
    user_symbols: tuple[str, ...] = ()
    """Strings that are always one token."""
    sample_bytes: Count = 50_000_000
    """Bytes of text to train on, sampled evenly from the corpus."""
    trainer: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Further options of SentencePiece's trainer, by their own names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """Which text is read, and how."""

    val_fraction: float = 0.1
    """Share held out for validation, from the end; unless set, at most 500 kB of text."""
    val: str | None = None
    """File, directory or glob to use for validation instead."""
    text_key: str | None = None
    """Field or column with the text; left out: text, content, or the only one with strings."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8: report where and stop, or replace and count it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimOptions:
    """Muon on the blocks' matrices (Jordan et al. 2024), AdamW (Loshchilov and Hutter 2019) on the rest."""

    muon_lr: NotNegative | None = None
    """Peak learning rate of the blocks' matrices."""
    lr: NotNegative | None = None
    """Peak learning rate of embeddings, head and norms."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of the matrices."""
    beta1: Rate = 0.8
    """AdamW's first-moment decay."""
    beta2: Rate = 0.95
    """AdamW's second-moment decay."""
    momentum: Rate = 0.95
    """Muon's Nesterov momentum."""
    warmup: WarmupShare | None = None
    """Share of the run over which the rates rise linearly; left out: 10 steps."""
    decay: RunShare = 0.7
    """Share of the run, at its end, over which the rates fall to zero."""
    clip: Positive = 1.0
    """Largest gradient norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """Adapters of frozen matrices: ``W + (alpha / rank) B A`` (Hu et al. 2021)."""

    on: bool = False
    """True to train adapters in place of all weights."""
    rank: Count = 8
    """Inner width of an adapter."""
    alpha: Positive = 16.0
    """Scale of the change, divided by the rank."""
    targets: tuple[str, ...] = ()
    """Layers by the end of their name, such as q,v or ffn.up; empty: all linear layers of the blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopOptions:
    """Length, batch size, and intervals of evaluations and checkpoints, of any run."""

    steps: Count | None = None
    """Length in optimizer steps."""
    epochs: Positive | None = None
    """Length in epochs; finetuning, left out: 3, of a new model that translates 15."""
    micro_batch: Count | None = None
    """Sequences per forward pass; gradients of the batch are accumulated."""
    eval_every: Count | None = None
    """Steps between evaluations; left out: often at first, then less often, or in finetuning once an epoch, twice where
    there are only a few."""
    sample_every: Count | None = None
    """Steps between samples; left out: at every fourth evaluation."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; left out: about once a minute."""
    keep: Count = 2
    """Newest checkpoints kept; the best model is in the run directory itself."""
    tensorboard: bool = False
    """Also write TensorBoard events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(LoopOptions):
    """Length and batch size of pretraining."""

    tokens: Count | None = None
    """Length in training tokens."""
    budget: str | None = None
    """Length in wall-clock time: 90s, 10m, 1h30m."""
    batch_size: Count | None = None
    """Sequences per step, over all micro-batches."""
    dropout: Rate | None = None
    """Dropout from the second epoch on, when the text begins to repeat."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: only for runs long enough to repay it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskOptions:
    """Which tokens are masked in pretraining an encoder (Devlin et al. 2019, 3.1)."""

    rate: Fraction = 0.3
    """Share of the tokens that are targets; more than BERT's 0.15 (Wettig et al. 2023; ModernBERT)."""
    mask_share: Share = 0.8
    """Share of the targets that is replaced by [MASK]."""
    random_share: Share = 0.1
    """Share of the targets that is replaced by a random token; the rest is unchanged."""
    whole_words: bool = False
    """Mask whole words, not single tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanOptions:
    """Which spans are masked in pretraining an encoder-decoder (Raffel et al. 2020, 3.1.4)."""

    rate: Fraction = 0.15
    """Share of the tokens that is masked."""
    mean_length: Annotated[float, Range(at_least=1)] = 3.0
    """Mean length of a masked span, in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """All settings of a pretraining run except machine and paths."""

    model: ModelOptions = field(default_factory=ModelOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    mlm: MaskOptions = field(default_factory=MaskOptions)
    spans: SpanOptions = field(default_factory=SpanOptions)
    seed: Seed = 1337


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Settings of sampling; the filters apply in the order of the fields."""

    max_tokens: int | None = None
    """Most new tokens; left out: 256, or what the context leaves."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens already seen (Keskar et al. 2019); 1 is off."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it; 0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens (Fan et al. 2018); 0 is off."""
    top_p: float = 0.95
    """Keep the likeliest tokens up to this total probability (Holtzman et al. 2020); 1 is off."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the likeliest (Nguyen et al. 2024); 0 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end the text and are not part of it."""
    ignore_eos: bool = False
    """Continue past the end-of-text token."""
    num_samples: int = 1
    """Continuations of each prompt."""
    seed: int | None = None
    """Seed of the draws; left out: random, and reported by --json."""
    overflow: Literal["error", "slide"] = "error"
    """When the context is full: stop, or slide the window."""
