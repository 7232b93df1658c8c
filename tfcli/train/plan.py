"""The length, learning rates and batch sizes of a run, from corpus, machine and settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tfcli.config.model import ModelConfig
from tfcli.config.options import DEFAULT_BUDGET, WARMUP_STEPS, PretrainConfig
from tfcli.config.resolve import seconds
from tfcli.errors import UserError
from tfcli.objectives.table import objective
from tfcli.runtime import Runtime
from tfcli.train import shape as sizes

LENGTHS = ("steps", "tokens", "epochs", "budget")
DEFAULT_EPOCHS, MAX_EPOCHS = 8, 40
"""Most epochs of a run of default length, and of one with a budget. Beyond the first a small text is overfit faster
than it teaches, beyond the second there is nothing left to gain (Muennighoff et al. 2023, 6)."""
COMPILE_PAYS_AFTER = 600.0
"""Seconds of planned training on a GPU beyond which compiling pays. On CPU the handwritten kernels are faster."""
MICRO_TOKENS = 8192
"""Tokens per forward pass; gradients of a larger batch are accumulated."""
FIRST_EVALUATION = 70
"""Steps before the first evaluation."""
PROBE_STEPS = 24
"""Steps after which the length of a run with a time budget is fixed from its measured speed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The plan of a run; ``steps`` is None until the speed under a time budget has been measured."""

    model: ModelConfig
    steps: int | None
    max_steps: int
    """Most steps that the corpus supports."""
    budget: float | None
    """Seconds of wall-clock time from the start of the process, or None."""
    batch_size: int
    micro_batch: int
    dropout: float
    muon_lr: float
    lr: float
    compile: bool
    dropout_from: int = 1
    """The first epoch with dropout: text seen for the first time cannot be overfit."""
    bucket: int = 1
    """Batches among which examples are sorted by length, if they differ in length."""
    patience: int | None = None
    """Evaluations without improvement after which the run ends."""
    margin: float = 0.0
    """Standard errors of the score by which an earlier model must be better to be kept over a later one."""
    window: int | None = None
    """Tokens of the text in an example, where that is not the context."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the text per optimizer step."""
        return self.batch_size * (self.window or self.model.context)


def make(
    config: PretrainConfig,
    *,
    vocab_size: int,
    train_tokens: int,
    runtime: Runtime,
    on_note: Callable[[str], None] | None = None,
) -> Plan:
    """Decide what ``config`` leaves open. ``train_tokens`` is the length of the encoded training text.

    ``on_note`` is told what is reduced for a small text. Raises UserError for impossible sizes.
    """
    options, train, optim, arch = config.model, config.train, config.optim, objective(config.model.arch)
    check(config)
    budget = time_budget(config)
    most_seconds = budget or seconds(DEFAULT_BUDGET)
    depth = options.depth or sizes.depth(
        config, vocab_size=vocab_size, train_tokens=train_tokens, budget=most_seconds, runtime=runtime
    )
    model = arch.shape(options, depth=depth, vocab_size=vocab_size)
    most = max(8, (train_tokens - 1) // 2)
    if options.context is None and model.context > most:
        if on_note and most < train_tokens:
            on_note(f"context {most} instead of {model.context}: the training text has only {train_tokens:,} tokens")
        model = replace(model, context=most)
    batch = train.batch_size or sizes.batch_size(model, train_tokens)
    micro = min(train.micro_batch or max(1, MICRO_TOKENS // model.context), batch)
    sizes.check_text(model, train_tokens, batch)
    window = arch.window(config, model.context)
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
    return Plan(
        model=arch.built(model),
        steps=steps,
        max_steps=max_steps,
        budget=budget,
        batch_size=batch,
        micro_batch=micro,
        dropout=train.dropout if train.dropout is not None else (0.2 if repeats > 12 else 0.1 if repeats > 4 else 0.0),
        muon_lr=optim.muon_lr if optim.muon_lr is not None else arch.muon_lr,
        lr=optim.lr if optim.lr is not None else arch.lr * slower,
        compile=arch.compiles
        and (train.compile == "on" or (train.compile == "auto" and _compiling_pays(runtime, budget))),
        window=None if window == model.context else window,
    )


def evaluation_steps(steps: int | None) -> Iterator[int]:
    """The default steps of evaluations: 70 x 1.25^k, with gaps of at most a fifteenth of the run.

    Learning is fast at first. The last step is evaluated as well.
    """
    largest = max(FIRST_EVALUATION, (steps or 2**40) // 15)
    at = float(FIRST_EVALUATION)
    while True:
        yield round(at)
        at = min(at * 1.25, at + largest)


def evaluation(step: int, *, steps: int | None, every: int | None) -> int | None:
    """The number, from 0, of the evaluation at ``step``, by ``every`` or else ``evaluation_steps``; None for none."""
    if every is not None:
        return step // every - 1 if step and step % every == 0 else None
    number, at = next((number, at) for number, at in enumerate(evaluation_steps(steps)) if at >= step)
    return number if at == step else None


def warmup_steps(share: float | None, steps: int) -> int:
    """Steps of linear warm-up in a run of ``steps``: a ``share`` of them, or ``WARMUP_STEPS`` where that is None."""
    return WARMUP_STEPS if share is None else round(share * steps)


def decay_start(steps: int, decay: float) -> int:
    """The step at which the rates of a run of ``steps`` begin to fall."""
    return round(steps * (1 - decay))


def fix_steps(
    plan: Plan, *, elapsed: float, step: int, step_seconds: float, evaluation_seconds: float, every: int | None = None
) -> int:
    """The number of steps that ends a budgeted run in time, from its measured speed; at most what the corpus supports.

    The time of evaluations (see ``evaluation``) and of the last one is taken off, and a twentieth is kept for
    checkpoints, samples and the end.
    """
    assert plan.budget is not None
    left = 0.95 * (plan.budget - elapsed) - evaluation_seconds
    if every is not None:
        return max(step + 1, min(step + int(left / (step_seconds + evaluation_seconds / every)), plan.max_steps))
    steps = step
    for _ in range(4):  # more steps, more evaluations: converges quickly
        evaluations = next(number for number, at in enumerate(evaluation_steps(steps)) if at >= steps)
        steps = step + max(1, int((left - evaluations * evaluation_seconds) / step_seconds))
    return max(step + 1, min(steps, plan.max_steps))


def time_budget(config: PretrainConfig) -> float | None:
    """The seconds of a run that time limits, else None. Raises UserError where two lengths are given."""
    train = config.train
    given = [name for name in LENGTHS if getattr(train, name) is not None]
    if len(given) > 1:
        raise UserError(f"two lengths are given: --{' and --'.join(given)}", hint="give one of them")
    if given and given[0] != "budget":
        return None
    return seconds(train.budget or DEFAULT_BUDGET)


def one_length(config: PretrainConfig, sources: Mapping[str, str]) -> PretrainConfig:
    """Drop the lengths that a higher layer replaces, as a flag does a preset's steps."""
    layers = {name: _layer(sources[f"train.{name}"]) for name in LENGTHS if getattr(config.train, name) is not None}
    lower: dict[str, Any] = {name: None for name, layer in layers.items() if layer < max(layers.values())}
    return replace(config, train=replace(config.train, **lower))


def _layer(source: str) -> int:
    """The rank of a setting's source: default, preset, file, then --set and flags."""
    return 0 if source == "default" else 1 if source.startswith("preset ") else 3 if source in ("--set", "flag") else 2


def _compiling_pays(runtime: Runtime, budget: float | None) -> bool:
    return runtime.device.type == "cuda" and (budget or 0.0) > COMPILE_PAYS_AFTER


def check(config: PretrainConfig) -> None:
    """Raise UserError for settings that no text can be trained with: two lengths, or sizes that do not go together."""
    time_budget(config)
    options, arch = config.model, objective(config.model.arch)
    arch.check(config)
    if options.depth is not None or options.width is not None:
        arch.shape(options, depth=options.depth or 1, vocab_size=1)
