"""From a corpus, a machine and what a person fixed: the size of the model and the length of its training.

What is left open follows from one dial, the depth, and the depth from the time there is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
)
from tfcli.config.options import ModelOptions, PretrainConfig, SpanOptions
from tfcli.config.resolve import seconds
from tfcli.errors import UserError
from tfcli.model import lstm
from tfcli.model.cost import pair_flops, parameters, training_flops
from tfcli.model.layers import FeedForward, RMSNorm
from tfcli.objectives import spans
from tfcli.objectives.masked import check_shares
from tfcli.runtime import Runtime
from tfcli.tasks.translate.new_model import ARCHITECTURE as ENCODER_DECODER

DEFAULT_BUDGET = "10m"
LENGTHS = ("steps", "tokens", "epochs", "budget")
DEFAULT_EPOCHS, MAX_EPOCHS = 8, 40
"""Passes over the text at most: of a run whose length is not given, and of one with a budget. Beyond the first a small
text is learnt by heart faster than it teaches, beyond the second nothing is left (Muennighoff et al. 2023, 6)."""
PARAMETERS_PER_TOKEN = 5
"""Most parameters of the blocks for each token of the text; more learn it by heart at once."""
TOKENS_PER_PARAMETER = 5
"""Least tokens for each parameter of the blocks. Compute-optimal is 20 (Hoffmann et al. 2022, table 3), but the optimum
is flat, and a model that is somewhat too large for its first run is the better one to continue."""
COMPILE_PAYS_AFTER = 600.0
"""Seconds of planned training on a GPU beyond which compiling is repaid. On CPU the kernels by hand are faster."""
MICRO_TOKENS = 8192
"""Tokens at once; a larger batch is accumulated."""
FIRST_EVALUATION = 70
"""Steps before the first look at the held-out text."""
LSTM_LR = 1e-2
"""Peak rate of an LSTM's AdamW, at a width of 192 or less."""
PROBE_STEPS = 24
"""Steps after which the length of a run with a time budget is settled from its measured speed."""

ENCODER = Architecture(
    causal=False,
    norms=NormConfig(kind="layer", first=False),
    attention=AttentionConfig(qk_norm=False),
    feed_forward=FeedForwardConfig(activation="gelu"),
    embedding=EmbeddingConfig(norm=True),
)
"""Of a new encoder: ModernBERT's (Warner et al. 2024)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run will do; ``steps`` is None while a time budget waits for the machine's measured speed."""

    model: ModelConfig
    steps: int | None
    max_steps: int
    """As long as the corpus supports."""
    budget: float | None
    """Seconds of wall-clock time from the start of the process, or None."""
    batch_size: int
    micro_batch: int
    dropout: float
    muon_lr: float
    lr: float
    compile: bool
    dropout_from: int = 1
    """The first epoch with dropout: text that is seen for the first time cannot be learnt by heart."""
    bucket: int = 1
    """Batches among which examples are sorted by length, where they have lengths."""
    patience: int | None = None
    """Evaluations without a better one after which the run ends."""
    margin: float = 0.0
    """Standard errors of the score by which an earlier model must be ahead to be kept for a later one."""
    window: int | None = None
    """Tokens of the text in an example, where these are not the context."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the text in one optimizer step."""
        return self.batch_size * (self.window or self.model.context)


def vocab_size(text_bytes: int, config: PretrainConfig) -> int:
    """Pieces for a corpus of that many bytes: 4096 for 1 MB, twice as many for every ten times as much.

    At most 8192, or 32768 for a model of more than 8 blocks or a run of more than an hour: the head of a small model
    would cost more than all of its blocks.
    """
    exponent = 12 + math.log10(max(text_bytes, 1) / 1e6)
    large = (config.model.depth or 0) > 8 or (_budget(config) or 0.0) > 3600
    return int(min(32768 if large else 8192, max(512, 2 ** round(exponent))))


def shape(options: ModelOptions, *, depth: int, vocab_size: int) -> ModelConfig:
    """The model of a depth: width 64 a block, heads of 64, a feed-forward of 8/3 of the width (Shazeer 2020, 2).

    An encoder is wired as ModernBERT, each layer of which sees all. An encoder-decoder has as many blocks in each of
    its two stacks, is a third wider and has a feed-forward of four times the width: that of finetune --from-scratch. Of
    an LSTM it is the decoder that it is compared with.
    """
    pairs = options.arch == "transformer"
    width = options.width or 64 * (math.ceil(4 * depth / 3) if pairs else depth)
    heads = options.heads or max(1, width // 64)
    if width % heads:
        raise UserError(
            f"a width of {width} cannot be divided into {heads} heads",
            hint=f"choose a width that is a multiple of {heads}, or other heads",
        )
    return ModelConfig(
        vocab_size=vocab_size,
        context=options.context or (128 if depth <= 4 else 256 if depth <= 8 else 512),
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=options.kv_heads or heads,
        head_width=width // heads,
        ffn_width=options.ffn_width or (4 * width if pairs else math.ceil(8 * width / 3 / 64) * 64),
        tied=options.tied,
        norm_eps=1e-5 if options.arch in ("bert", "transformer") else 1e-6,
        encoder_depth=depth if pairs else 0,
        architecture={"bert": ENCODER, "transformer": ENCODER_DECODER}.get(options.arch, Architecture()),
    )


def flops_per_second(runtime: Runtime) -> float:
    """What the machine does on work of the kind: a feed-forward layer with its norm, there and back, on 1024 tokens."""
    config = shape(ModelOptions(), depth=3, vocab_size=512)
    layer = torch.nn.Sequential(RMSNorm(config.width, 1e-6), FeedForward(config)).to(runtime.device)
    for p in layer.parameters():
        torch.nn.init.constant_(p, 0.01)
    x = torch.ones(8, 128, config.width, dtype=runtime.dtype, device=runtime.device, requires_grad=True)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        layer(x).sum().backward()
        runtime.synchronize()
        best = min(best, time.perf_counter() - start)
    return 6.0 * sum(p.numel() for p in layer.parameters()) * 1024 / best


def make(
    config: PretrainConfig,
    *,
    vocab_size: int,
    train_tokens: int,
    runtime: Runtime,
    on_note: Callable[[str], None] | None = None,
) -> Plan:
    """Decide what ``config`` leaves open. ``train_tokens`` is the length of the encoded training text.

    ``on_note`` is told what is smaller than usual because the text is. Raises UserError for sizes that cannot be.
    """
    options, train, optim = config.model, config.train, config.optim
    check(config)
    budget = _budget(config)
    if options.depth is not None:
        depth = options.depth
    else:
        depth = _depth(config, vocab_size, train_tokens, budget or seconds(DEFAULT_BUDGET), runtime)
    model = shape(options, depth=depth, vocab_size=vocab_size)
    most = max(8, (train_tokens - 1) // 2)
    if options.context is None and model.context > most:
        if on_note and most < train_tokens:
            on_note(f"context {most} instead of {model.context}: the training text has only {train_tokens:,} tokens")
        model = replace(model, context=most)
    batch = train.batch_size or _batch_size(model, train_tokens)
    micro = min(train.micro_batch or max(1, MICRO_TOKENS // model.context), batch)
    _check_data(model, train_tokens, batch)
    window = spans.window(model.context, config.spans) if options.arch == "transformer" else model.context
    tokens_per_step = batch * window
    epoch_steps = max(1, (train_tokens - 1) // tokens_per_step)
    passes = MAX_EPOCHS if train.budget is not None else DEFAULT_EPOCHS
    max_steps = max(1, passes * (train_tokens - 1) // tokens_per_step)
    steps = train.steps
    if train.tokens is not None:
        steps = max(1, math.ceil(train.tokens / tokens_per_step))
    elif train.epochs is not None:
        steps = max(1, math.ceil(train.epochs * (train_tokens - 1) / tokens_per_step))
    repeats = (steps or max_steps) / epoch_steps
    slower = min(1.0, (192 / model.width) ** 0.5)
    recurrent = options.arch == "lstm"
    return Plan(
        model=lstm.like(model) if recurrent else model,
        steps=steps,
        max_steps=max_steps,
        budget=budget,
        batch_size=batch,
        micro_batch=micro,
        dropout=train.dropout if train.dropout is not None else (0.2 if repeats > 12 else 0.1 if repeats > 4 else 0.0),
        muon_lr=optim.muon_lr if optim.muon_lr is not None else 0.02,
        lr=optim.lr if optim.lr is not None else (LSTM_LR if recurrent else 0.02) * slower,
        compile=not recurrent
        and (train.compile == "on" or (train.compile == "auto" and _compiling_pays(runtime, budget))),
        window=None if window == model.context else window,
    )


def evaluation_steps(steps: int | None) -> Iterator[int]:
    """The steps at which the held-out text is scored unless fixed: 70 x 1.25^k, gaps a fifteenth of the run at most.

    Learning is fast at first. The last step is scored beside these.
    """
    largest = max(FIRST_EVALUATION, (steps or 2**40) // 15)
    at = float(FIRST_EVALUATION)
    while True:
        yield round(at)
        at = min(at * 1.25, at + largest)


def evaluation(step: int, *, steps: int | None, every: int | None) -> int | None:
    """Which evaluation, from 0, is due at ``step``, with ``every`` so many steps or by the ladder; None for no one."""
    if every is not None:
        return step // every - 1 if step and step % every == 0 else None
    number, at = next((number, at) for number, at in enumerate(evaluation_steps(steps)) if at >= step)
    return number if at == step else None


def decay_start(steps: int, decay: float) -> int:
    """The step at which the rates of a run of ``steps`` begin to fall."""
    return round(steps * (1 - decay))


def settle(
    plan: Plan, *, elapsed: float, step: int, step_seconds: float, evaluation_seconds: float, every: int | None = None
) -> int:
    """The number of steps that ends a budgeted run in time, from its measured speed; at most what the corpus supports.

    Evaluations, the last one and one ``every`` so many steps or by the ladder, are paid for, and a twentieth is kept
    for checkpoints, samples and the end.
    """
    assert plan.budget is not None
    left = 0.95 * (plan.budget - elapsed) - evaluation_seconds
    if every is not None:
        return max(step + 1, min(step + int(left / (step_seconds + evaluation_seconds / every)), plan.max_steps))
    steps = step
    for _ in range(4):  # more steps, more evaluations: settles quickly
        evaluations = next(number for number, at in enumerate(evaluation_steps(steps)) if at >= steps)
        steps = step + max(1, int((left - evaluations * evaluation_seconds) / step_seconds))
    return max(step + 1, min(steps, plan.max_steps))


def _budget(config: PretrainConfig) -> float | None:
    """Seconds, where time decides the length; raises UserError where two lengths are given."""
    train = config.train
    given = [name for name in LENGTHS if getattr(train, name) is not None]
    if len(given) > 1:
        raise UserError(f"two lengths are given: --{' and --'.join(given)}", hint="give one of them")
    if given and given[0] != "budget":
        return None
    return seconds(train.budget or DEFAULT_BUDGET)


def one_length(config: PretrainConfig, sources: Mapping[str, str]) -> PretrainConfig:
    """``config`` with only the lengths of the highest layer that gives one: a flag replaces a preset's steps."""
    given = {name: sources[f"train.{name}"] for name in LENGTHS if getattr(config.train, name) is not None}
    layers = [_layer(source) for source in given.values()]
    lower: dict[str, Any] = {name: None for name, source in given.items() if _layer(source) < max(layers)}
    return replace(config, train=replace(config.train, **lower))


def _layer(source: str) -> int:
    """Rank of where a setting came from: default, preset, file, then --set and flags."""
    return 0 if source == "default" else 1 if source.startswith("preset ") else 3 if source in ("--set", "flag") else 2


def _compiling_pays(runtime: Runtime, budget: float | None) -> bool:
    return runtime.device.type == "cuda" and (budget or 0.0) > COMPILE_PAYS_AFTER


def _flops(config: ModelConfig, options: SpanOptions) -> float:
    """FLOPs of training on one token of the text."""
    if not config.encoder_depth:
        return training_flops(config, config.context)
    length = spans.window(config.context, options)
    hidden, holes = spans.counts(length, options)
    return 3 * pair_flops(config, length - hidden + holes + 1, hidden + holes + 1) / length


def _depth(config: PretrainConfig, vocab_size: int, train_tokens: int, budget: float, runtime: Runtime) -> int:
    """The deepest model that sees its share of tokens within the budget, and that the text is enough for."""
    options = config.model
    if options.width is not None:
        return max(1, options.width * (3 if options.arch == "transformer" else 4) // 256)
    rate = flops_per_second(runtime)
    best = 0
    for depth in range(2, 25):
        try:
            model = shape(options, depth=depth, vocab_size=vocab_size)
        except UserError:  # heads that a person chose do not fit this width
            continue
        best = best or depth
        tokens, matrices = budget * rate / _flops(model, config.spans), parameters(model).matrices
        if tokens < TOKENS_PER_PARAMETER * matrices or matrices > PARAMETERS_PER_TOKEN * train_tokens:
            break
        best = depth
    return best or 2


def _batch_size(model: ModelConfig, train_tokens: int) -> int:
    """Sequences a step: 1024 tokens for the smallest model, growing with depth, never more than a tenth of the text."""
    tokens = 1024 * 2 ** max(0, (model.depth - 3) // 2)
    most = max(1, (train_tokens - 1) // model.context // 10)
    return max(1, min(tokens // model.context, most))


def check(config: PretrainConfig) -> None:
    """Refuse what cannot be for any text: raises UserError for a number that means nothing, or two lengths."""
    train, optim = config.train, config.optim
    at_least_1 = ("steps", "tokens", "batch_size", "micro_batch", "eval_every", "sample_every", "checkpoint_every")
    for name in (*at_least_1, "keep"):
        value = getattr(train, name)
        if value is not None and value < 1:
            raise UserError(f"train.{name} is {value}", hint="it must be at least 1")
    above_0 = {"train.epochs": train.epochs, "optim.clip": optim.clip}
    at_least_0 = {"optim.muon_lr": optim.muon_lr, "optim.lr": optim.lr, "optim.weight_decay": optim.weight_decay}
    for name, value in {**above_0, **at_least_0, "optim.warmup": optim.warmup}.items():
        if value is not None and not (0 < value < math.inf or (value == 0 and name not in above_0)):
            raise UserError(f"{name} is {value}", hint=f"it must be {'more than' if name in above_0 else 'at least'} 0")
    shares = {"optim.beta1": optim.beta1, "optim.beta2": optim.beta2, "optim.momentum": optim.momentum}
    for name, value in {**shares, "train.dropout": train.dropout}.items():
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{name} is {value}", hint="it must be at least 0 and below 1")
    if not 0 <= optim.decay <= 1:
        raise UserError(f"optim.decay is {optim.decay}", hint="it is a share of the run, from 0 to 1")
    if not -(2**63) <= config.seed < 2**63:
        raise UserError(f"seed is {config.seed}", hint="it must fit into 64 bits")
    _budget(config)
    options = config.model
    _check_sizes(options)
    if options.arch in ("bert", "transformer"):
        _check_encoder(config)
    if config.tokenizer.vocab_size is not None and config.tokenizer.vocab_size < 1:
        raise UserError(f"tokenizer.vocab_size is {config.tokenizer.vocab_size}", hint="it must be at least 1")
    if options.depth is not None or options.width is not None:
        shape(options, depth=options.depth or 1, vocab_size=1)


def _check_encoder(config: PretrainConfig) -> None:
    options = config.model
    if not options.tied:
        raise UserError("model.tied is false", hint="the head of an encoder is its token embedding: leave it out")
    if options.kv_heads not in (None, options.heads):
        raise UserError(
            f"model.kv_heads is {options.kv_heads}", hint="an encoder has as many as heads: leave it out (ModernBERT)"
        )
    least = 8 if options.arch == "bert" else spans.LEAST_CONTEXT
    if options.context is not None and options.context < least:
        raise UserError(f"model.context is {options.context}", hint=f"an encoder's must be at least {least}")
    if not 0 < config.spans.rate < 1:
        raise UserError(f"spans.rate is {config.spans.rate}", hint="it must be above 0 and below 1")
    if not 1 <= config.spans.mean_length < math.inf:
        raise UserError(f"spans.mean_length is {config.spans.mean_length}", hint="it must be at least 1")
    check_shares(config.mlm)


def _check_sizes(options: ModelOptions) -> None:
    for name in ("depth", "context", "width", "heads", "kv_heads", "ffn_width"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"model.{name} is {value}", hint="it must be at least 1; leave it out to let it follow")


def _check_data(model: ModelConfig, train_tokens: int, batch: int) -> None:
    """Refuse a context or a batch that is larger than the text."""
    if model.context + 1 > train_tokens:
        raise UserError(
            f"the training text has {train_tokens:,} tokens, too few for a context of {model.context}",
            hint=f"use more text, or --context {(train_tokens - 1) // 2}" if train_tokens > 16 else "use more text",
        )
    windows = (train_tokens - 1) // model.context
    if batch > windows:
        raise UserError(
            f"a batch of {batch} sequences of {model.context} tokens is larger than the data ({windows} sequences)",
            hint=f"use --batch-size {windows} at most, a shorter --context, or more text",
        )
