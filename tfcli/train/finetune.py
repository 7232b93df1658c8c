"""Finetuning, from a model and labeled files to a model directory: prepare the task, plan, train, keep the best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfcli.config.resolve import resolve
from tfcli.errors import UserError
from tfcli.formats.convert import portable
from tfcli.formats.hf import adapters, heads
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf.card import of_task
from tfcli.formats.hf.stored import CONFIG
from tfcli.formats.open import Opened, open_path
from tfcli.model import heads as task_heads
from tfcli.model import lora
from tfcli.model.quant.quantize import dequantize_model
from tfcli.model.transformer import Transformer, initialize
from tfcli.tasks.applications import APPLICATIONS, application, of_head
from tfcli.tasks.common.options import BESIDE_MUON_LR, EPOCHS, LR, LR_WIDTH, MOST_LR, NEW_LR, FinetuneConfig, check
from tfcli.tasks.task import Application, Finetuning, Start, settings_of
from tfcli.text.read import hf_data
from tfcli.train import checkpoint, notebook, plan, record
from tfcli.train.checkpoint import TrainState
from tfcli.train.events import Listener
from tfcli.train.optim import Optimizers
from tfcli.train.run import Run, holding
from tfcli.train.signals import stop_signals
from tfcli.train.trainer import LoopConfig, Trainer

MUON_LR = 0.02
"""Peak rate of a new model's matrices under Muon (Jordan et al. 2024); BESIDE_MUON_LR is that of the rest."""
LEAST_EVALUATIONS = 4
MICRO_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a run: its directory, the steps taken, and the best model's scores on the held-out part."""

    directory: Path
    task: str
    steps: int
    scores: dict[str, Any]
    lines: list[str]
    """Tables for people."""


def finetune(
    model: str | Path | None,
    data: str | Path | Sequence[str | Path] = (),
    *,
    task: str | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    from_scratch: bool = False,
    resume: bool = False,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    listen: Listener | None = None,
    started: float | None = None,
    command: Sequence[str] = (),
) -> Result:
    """Train a model on labeled data for a task, and write a directory that transformers loads with the task's class.

    ``settings`` are dotted keys of the task's configuration, such as {"train.epochs": 3}; ``from_scratch`` takes only
    the shape and tokenizer of ``model``. ``resume`` continues the run in ``out``; on a CPU the result is bitwise that
    of an uninterrupted run. Raises UserError for bad input, RunError for divergence or a full disk, Interrupted when a
    signal stopped the run after saving.

    Example:
        >>> import tfcli
        >>> run = tfcli.finetune("runs/first", "reviews.csv", task="classify", out="runs/tuned",
        ...                      settings={"train.steps": 2})
        >>> run.steps, 0 <= run.scores["val_accuracy"] <= 1
        (2, True)
    """
    began = time.time() if started is None else started
    tell: Listener = listen or notebook.listener()
    specs = [str(spec) for spec in ([data] if isinstance(data, str | Path) else data)]
    with stop_signals() as stop:
        before = None
        if resume:
            directory, before = record.resumed(out, specs, kind="finetune")
            if task not in (None, before["task"]):
                raise UserError(f"{directory} is of the task {before['task']}, not {task}")
            task, from_scratch = str(before["task"]), bool(before["from_scratch"])
            model, specs = before["model"], before["corpus"]
        if task is None:
            raise UserError("a --task is needed", hint=f"add --task and one of {', '.join(APPLICATIONS)}")
        app = application(task)
        if from_scratch and model is not None and app.sizes_models and not (Path(model) / CONFIG).is_file():
            model, specs = None, [str(model), *specs]  # only data is named: the size of the model follows from it
        if not specs or (model is None and not (from_scratch and app.sizes_models)):
            raise UserError("a model and data are needed", hint=f"tfcli finetune MODEL DATA --task {task}")
        config, sources = resolve(app.config, file=config_file, sets=sets, flags=settings)
        check(config)
        if config.lora.on and from_scratch:
            raise UserError("--lora keeps a model's weights, --from-scratch discards them", hint="give one of them")
        if config.data.val is not None:
            hf_data.check_split(config.data.val, "--val")
            config = replace(config, data=replace(config.data, val=_absolute(config.data.val)))
        if before is not None:
            config = record.unchanged(before, config, sources, directory)
        else:
            directory = record.new_directory(out, [f"{record.stem(specs[0])}-{task}"])
            if model is not None and Path(model).resolve() == directory.resolve():
                raise UserError(f"--out {directory} is the model itself", hint="choose another --out")
        run = _Run(
            directory=directory,
            app=app,
            model=None if model is None else str(model),
            specs=specs,
            config=config,
            sources=sources,
            from_scratch=from_scratch,
            runtime=record.runtime_of(before, device=device, precision=precision, threads=threads),
            tell=tell,
            clock=lambda: time.time() - began,
            stop=stop,
            before=before,
        )
        with holding(directory), run.runtime.active():
            return run.go(list(command))


def _absolute(val: str) -> str:
    """A validation file, or two separated by a comma, as they can be found from another directory."""
    parts = [val] if Path(val).exists() else val.split(",")
    return ",".join(record.absolute(part) for part in parts)


@dataclass(kw_only=True)
class _Run(Run):
    """A run of finetuning."""

    app: Application
    model: str | None
    """None for a new model whose size follows from the data (``Application.fresh``)."""
    config: FinetuneConfig
    from_scratch: bool
    _opened: Opened | None = None
    _read: Any = None

    def go(self, command: list[str]) -> Result:
        """Prepare, plan, train and score the best model, with the directory locked."""
        self.note(f"device: {self.runtime.describe()}")
        loaded = self._load()
        if self.from_scratch and self.model is not None:
            _renew(loaded.model, self.config.seed)
        asked, most = self.config.data.context, loaded.model.config.context
        if asked is not None and asked > most:
            raise UserError(f"data.context is {asked}, the model reads {most} tokens", hint="it may be less, not more")
        start = Start(
            model=loaded.model,
            codec=loaded.codec,
            data=self.specs,
            config=self.config,
            runtime=self.runtime,
            hf_config=loaded.hf_config,
            note=self.note,
            read=self._read,
        )
        task = self.app.prepare(start)
        codec = task.saved_codec(loaded.codec)
        self._same_data(task)
        self._adapt(loaded.model)
        planned, optimizers = self._planned(loaded, task)
        state = self.restore(loaded.model, optimizers) or TrainState()
        about = self.before or self._record(planned, task, loaded.codec.hash, command)
        self.begin(about, task.data_report)
        self.announce(*_overview(planned, task, loaded.model), step=state.step)
        best: dict[str, Tensor] = {}

        def save_model(weights: dict[str, Tensor]) -> None:
            best.update(weights)
            with _holding(loaded.model, weights, self.directory):
                self._save(loaded.model, codec, task)

        with self.gently(state) as metrics:
            Trainer(
                run=self,
                model=loaded.model,
                task=task,
                plan=planned,
                loop=_loop(self.config, planned, task.size),
                state=state,
                optimizers=optimizers,
                metrics=metrics,
                save_model=save_model,
            ).train()
        self._best(loaded.model, best, state)
        scores, lines = task.report(loaded.model)
        self.finish({**about, "scores": scores}, state)
        task.draw(self.directory, scores, self.note)
        return Result(directory=self.directory, task=self.app.name, steps=state.step, scores=scores, lines=lines)

    def _planned(self, loaded: heads.Loaded, task: Finetuning) -> tuple[plan.Plan, Optimizers]:
        """The plan of the run, and its optimizers."""
        optim = self.config.optim
        ours = settings_of(loaded.hf_config).get("optimizer") == "muon" and not self.config.lora.on
        kind = optim.kind or ("muon" if self.from_scratch or ours else "adamw")
        planned = make_plan(self.config, loaded.model, task, new=self.from_scratch, ours=ours, optimizer=kind)
        rates = {"muon_lr": planned.muon_lr, "lr": planned.lr}
        return planned, Optimizers(loaded.model, optim, **rates, plain=kind == "adamw", eps=optim.eps)

    def _load(self) -> heads.Loaded:
        """The initial model; a quantized one is dequantized, unless LoRA keeps it frozen."""
        if self.model is None:
            model, codec, self._read = self.app.fresh(self.specs, self.config, self.runtime, self.note)
            return heads.Loaded(model=model, codec=codec, hf_config={}, kind=None)
        if self._opened is None:
            self._opened = open_path(self.model)
        opened = self._opened
        if self.config.lora.on and opened.kind == "adapter":
            raise UserError(
                f"{self.model} is an adapter itself",
                hint=f"merge it first: tfcli convert BASE OUT --merge {self.model}",
            )
        loaded = opened.load_whole(runtime=self.runtime, dtype=torch.float32, on_note=self.note)
        if opened.kind == "hf":
            return loaded
        if not self.config.lora.on:
            dequantize_model(loaded.model, torch.float32)
        return replace(loaded, codec=portable(loaded.codec))

    def _adapt(self, model: Transformer) -> None:
        """With --lora, attach adapters, which are trained with the task's head instead of the weights."""
        if not self.config.lora.on:
            return
        lora.attach(model, self.config.lora, seed=self.config.seed)
        head = task_heads.of(model)
        if head is not None and of_head(head.kind) == self.app.name:
            head.requires_grad_(True)

    def _same_data(self, task: Finetuning) -> None:
        """Raise UserError where the data or its split are not those of the run that is resumed."""
        if self.before is not None and self.before["data_hash"] != task.data_report["content_hash"]:
            raise UserError(
                f"the data is not what {self.directory} was trained on",
                hint="resume with the same files, or start a new run with another --out",
            )
        how = task.data_report["split"]
        if self.before is not None and self.before.get("split", how if "seed" not in how else None) != how:
            raise UserError(
                f"{self.directory} was begun by an older version, which split off other validation data",
                hint="start again, with another --out",
            )

    def _save(self, model: Transformer, codec: Any, task: Finetuning) -> None:
        """Write the model directory."""
        about = dict(task.hf_config)
        about["tfcli"] = {"task": self.app.name, **about.get("tfcli", {})}
        if self.config.lora.on and self.model is not None:
            base = Path(self.model).absolute()
            adapters.save(self.directory, model, base=base, about=about, chat_template=codec.chat_template)
            return
        card = of_task(self.app.name, None if self.model is None else Path(self.model).name, model.config)
        hf.save(self.directory, model, codec, about=about, card=card)

    def _best(self, model: Transformer, weights: dict[str, Tensor], state: TrainState) -> None:
        """Load the best weights into the model: those saved last, also by the process that this one resumed."""
        if state.best_step != state.step:
            checkpoint.fill(model, weights or lora.trainable(self._saved()), self.directory)

    def _saved(self) -> Transformer:
        """The model in the directory, as it is trained: adapters on their base."""
        if self.config.lora.on:
            return adapters.put_on(self._load(), self.directory).model
        return heads.load(self.directory, runtime=self.runtime, dtype=torch.float32).model

    def _record(self, planned: plan.Plan, task: Finetuning, tokenizer_hash: str, command: list[str]) -> record.Record:
        """The content of run.json when a run begins."""
        data_hash = task.data_report["content_hash"]
        every = self.describe(planned, command, data_hash=data_hash, tokenizer_hash=tokenizer_hash)
        return {
            "kind": "finetune",
            "task": self.app.name,
            "model": None if self.model is None else str(Path(self.model).absolute()),
            "from_scratch": self.from_scratch,
            "split": task.data_report["split"],
            **every,
            "checksums": {},
        }


def _overview(planned: plan.Plan, task: Finetuning, model: Transformer) -> Iterator[str]:
    """Lines on what will be done."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    yield f"model: {trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters are trained"
    epochs = (planned.steps or 0) * planned.batch_size / task.size
    yield f"length: {planned.steps:,} steps of {planned.batch_size} examples, {epochs:.3g} epochs of {task.size:,}"


def make_plan(
    config: FinetuneConfig, model: Transformer, task: Finetuning, *, new: bool, ours: bool, optimizer: str
) -> plan.Plan:
    """Decide steps, rates and batch sizes.

    ``new``: from scratch. ``ours``: from an encoder that was pretrained with Muon, which it continues with.
    """
    train, optim = config.train, config.optim
    if optim.muon_lr is not None and optimizer == "adamw":
        raise UserError("optim.muon_lr does nothing under AdamW", hint="add --set optim.kind=muon, or set optim.lr")
    batch = min(train.batch_size, task.size)
    steps = train.steps
    if steps is None:
        epochs = train.epochs or task.epochs or EPOCHS
        steps = max(1, math.ceil(epochs * task.size / batch))
    lengths = task.lengths
    longest = model.config.context if lengths is None else int(lengths.max(initial=1))
    if optimizer == "muon" and (new or ours):
        default = BESIDE_MUON_LR if new else BESIDE_MUON_LR / 2
    else:
        default = NEW_LR if new or config.lora.on else min(MOST_LR, LR * LR_WIDTH / model.config.width)
    lr = optim.lr if optim.lr is not None else default
    return plan.Plan(
        model=model.config,
        steps=steps,
        max_steps=steps,
        budget=None,
        batch_size=batch,
        micro_batch=min(batch, train.micro_batch or max(1, MICRO_TOKENS // max(1, longest))),
        dropout=train.dropout,
        muon_lr=optim.muon_lr if optim.muon_lr is not None else lr * MUON_LR / BESIDE_MUON_LR,
        lr=lr,
        compile=False,
        dropout_from=0,
        bucket=train.bucket,
        patience=train.patience,
        margin=train.margin,
    )


def _loop(config: FinetuneConfig, planned: plan.Plan, size: int) -> LoopConfig:
    """Return the settings of the loop, with a decay that begins after the warm-up."""
    optim, train, steps = config.optim, config.train, planned.max_steps
    if train.eval_every is None:  # at the ends of epochs, or more often where there are only a few
        evaluations = max(LEAST_EVALUATIONS, math.ceil(steps * planned.batch_size / size))
        train = replace(train, eval_every=max(1, round(steps / evaluations)))
    decay = min(optim.decay, (steps - plan.warmup_steps(optim.warmup, steps)) / steps)
    return LoopConfig(seed=config.seed, warmup=optim.warmup, decay=decay, clip=optim.clip, intervals=train)


def _renew(model: Transformer, seed: int) -> None:
    """Discard what the model has learned."""
    task_heads.detach(model)
    initialize(model, seed)


@contextmanager
def _holding(model: Transformer, weights: Mapping[str, Tensor], directory: Path) -> Iterator[None]:
    """Use other weights in the model inside the block."""
    own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    checkpoint.fill(model, weights, directory)
    try:
        yield
    finally:
        checkpoint.fill(model, own, directory)
