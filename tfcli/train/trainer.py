"""The training loop. A ``Task`` provides examples, loss and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from tfcli.config.options import LoopOptions
from tfcli.errors import Interrupted, RunError
from tfcli.model import fused
from tfcli.model.base import Model
from tfcli.tasks.common.batch import Rows
from tfcli.tasks.task import Task
from tfcli.train import checkpoint, divergence, order, plan
from tfcli.train.checkpoint import TrainState
from tfcli.train.events import Evaluated, Progress, Sampled, Saved
from tfcli.train.metrics import Metrics
from tfcli.train.optim import Optimizers, clip, schedule
from tfcli.train.run import Run

LOG_EVERY = 10
"""Steps between lines of metrics."""
TELL_EVERY = 0.5
"""Least seconds between reports of progress; every line of metrics is one, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Settings of the loop: the seed, the schedule of rates, the clipping of gradients, and when to look and save."""

    seed: int
    warmup: float | None
    decay: float
    clip: float
    intervals: LoopOptions


@dataclass(kw_only=True)
class Trainer:
    """One run of the training loop."""

    run: Run
    model: Model
    task: Task
    plan: plan.Plan
    loop: LoopConfig
    state: TrainState
    optimizers: Optimizers
    metrics: Metrics
    save_model: Callable[[dict[str, Tensor]], None]
    """Write the model directory from a state dict."""
    on_steps: Callable[[int], None] = lambda steps: None
    """Called with the number of steps once a budgeted run has measured its speed."""

    def __post_init__(self) -> None:
        now = self.run.clock()
        self._best_weights: dict[str, Tensor] | None = None
        self._compiled: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self._timed = (now, self.state.step)
        self._logged = (now, self.state.tokens)
        self._told = now
        self._offset = self.state.seconds - now if self.state.step else 0.0

    def train(self) -> None:
        """Train to the end; when stopped, save and raise Interrupted. Raises RunError on divergence.

        The order of a step: fix the length, evaluate, sample, save, stop if asked to, update.
        """
        if self.plan.compile:
            self._compile()
        try:
            self._loop()
        finally:
            self._eager()

    def _loop(self) -> None:
        saved = self.state.step
        while True:
            step = self.state.step
            self._fix_steps()
            last = self.state.steps is not None and step >= self.state.steps
            if step and step != saved:
                self._look(last)
                if self.plan.patience is not None and self.state.stale >= self.plan.patience and not last:
                    self.state.steps, last = step, True
                    self.run.note(f"stopped early: {self.state.stale} evaluations without improvement")
            stopping = self.run.stop()
            if step != saved and (last or stopping or self._due(self.state.checkpoint_every)):
                self._save()
                saved = step
            if last:
                return
            if stopping:
                self._leave_usable()
                raise Interrupted(
                    f"stopped after step {step}; everything is saved in {self.run.directory}",
                    hint=f"go on with: {checkpoint.resume_command(self.run.directory)}",
                )
            self._step()
            if self.run.clock() - self._told >= TELL_EVERY:
                self._tell()

    def _step(self) -> None:
        """Update from ``batch_size`` examples."""
        state = self.state
        indices, epochs = self._examples(state.step)
        examples = self.task.rows(indices, epochs)
        tokens = self.task.tokens(examples)
        rows = examples.to(self.run.runtime.device)
        dropout = self.plan.dropout if epochs[0] >= self.plan.dropout_from else 0.0
        loss_sum, count = self.gradients(rows, dropout=dropout)
        norm = clip(self.optimizers.named.values(), self.loop.clip)
        loss_value, norm_value = torch.stack([loss_sum, norm]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            where = divergence.find(self.model, lambda: self.gradients(rows, dropout=dropout))
            bad = f"the loss is {loss_value}" if not math.isfinite(loss_value) else f"the gradient is {norm_value}"
            self._diverged(f"step {state.step + 1}: {bad}; first in {where}")
        self.optimizers.step(self._factor())
        state.step += 1
        state.tokens += tokens
        state.loss_sum += loss_value
        state.loss_count += count
        state.seconds = self.run.clock() + self._offset

    def _examples(self, step: int) -> tuple[order.Indices, order.Indices]:
        """Indices and epochs of a step's examples."""
        lengths, seed, plan = self.task.lengths, self.loop.seed, self.plan
        if lengths is None or plan.bucket <= 1:
            return order.batch(step, seed=seed, size=self.task.size, batch=plan.batch_size)
        return order.bucketed(
            step, seed=seed, lengths=lengths, batch=plan.batch_size, chunk=plan.bucket, steps=plan.max_steps
        )

    def gradients(self, rows: Rows, *, dropout: float) -> tuple[Tensor, int]:
        """Accumulate the gradients of the mean loss of ``rows``; return the summed loss and the count.

        The count of the whole batch is known before, so the loss of each micro-batch is divided by it at once.
        """
        seed, device = order.mix(self.loop.seed, self.state.step) % 2**63, self.run.runtime.device
        count = self.task.count(rows)
        loss_sum = torch.zeros((), device=device)
        with fused.seeded(seed, device, compiled=self.plan.compile):
            for micro in rows.split(self.plan.micro_batch):
                loss, _ = self.task.loss(self.model, micro, dtype=self.run.runtime.dtype, dropout=dropout)
                (loss / count).backward()
                loss_sum += loss.detach()
        return loss_sum, count

    def _factor(self) -> float:
        """The factor on the peak rates; until the length is fixed, the rates are rising or constant.

        Until then a warm-up that is a share of the run is that share of the longest possible run.
        """
        loop, steps = self.loop, self.state.steps
        warmup = plan.warmup_steps(loop.warmup, steps or self.plan.max_steps)
        return schedule(self.state.step, steps or 2**40, warmup=warmup, decay=loop.decay)

    def _fix_steps(self) -> None:
        """Fix the number of steps of a budgeted run from its speed, and how often to save.

        The number is computed again when the rates are about to fall, which until then did not depend on it: a machine
        that was busy at first, or became so, neither wastes the budget nor overruns it.
        """
        state = self.state
        if state.step == plan.PROBE_STEPS // 3:
            self._timed = (self.run.clock(), state.step)
        if state.steps is None and self.plan.steps is not None:
            state.steps = self.plan.steps
        step_seconds = (self.run.clock() - self._timed[0]) / max(1, state.step - self._timed[1])
        first = state.steps is None and state.step >= plan.PROBE_STEPS
        again = state.steps is not None and state.step == plan.decay_start(state.steps, self.loop.decay)
        if first or (again and self.plan.steps is None and state.step - self._timed[1] >= plan.PROBE_STEPS):
            # Scoring a token takes a forward pass, a third of training on it.
            evaluation = step_seconds * self.task.evaluation_tokens / self.plan.tokens_per_step / 3
            before = state.steps or 0
            state.steps = plan.fix_steps(
                self.plan,
                elapsed=self.run.clock() + self._offset,
                step=state.step,
                step_seconds=step_seconds,
                evaluation_seconds=evaluation,
                every=self.loop.intervals.eval_every,
            )
            self._timed = (self.run.clock(), state.step)
            if abs(state.steps - before) > before // 50:
                self.on_steps(state.steps)
        if state.checkpoint_every is None:
            if self.loop.intervals.checkpoint_every is not None:
                state.checkpoint_every = self.loop.intervals.checkpoint_every
            elif state.step >= plan.PROBE_STEPS:
                state.checkpoint_every = max(1, round(60 / max(step_seconds, 1e-6)))

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _look(self, last: bool) -> None:
        """Log, evaluate and sample where that is due."""
        state, intervals = self.state, self.loop.intervals
        if state.step % LOG_EVERY == 0 or last:
            self._log()
        number = plan.evaluation(state.step, steps=state.steps, every=intervals.eval_every)
        if number is not None or last:
            self._evaluate()
        every = intervals.sample_every
        if last or (self._due(every) if every else number is not None and number % 4 == 3):
            with self._beside():
                text = self.task.sample(self.model, seed=order.mix(self.loop.seed, state.step))
            if text is not None:
                self.run.tell(Sampled(step=state.step, text=text))

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Run work other than training, which does not count towards its speed and for which no block was compiled."""
        started = self.run.clock()
        self._eager()
        try:
            yield
        finally:
            self._faster()
        spent = self.run.clock() - started
        self._logged = (self._logged[0] + spent, self._logged[1])
        self._timed = (self._timed[0] + spent, self._timed[1])

    def _speed(self) -> float:
        """Tokens per second since the last line of metrics."""
        return (self.state.tokens - self._logged[1]) / max(1e-9, self.run.clock() - self._logged[0])

    def _log(self) -> None:
        """Write a line of metrics on training."""
        state = self.state
        self._tell()
        self._write(
            train_loss=state.loss_sum / max(1, state.loss_count),
            lr=self.optimizers.shown_lr * self._factor(),
            tokens_per_second=round(self._speed(), 1),
        )
        self._logged = (self.run.clock(), state.tokens)
        state.loss_sum, state.loss_count = 0.0, 0

    def _write(self, **values: float) -> None:
        """Write a line of metrics with other values after the step, the time and the tokens."""
        state = self.state
        self.metrics.write({"step": state.step, "seconds": round(state.seconds, 3), "tokens": state.tokens, **values})

    def _tell(self) -> None:
        """Tell progress since the last line of metrics."""
        state, speed = self.state, self._speed()
        self._told = self.run.clock()
        step_tokens = state.tokens / max(1, state.step)
        left = None if state.steps is None else (state.steps - state.step) * step_tokens / max(1.0, speed)
        self.run.tell(
            Progress(
                step=state.step,
                steps=state.steps,
                seconds=state.seconds,
                seconds_left=left,
                train_loss=state.loss_sum / max(1, state.loss_count),
                lr=self.optimizers.shown_lr * self._factor(),
                tokens_per_second=speed,
                memory=self.run.runtime.peak_memory(),
            )
        )

    def _compile(self) -> None:
        """Compile the blocks in place (parameter names stay as they are) and try them; fall back where that fails."""
        self._compiled = [(part, torch.compile(part.forward)) for part in self.model.compiled_parts()]
        self._faster()
        indices, epochs = order.batch(0, seed=0, size=self.task.size, batch=self.plan.micro_batch)
        rows: Rows = self.task.rows(indices, epochs).to(self.run.runtime.device)
        try:
            loss, _ = self.task.loss(self.model, rows, dtype=self.run.runtime.dtype, dropout=0.0)
            loss.backward()
        except Exception as error:  # whatever the compiler raises: a missing C++ compiler, an unsupported processor
            self._eager()
            self._compiled = []
            self.run.note(f"training without torch.compile, which failed: {str(error).strip().splitlines()[0]}")
        for parameter in self.optimizers.named.values():
            parameter.grad = None

    def _faster(self) -> None:
        """Run the compiled blocks."""
        for block, forward in self._compiled:
            block.forward = forward

    def _eager(self) -> None:
        """Run the blocks uncompiled; a compiler's stance would do so for the whole process."""
        for block, _ in self._compiled:
            vars(block).pop("forward", None)

    def _evaluate(self) -> None:
        """Score the model on the held-out part, and keep its weights if they are the best."""
        state = self.state
        with self._beside():
            scores = self.task.evaluate(self.model)
        state.seconds = self.run.clock() + self._offset
        wrong = [value for value in scores.values() if not math.isfinite(value)]
        if wrong:
            where = divergence.weights(self.model) or "the held-out text"
            self._diverged(f"after step {state.step} the held-out loss is {wrong[0]}; first in {where}")
        headline = self.task.headline(scores)
        score = -headline.value if headline.higher_is_better else headline.value
        self._write(**scores)
        better = state.best is None or score < state.best
        state.best = score if state.best is None else min(state.best, score)
        slack = self.plan.margin * headline.error
        # Of two that a standard error does not tell apart the later one is kept: it has learned more.
        kept = better or (slack > 0 and score <= state.best + slack)
        if kept:
            state.best_step = state.step
            self._best_weights = {name: t.detach().clone() for name, t in self._weights().items()}
            self.task.keep(scores)
        state.stale = 0 if better else state.stale + 1
        self.run.tell(
            Evaluated(
                step=state.step,
                name=headline.name,
                value=headline.value,
                higher_is_better=headline.higher_is_better,
                best=kept,
            )
        )

    def _weights(self) -> dict[str, Tensor]:
        """The parameters that are trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self) -> None:
        """Save the best model into the run directory, then a checkpoint, then delete old checkpoints."""
        state = self.state
        with self._beside():
            if self._best_weights is not None:
                self.save_model(self._best_weights)
                self._best_weights = None
            self.metrics.sync()
            state.metrics_bytes = self.metrics.bytes
            checkpoint.save(self.run.directory, state, self._weights(), dict(self.optimizers.tensors()))
            checkpoint.prune(self.run.directory, keep=self.loop.intervals.keep, best_step=state.best_step)
        self.run.tell(Saved(step=state.step))

    def _leave_usable(self) -> None:
        """Save the current model where none was evaluated yet."""
        if self.state.best is None and self.state.step:
            self.save_model(self._weights())

    def _diverged(self, what: str) -> NoReturn:
        """Save the best model and raise RunError."""
        whole = checkpoint.complete(self.run.directory)
        if self._best_weights is not None:
            self.save_model(self._best_weights)
        kept = f"step {int(whole[-1].name)}" if whole else "none yet"
        rate = f"--set optim.lr={self.optimizers.lr / 5:.1g}"
        if self.optimizers.shown_lr != self.optimizers.lr:
            rate = f"--set optim.muon_lr={self.optimizers.muon_lr / 4:.1g} {rate}"
        raise RunError(
            f"{what} (last good checkpoint: {kept})",
            hint=f"start again with lower rates, as {rate}, or --precision fp32",
        )
