"""The one training loop. What is trained, on what and how it is scored comes in as a model and a Task."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tfcli.config import PretrainConfig
from tfcli.errors import Interrupted, RunError
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.task import Task
from tfcli.train import checkpoint, order, plan
from tfcli.train.checkpoint import TrainState
from tfcli.train.events import Evaluated, Listener, Note, Progress, Sampled, Saved
from tfcli.train.metrics import Metrics
from tfcli.train.optim import Optimizers, clip, schedule

LOG_EVERY = 10


@dataclass(kw_only=True)
class Trainer:
    """Everything one run holds. ``clock`` gives seconds since the process began; ``stop`` says whether to stop now."""

    run: Path
    model: Transformer
    task: Task
    plan: plan.Plan
    config: PretrainConfig
    runtime: Runtime
    state: TrainState
    optimizers: Optimizers
    metrics: Metrics
    listen: Listener
    clock: Callable[[], float]
    stop: Callable[[], bool]
    save_model: Callable[[dict[str, Tensor]], None]
    """Writes the model directory from a state dict."""
    on_settled: Callable[[int], None]
    """Told the number of steps once a budgeted run has measured its speed."""

    def __post_init__(self) -> None:
        self._best_weights: dict[str, Tensor] | None = None
        self._timed = (self.clock(), self.state.step)
        self._evaluation_seconds = 0.0
        self._logged = (self.clock(), self.state.tokens)
        self._offset = self.state.seconds - self.clock() if self.state.step else 0.0

    def train(self) -> None:
        """Train to the end, or until stopped: then save and raise Interrupted.

        Order of a step: settle, evaluate, sample, save, stop?, then the update. Raises RunError on divergence.
        """
        if self.plan.compile:
            for block in self.model.blocks:
                block.compile()  # in place: parameter names stay as they are
        saved = self.state.step
        while True:
            step = self.state.step
            self._settle()
            last = self.state.steps is not None and step >= self.state.steps
            if step and step != saved:
                self._look(last)
            stopping = self.stop()
            if step != saved and (last or stopping or self._due(self.state.checkpoint_every)):
                self._save()
                saved = step
            if last:
                return
            if stopping:
                self._leave_usable()
                raise Interrupted(
                    f"stopped after step {step}; everything is saved in {self.run}",
                    hint=f"go on with: tfcli pretrain --resume --out {self.run}",
                )
            self._step()

    def _step(self) -> None:
        """One update from ``batch_size`` examples, a micro-batch at a time."""
        state, task = self.state, self.task
        indices, epochs = order.batch(state.step, seed=self.config.seed, size=task.size, batch=self.plan.batch_size)
        rows = task.rows(indices, epochs).to(self.runtime.device)
        # Text that is seen for the first time cannot be learnt by heart: dropout waits for the second epoch.
        dropout = self.plan.dropout if epochs[0] > 0 else 0.0
        torch.manual_seed(order.mix(self.config.seed, state.step) % 2**63)
        count = self.plan.batch_size * task.tokens_per_example
        loss_sum = torch.zeros((), device=self.runtime.device)
        for micro in rows.split(self.plan.micro_batch):
            loss, _ = task.loss(self.model, micro, dtype=self.runtime.dtype, dropout=dropout)
            (loss / count).backward()
            loss_sum += loss.detach()
        norm = clip(self.optimizers.named.values(), self.config.optim.clip)
        loss_value, norm_value = torch.stack([loss_sum, norm]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._diverged(rows, loss_value, norm_value)
        self.optimizers.step(self._factor())
        state.step += 1
        state.tokens += count
        state.loss_sum += loss_value
        state.loss_count += count
        state.seconds = self.clock() + self._offset

    def _factor(self) -> float:
        """Of the learning rates; until the length is settled the rate is still rising or constant."""
        optim = self.config.optim
        return schedule(self.state.step, self.state.steps or 2**40, warmup=optim.warmup, decay=optim.decay)

    def _settle(self) -> None:
        """Fix the number of steps of a budgeted run from its speed, and how often to save."""
        state = self.state
        if state.step == plan.PROBE_STEPS // 3:
            self._timed = (self.clock(), state.step)
        if state.steps is None and self.plan.steps is not None:
            state.steps = self.plan.steps
        step_seconds = (self.clock() - self._timed[0]) / max(1, state.step - self._timed[1])
        if state.steps is None and state.step >= plan.PROBE_STEPS:
            # A token scored costs a forward pass, a third of a token trained on.
            evaluation = step_seconds * self.task.evaluation_tokens / self.plan.tokens_per_step / 3
            state.steps = plan.settle(
                self.plan,
                elapsed=state.seconds,
                step=state.step,
                step_seconds=step_seconds,
                evaluation_seconds=evaluation,
            )
            self.on_settled(state.steps)
        if state.checkpoint_every is None:
            if self.config.train.checkpoint_every is not None:
                state.checkpoint_every = max(1, self.config.train.checkpoint_every)
            elif state.step >= plan.PROBE_STEPS:
                state.checkpoint_every = max(1, round(60 / max(step_seconds, 1e-6)))

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _evaluation(self) -> int | None:
        """Which evaluation, from 0, is due at this step; None for no one."""
        due = plan.evaluation_steps(self.state.steps, self.config.train.eval_every)
        number, at = next((number, at) for number, at in enumerate(due) if at >= self.state.step)
        return number if at == self.state.step else None

    def _look(self, last: bool) -> None:
        """Metrics of training, evaluation and a sample, where they are due."""
        state = self.state
        if state.step % LOG_EVERY == 0 or last:
            self._log()
        number = self._evaluation()
        if number is not None or last:
            self._evaluate()
        every = self.config.train.sample_every
        if last or (self._due(every) if every else number is not None and number % 4 == 3):
            text = self.task.sample(self.model, seed=order.mix(self.config.seed, state.step))
            self.listen(Sampled(step=state.step, text=text))

    def _log(self) -> None:
        state = self.state
        now, tokens = self.clock(), state.tokens
        speed = (tokens - self._logged[1]) / max(1e-9, now - self._logged[0])
        self._logged = (now, tokens)
        loss = state.loss_sum / max(1, state.loss_count)
        state.loss_sum, state.loss_count = 0.0, 0
        lr = self.optimizers.muon_lr * self._factor()
        record = {"step": state.step, "seconds": round(state.seconds, 3), "tokens": tokens, "train_loss": loss}
        self.metrics.write({**record, "lr": lr, "tokens_per_second": round(speed, 1)})
        left = None if state.steps is None else (state.steps - state.step) * self.plan.tokens_per_step / max(1.0, speed)
        self.listen(
            Progress(
                step=state.step,
                steps=state.steps,
                seconds=state.seconds,
                seconds_left=left,
                train_loss=loss,
                lr=lr,
                tokens_per_second=speed,
                memory=self.runtime.peak_memory(),
            )
        )

    def _evaluate(self) -> None:
        state, started = self.state, self.clock()
        scores = self.task.evaluate(self.model)
        state.seconds = self.clock() + self._offset
        self._logged = (self._logged[0] + self.clock() - started, self._logged[1])
        record = {"step": state.step, "seconds": round(state.seconds, 3), "tokens": state.tokens}
        self.metrics.write({**record, **scores})
        score = next(iter(scores.values()))
        best = math.isfinite(score) and (state.best is None or score < state.best)
        if best:
            state.best, state.best_step = score, state.step
            self._best_weights = {name: t.detach().clone() for name, t in self._weights().items()}
        self.listen(
            Evaluated(step=state.step, bits_per_byte=scores["val_bits_per_byte"], loss=scores["val_loss"], best=best)
        )

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def _save(self) -> None:
        """The best model into the run directory, then a checkpoint, then clear old ones."""
        state = self.state
        if self._best_weights is not None:
            self.save_model(self._best_weights)
            self._best_weights = None
        self.metrics.sync()
        state.metrics_bytes = self.metrics.bytes
        checkpoint.save(self.run, state, self._weights(), dict(self.optimizers.tensors()))
        checkpoint.prune(self.run, keep=self.config.train.keep, best_step=state.best_step)
        self.listen(Saved(step=state.step))

    def _leave_usable(self) -> None:
        """A run stopped before its first evaluation leaves the model that it has."""
        if self.state.best is None and self.state.step:
            self.save_model(self._weights())

    def _diverged(self, rows: Tensor, loss: float, norm: float) -> None:
        """Stop before the update: name the step and the first module that went bad, keep what was good."""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        where = _first_bad(
            self.model, lambda: self.task.loss(self.model, rows[:1], dtype=self.runtime.dtype, dropout=0)
        )
        whole = checkpoint.complete(self.run)
        kept = f"step {int(whole[-1].name)}" if whole else "none yet"
        if self._best_weights is not None:
            self.save_model(self._best_weights)
        self.listen(Note(text=f"diverged at step {self.state.step + 1}"))
        raise RunError(
            f"step {self.state.step + 1}: {what}; first in {where} (last good checkpoint: {kept})",
            hint="try a lower --set optim.muon_lr and optim.lr, or --precision fp32",
        )


@torch.no_grad()
def _first_bad(model: Transformer, forward: Callable[[], object]) -> str:
    """The first module, in the order of the forward pass, whose output is not finite; else the first bad gradient."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def check(module: torch.nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return check

    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the weights of {name}"
    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the output of {found[0]}"
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name}"
    return "the loss"
