"""From a corpus, a machine and what a person fixed: how long a model is trained, at which rates, how much at once."""

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
"""Passes over the text at most: of a run whose length is not given, and of one with a budget. Beyond the first a small
text is overfitted faster than it teaches, beyond the second nothing is left (Muennighoff et al. 2023, 6)."""
COMPILE_PAYS_AFTER = 600.0
"""Seconds of planned training on a GPU beyond which compiling is repaid. On CPU the kernels by hand are faster."""
MICRO_TOKENS = 8192
"""Tokens at once; a larger batch is accumulated."""
FIRST_EVALUATION = 70
"""Steps before the first look at the held-out text."""
PROBE_STEPS = 24
"""Steps after which the length of a run with a time budget is fixed from its measured speed."""


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
    """The first epoch with dropout: text that is seen for the first time cannot be overfitted."""
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
    options, train, optim, made = config.model, config.train, config.optim, objective(config.model.arch)
    check(config)
    budget = time_budget(config)
    depth = options.depth or sizes.depth(
        config,
        vocab_size=vocab_size,
        train_tokens=train_tokens,
        budget=budget or seconds(DEFAULT_BUDGET),
        runtime=runtime,
    )
    model = made.shape(options, depth=depth, vocab_size=vocab_size)
    most = max(8, (train_tokens - 1) // 2)
    if options.context is None and model.context > most:
        if on_note and most < train_tokens:
            on_note(f"context {most} instead of {model.context}: the training text has only {train_tokens:,} tokens")
        model = replace(model, context=most)
    batch = train.batch_size or sizes.batch_size(model, train_tokens)
    micro = min(train.micro_batch or max(1, MICRO_TOKENS // model.context), batch)
    sizes.check_text(model, train_tokens, batch)
    window = made.window(config, model.context)
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
        model=made.built(model),
        steps=steps,
        max_steps=max_steps,
        budget=budget,
        batch_size=batch,
        micro_batch=micro,
        dropout=train.dropout if train.dropout is not None else (0.2 if repeats > 12 else 0.1 if repeats > 4 else 0.0),
        muon_lr=optim.muon_lr if optim.muon_lr is not None else made.muon_lr,
        lr=optim.lr if optim.lr is not None else made.lr * slower,
        compile=made.compiles
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


def warmup_steps(share: float | None, steps: int) -> int:
    """Steps of linear warm-up of a run of ``steps``, of which it is a ``share`` unless that is left out."""
    return WARMUP_STEPS if share is None else round(share * steps)


def decay_start(steps: int, decay: float) -> int:
    """The step at which the rates of a run of ``steps`` begin to fall."""
    return round(steps * (1 - decay))


def fix_steps(
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
    for _ in range(4):  # more steps, more evaluations: converges quickly
        evaluations = next(number for number, at in enumerate(evaluation_steps(steps)) if at >= steps)
        steps = step + max(1, int((left - evaluations * evaluation_seconds) / step_seconds))
    return max(step + 1, min(steps, plan.max_steps))


def time_budget(config: PretrainConfig) -> float | None:
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


def check(config: PretrainConfig) -> None:
    """Raise UserError for settings that no text can be trained with: two lengths, or sizes that do not go together."""
    time_budget(config)
    options, learnt = config.model, objective(config.model.arch)
    learnt.check(config)
    if options.depth is not None or options.width is not None:
        learnt.shape(options, depth=options.depth or 1, vocab_size=1)
