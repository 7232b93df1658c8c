"""Pretraining, from files to a model directory: prepare the text, plan, train, save."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tfcli.config.options import WARMUP_STEPS, PretrainConfig, TokenizerOptions
from tfcli.config.resolve import resolve
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.objectives.base import Objective
from tfcli.objectives.table import check_given, objective
from tfcli.text.corpus.prepare import Corpus, cached, prepare
from tfcli.text.tokenizers.sentencepiece import Tokenizer
from tfcli.train import checkpoint, notebook, plan, record, shape
from tfcli.train.checkpoint import TrainState
from tfcli.train.events import Listener, Preparing
from tfcli.train.optim import Optimizers
from tfcli.train.run import Run, holding
from tfcli.train.signals import stop_signals
from tfcli.train.trainer import LoopConfig, Trainer

SHARDS = ".shards"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a run: its directory, the steps taken and the best model's score on the held-out text."""

    directory: Path
    steps: int
    score: float | None
    """None where it was never scored."""
    score_name: str = "bits_per_byte"
    """For encoders and encoder-decoders, "loss": nats per masked token."""
    arch: str = "gpt"

    @property
    def bits_per_byte(self) -> float | None:
        """The score, if it is in bits per byte."""
        return self.score if self.score_name == "bits_per_byte" else None


def pretrain(
    corpus: str | Path | Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    tokenizer: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    preset: str | None = None,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    resume: bool = False,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    listen: Listener | None = None,
    started: float | None = None,
    command: Sequence[str] = (),
) -> Result:
    """Train a GPT, or another ``model.arch``, on text and write a Hugging Face model directory.

    ``corpus`` names files, directories, globs or "-"; ``settings`` are dotted keys of ``PretrainConfig``, such as
    {"train.steps": 500} or {"train.budget": "10m"}; ``out`` defaults to ``runs/NAME``. ``resume`` continues the run in
    ``out``; on a CPU the result is bitwise that of an uninterrupted run. ``listen`` receives every event; ``started``
    is the start of the clock (``time.time()``, default now). Raises UserError for bad input, RunError for divergence or
    a full disk, Interrupted when a signal stopped the run after saving.

    Example:
        >>> import tfcli
        >>> sizes = {"model.depth": 1, "model.context": 16, "train.batch_size": 4, "tokenizer.vocab_size": 400}
        >>> run = tfcli.pretrain("corpus.txt", out="runs/new", settings={**sizes, "train.steps": 3})
        >>> run.steps, run.directory.name
        (3, 'new')
    """
    began = time.time() if started is None else started
    specs = [str(c) for c in ([corpus] if isinstance(corpus, str | Path) else corpus)]
    config, sources = resolve(PretrainConfig, preset=preset, file=config_file, sets=sets, flags=settings)
    config = plan.one_length(config, sources)
    _refuse_idle(sources, tokenizer)
    tell: Listener = listen or notebook.listener()
    with stop_signals() as stop:
        before = None
        if resume:
            directory, before = record.resumed(out, specs)
            before = _checked(before, directory, specs)
            config = record.unchanged(before, config, sources, directory)
            specs, sources = before["corpus"], before.get("sources") or sources
        elif not specs:
            raise UserError("no text is given", hint="for example: tfcli pretrain corpus.txt; - reads stdin")
        else:
            plan.check(config)
            check_given(config, sources)
            directory = record.new_directory(out, specs)
        run = _Run(
            directory=directory,
            specs=specs,
            config=config,
            sources=sources,
            runtime=record.runtime_of(before, device=device, precision=precision, threads=threads),
            tell=tell,
            clock=lambda: time.time() - began,
            stop=stop,
            before=before,
        )
        given = None if tokenizer is None else Tokenizer.load(tokenizer)
        with holding(run.directory, run.directory.parent / SHARDS), run.runtime.active():
            return run.go(given, list(command))


def _checked(before: record.Record, directory: Path, specs: list[str]) -> record.Record:
    """The record of a run to resume, whose warm-up is a share of it, as in this version.

    Raises UserError for a run on other files, and for one that an older version began with another number of steps of
    warm-up than is usual.
    """
    if specs and [record.absolute(spec) for spec in specs] != before["corpus"]:
        raise UserError(
            f"{directory} was trained on other files: {', '.join(before['corpus'])}",
            hint="leave the files out to continue, or start a new run with another --out",
        )
    optim = before["config"].get("optim")
    steps = optim.get("warmup") if isinstance(optim, dict) else None
    if not isinstance(steps, int) or not steps:
        return before
    if steps != WARMUP_STEPS:
        raise UserError(
            f"{directory} was begun by an older version with a warm-up of {steps} steps, now a share of the run",
            hint="start again, with another --out",
        )
    return {**before, "config": {**before["config"], "optim": {**optim, "warmup": None}}}


def _refuse_idle(sources: dict[str, str], tokenizer: str | Path | None) -> None:
    """Raise UserError for a setting that another one makes ineffective."""
    given = [key for key, source in sources.items() if source != "default" and not source.startswith("preset ")]
    idle = [key for key in given if key.startswith("tokenizer.")]
    if tokenizer is not None and idle:
        raise UserError(f"--tokenizer is given, so {idle[0]} does nothing", hint="give one of the two")
    if "data.val" in given and "data.val_fraction" in given:
        raise UserError("--val and --val-fraction are both given", hint="give one of the two")


@dataclass(kw_only=True)
class _Run(Run):
    """A run of pretraining."""

    config: PretrainConfig

    @property
    def objective(self) -> Objective:
        """The objective of --arch."""
        return objective(self.config.model.arch)

    def go(self, tokenizer: Tokenizer | None, command: list[str]) -> Result:
        """Prepare, plan and train, with the directory locked."""
        if self.before is not None:
            self._tell_of_another_machine(self.before["machine"])
        self.note(f"device: {self.runtime.describe()}")
        if self.before is None:
            record.new_directory(self.directory, self.specs)  # raises where another process was quicker
        corpus = self._corpus(tokenizer)
        if self.before is not None:
            planned = record.plan_of(self.before, self.directory)
        else:
            planned = plan.make(
                self.config,
                vocab_size=corpus.tokenizer.vocab_size,
                train_tokens=corpus.train.tokens,
                runtime=self.runtime,
                on_note=self.note,
            )
        arch = self.objective
        task = arch.task(self.config, planned.model, corpus, self.runtime)
        model = arch.build(planned.model).to(self.runtime.device)
        optimizers = Optimizers(model, self.config.optim, muon_lr=planned.muon_lr, lr=planned.lr, plain=not arch.muon)
        state = self.restore(model, optimizers)
        if state is None:
            arch.fill(model, self.config.seed)
            state = TrainState()
        about = self.before or self._record(planned, corpus, command)
        self.begin(about, corpus.data_report)
        if not (self.directory / hf.TOKENIZER).exists():
            corpus.tokenizer.save(self.directory / hf.TOKENIZER)
        size = sum(parameter.numel() for parameter in model.parameters())
        self.announce(*_overview(planned, corpus, size), step=state.step)

        def save_model(weights: dict[str, Tensor]) -> None:
            arch.save(self.directory, planned.model, weights, corpus.tokenizer)

        def fixed(steps: int) -> None:
            tokens = steps * planned.tokens_per_step
            epochs = tokens / max(1, corpus.train.tokens)
            self.note(f"length: {steps:,} steps, {tokens:,} tokens, {epochs:.1f} epochs")

        with self.gently(state) as metrics:
            Trainer(
                run=self,
                model=model,
                task=task,
                plan=planned,
                loop=loop_of(self.config),
                state=state,
                optimizers=optimizers,
                metrics=metrics,
                save_model=save_model,
                on_steps=fixed,
            ).train()
        self.finish(about, state)
        score, name = state.best, arch.score
        return Result(directory=self.directory, steps=state.step, score=score, score_name=name, arch=arch.name)

    def _tell_of_another_machine(self, machine: Mapping[str, Any]) -> None:
        """Note what the run that is resumed was started on, where this is another."""
        here = record.describe(self.runtime)["machine"]
        keys = ("device", "precision", "threads")
        other = [f"{key} {machine.get(key)}" for key in keys if machine.get(key) != here[key]]
        if other:
            self.note(f"the run was started with {', '.join(other)}: the result may differ in the last digits")

    def _record(self, planned: plan.Plan, corpus: Corpus, command: list[str]) -> record.Record:
        """The content of run.json when a run begins; "shards" is the path from its parent to the encoded text."""
        data_hash, tokenizer_hash = corpus.data_report["content_hash"], corpus.tokenizer.hash
        every = self.describe(planned, command, data_hash=data_hash, tokenizer_hash=tokenizer_hash)
        shards = str(corpus.train.path.parent.relative_to(self.directory.parent))
        return {**every, "shards": shards, "checksums": record.checksums(corpus)}

    def _corpus(self, tokenizer: Tokenizer | None) -> Corpus:
        """The encoded text; a run that is resumed finds it as it was left, without reading the sources again."""
        if self.before is None:
            if tokenizer is not None:
                self.objective.check_tokenizer(self.config, tokenizer)
            return self._prepared(tokenizer or self.objective.tokenizer_options(self.config))
        if tokenizer is not None and tokenizer.hash != self.before["tokenizer_hash"]:
            raise UserError(
                f"{self.directory} was started with another tokenizer",
                hint="leave --tokenizer out to continue, or start a new run with another --out",
            )
        left = cached(self.directory.parent / str(self.before.get("shards")), self.note)
        if left is not None and record.checksums(left) == self.before["checksums"]:
            return left
        if "-" in self.specs and (sys.stdin is None or sys.stdin.isatty()):
            raise UserError(
                f"the encoded text of {self.directory} is gone, and it came from stdin",
                hint=f"pipe the same text in: ... | {checkpoint.resume_command(self.directory)}",
            )
        corpus = self._prepared(tokenizer or Tokenizer.load(self.directory))
        if record.checksums(corpus) != self.before["checksums"]:
            raise UserError(
                f"the text is not the one that {self.directory} was trained on",
                hint="resume with the same files, or start a new run with another --out",
            )
        return corpus

    def _prepared(self, tokenizer: Tokenizer | TokenizerOptions) -> Corpus:
        corpus = prepare(
            self.specs,
            options=self.config.data,
            tokenizer=tokenizer,
            cache=self.directory.parent / SHARDS,
            threads=self.runtime.threads,
            vocab_size_for=lambda size: shape.vocab_size(
                size, depth=self.config.model.depth, budget=plan.time_budget(self.config)
            ),
            explicit_val_fraction=self.sources["data.val_fraction"] != "default",
            begin=self.objective.begins_documents,
            on_progress=lambda stage, done, total: self.tell(Preparing(stage=stage, done=done, total=total)),
            on_note=self.note,
        )
        if not corpus.val.tokens:
            raise UserError("nothing is held out for validation", hint="use --val FILE, or a larger --val-fraction")
        return corpus


def loop_of(config: PretrainConfig) -> LoopConfig:
    """Return the settings of the training loop."""
    optim = config.optim
    return LoopConfig(seed=config.seed, warmup=optim.warmup, decay=optim.decay, clip=optim.clip, intervals=config.train)


def _overview(planned: plan.Plan, corpus: Corpus, size: int) -> Iterator[str]:
    """Lines on what will be done; ``size`` is the number of parameters."""
    m = planned.model
    yield f"text: {corpus.train.bytes:,} bytes, {corpus.train.tokens:,} tokens; {corpus.val.tokens:,} tokens held out"
    sizes = f"depth {m.depth}, width {m.width}, heads {m.heads}, context {m.context}, vocabulary {m.vocab_size}"
    yield f"model: {size / 1e6:.2f} M parameters: {sizes}"
    batch = f"{planned.batch_size} x {planned.window or m.context} = {planned.tokens_per_step:,} tokens per step"
    if planned.steps is not None:
        yield f"length: {planned.steps:,} steps of {batch}"
    else:
        budget = planned.budget or 0
        duration = f"{budget / 60:.3g} minutes" if budget >= 90 else f"{budget:.3g} s"
        yield f"length: about {duration} (choose with --steps, --epochs, --tokens or --budget); {batch}"
