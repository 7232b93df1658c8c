"""Pretraining from files to a model directory: prepare the text, plan, train, leave a model that works everywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tfcli.config.options import PretrainConfig, TokenizerOptions
from tfcli.config.resolve import resolve
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.runtime import Runtime
from tfcli.text.corpus.prepare import Corpus, found, prepare
from tfcli.text.tokenizers.sentencepiece import Tokenizer
from tfcli.train import arch, checkpoint, notebook, plan, record
from tfcli.train.checkpoint import TrainState
from tfcli.train.events import Listener, Note, Preparing
from tfcli.train.metrics import check_tensorboard
from tfcli.train.optim import Optimizers
from tfcli.train.run import Run, holding
from tfcli.train.signals import Stop, stop_signals

SHARDS = ".shards"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a finished run left: its directory, the steps taken and the best model's score.

    That is its bits per byte, or the loss (nats) on masked pieces of an encoder, on hidden ones of an encoder-decoder.
    """

    directory: Path
    steps: int
    bits_per_byte: float | None
    masked_loss: float | None = None
    arch: str = "gpt"


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
    """Train a GPT, or another ``model.arch``, on text and leave a Hugging Face model directory.

    ``corpus`` names files, directories, globs or "-"; ``settings`` are dotted keys of ``PretrainConfig`` such as
    {"train.steps": 500}; ``out`` defaults to ``runs/NAME``. ``resume`` continues the run in ``out``, to bitwise
    the same end as a run never stopped (CPU). ``listen`` is told every event; ``started`` is when the clock began
    (``time.time()``, default now). Raises UserError for bad input, RunError for divergence or a full disk, Interrupted
    when a signal stopped it after saving.

    Example:
        >>> import tfcli
        >>> sizes = {"model.depth": 1, "model.context": 16, "train.batch_size": 4, "tokenizer.vocab_size": 400}
        >>> run = tfcli.pretrain("corpus.txt", out="runs/new", settings={**sizes, "train.steps": 3})
        >>> run.steps, run.directory.name
        (3, 'new')
    """
    began = time.time() if started is None else started
    specs = [str(c) for c in ([corpus] if isinstance(corpus, str | Path) else corpus)]
    config, sources = resolve(
        PretrainConfig,
        preset=preset,
        file=None if config_file is None else Path(config_file),
        sets=sets,
        flags=settings,
    )
    config = plan.one_length(config, sources)
    _no_idle_settings(sources, tokenizer)
    tell: Listener = listen or notebook.listener()
    with stop_signals() as stop:
        if resume:
            run = _resumed(out, specs, config, sources, device, precision, threads, tell)
        else:
            if not specs:
                raise UserError("no text is given", hint="for example: tfcli pretrain corpus.txt; - reads stdin")
            plan.check(config)
            arch.check(config, sources)
            runtime = Runtime.detect(device=device, precision=precision, threads=threads)
            directory = record.new_directory(out, specs)
            run = _Run(directory=directory, specs=specs, config=config, sources=sources, runtime=runtime, tell=tell)
        if run.config.train.tensorboard:
            check_tensorboard()
        given = None if tokenizer is None else Tokenizer.load(tokenizer)
        with holding(run.directory, run.directory.parent / SHARDS):
            return run.go(given, list(command), stop, lambda: time.time() - began)


def _resumed(
    out: str | Path | None,
    specs: list[str],
    config: PretrainConfig,
    sources: dict[str, str],
    device: str | None,
    precision: str | None,
    threads: int | None,
    tell: Listener,
) -> _Run:
    """The run to continue, with its own settings and on its own kind of machine unless another is asked for."""
    directory = record.resumable(out, specs)
    before = record.read(directory)
    if before.get("finished"):
        raise UserError(f"{directory} is finished", hint=f"use it: tfcli generate --model {directory}")
    if specs and [record.absolute(spec) for spec in specs] != before["corpus"]:
        raise UserError(
            f"{directory} was trained on other files: {', '.join(before['corpus'])}",
            hint="leave the files out to continue, or start a new run with another --out",
        )
    config = record.unchanged(before, config, sources, directory)
    runtime = record.runtime_of(before, device=device, precision=precision, threads=threads)
    machine = before["machine"]
    here = {"device": str(runtime.device), "precision": runtime.precision, "threads": runtime.threads}
    other = [f"{key} {machine.get(key)}" for key, value in here.items() if machine.get(key) != value]
    if other:
        tell(Note(text=f"the run was started with {', '.join(other)}: the end may differ in the last digits"))
    return _Run(
        directory=directory,
        specs=before["corpus"],
        config=config,
        sources=before.get("sources") or sources,
        runtime=runtime,
        tell=tell,
        before=before,
    )


def _no_idle_settings(sources: dict[str, str], tokenizer: str | Path | None) -> None:
    """Raise UserError for a setting that another one makes idle."""
    given = [key for key, source in sources.items() if source not in ("default",) and not source.startswith("preset ")]
    idle = [key for key in given if key.startswith("tokenizer.")]
    if tokenizer is not None and idle:
        raise UserError(f"--tokenizer is given, so {idle[0]} does nothing", hint="give one of the two")
    if "data.val" in given and "data.val_fraction" in given:
        raise UserError("--val and --val-fraction are both given", hint="give one of the two")


@dataclass(kw_only=True)
class _Run(Run):
    """A run of pretraining."""

    config: PretrainConfig

    def go(self, tokenizer: Tokenizer | None, command: list[str], stop: Stop, clock: Callable[[], float]) -> Result:
        """Prepare, plan, train, with the directory held."""
        self.note(f"device: {self.runtime.describe()}")
        if self.before is None:
            record.new_directory(self.directory, self.specs)  # nobody else was quicker
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
        task = arch.task(self.config, planned.model, corpus, self.runtime)
        model = arch.build(self.config, planned.model).to(self.runtime.device)
        plain = self.config.model.arch == "lstm"
        optimizers = Optimizers(model, self.config.optim, muon_lr=planned.muon_lr, lr=planned.lr, plain=plain)
        state = self._restored(model, optimizers)
        about = self.before or self._record(planned, corpus, command)
        self.begin(about, corpus.receipt)
        if not (self.directory / hf.TOKENIZER).exists():
            corpus.tokenizer.save(self.directory / hf.TOKENIZER)
        size = sum(parameter.numel() for parameter in model.parameters())
        for line in _announce(planned, corpus, self.directory, size, resumed=state.step):
            self.note(line)

        def save_model(weights: dict[str, Tensor]) -> None:
            arch.save(self.directory, self.config, planned.model, weights, corpus.tokenizer)

        def settled(steps: int) -> None:
            tokens = steps * planned.tokens_per_step
            epochs = tokens / max(1, corpus.train.tokens)
            self.note(f"length: {steps:,} steps, {tokens:,} tokens, {epochs:.1f} passes over the text")

        self.train(
            model,
            task,
            planned,
            self.config,
            state=state,
            optimizers=optimizers,
            clock=clock,
            stop=stop,
            save_model=save_model,
            on_settled=settled,
        )
        record.write(self.directory, record.RUN_FILE, {**about, "finished": record.now(), "steps": state.step})
        kind = self.config.model.arch
        bits, masked = (state.best, None) if kind in ("gpt", "lstm") else (None, state.best)
        return Result(directory=self.directory, steps=state.step, bits_per_byte=bits, masked_loss=masked, arch=kind)

    def _record(self, planned: plan.Plan, corpus: Corpus, command: list[str]) -> record.Record:
        """The content of run.json when a run begins; "shards" is the way from its parent to its encoded text."""
        every = record.make(
            self.specs,
            self.config,
            self.sources,
            planned,
            self.runtime,
            command,
            data_hash=corpus.receipt["content_hash"],
            tokenizer_hash=corpus.tokenizer.hash,
        )
        shards = str(corpus.train.path.parent.relative_to(self.directory.parent))
        return {**every, "shards": shards, "checksums": record.checksums(corpus)}

    def _corpus(self, tokenizer: Tokenizer | None) -> Corpus:
        """The encoded text: of a run to resume just as it was left, without reading the sources again."""
        if self.before is None:
            if tokenizer is not None:
                arch.check_tokenizer(self.config, tokenizer)
            return self._prepared(tokenizer or arch.tokenizer_options(self.config))
        if tokenizer is not None and tokenizer.hash != self.before["tokenizer_hash"]:
            raise UserError(
                f"{self.directory} was started with another tokenizer",
                hint="leave --tokenizer out to continue, or start a new run with another --out",
            )
        left = found(self.directory.parent / str(self.before.get("shards")), self.note)
        if left is not None and record.checksums(left) == self.before["checksums"]:
            return left
        if "-" in self.specs and sys.stdin.isatty():
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
            vocab_size_for=lambda size: plan.vocab_size(size, self.config),
            explicit_val_fraction=self.sources["data.val_fraction"] != "default",
            begin=self.config.model.arch != "bert",
            on_progress=lambda stage, done, total: self.tell(Preparing(stage=stage, done=done, total=total)),
            on_note=self.note,
        )
        if not corpus.val.tokens:
            raise UserError("nothing is held out for validation", hint="use --val FILE, or a larger --val-fraction")
        return corpus

    def _restored(self, model: arch.Model, optimizers: Optimizers) -> TrainState:
        """Weights, optimizer and counters: of the newest whole checkpoint, or new ones where there is none yet."""

        def fill(weights: Mapping[str, Tensor], path: Path) -> None:
            named, of = dict(model.named_parameters()), str(self.directory / record.RUN_FILE)
            checkpoint.fill(named, weights, path=path, of=of, changed="one of them")

        state = self.restore(fill, optimizers)
        if state is None:
            arch.fill(model, self.config.seed)
        return state or TrainState()


def _announce(planned: plan.Plan, corpus: Corpus, directory: Path, size: int, *, resumed: int) -> Iterator[str]:
    """What will be done, before it is done; ``size`` is the number of parameters."""
    m = planned.model
    yield f"text: {corpus.train.bytes:,} bytes, {corpus.train.tokens:,} tokens; {corpus.val.tokens:,} tokens held out"
    yield (
        f"model: {size / 1e6:.2f} M parameters: depth {m.depth}, width {m.width}, heads {m.heads}, "
        f"context {m.context}, vocabulary {m.vocab_size}"
    )
    batch = f"{planned.batch_size} x {planned.window or m.context} = {planned.tokens_per_step:,} tokens a step"
    if planned.steps is not None:
        yield f"length: {planned.steps:,} steps of {batch}"
    else:
        budget = planned.budget or 0
        said = f"{budget / 60:.3g} minutes" if budget >= 90 else f"{budget:.3g} s"
        yield f"length: about {said} (choose with --steps, --epochs, --tokens or --budget); {batch}"
    yield f"{'continuing at step ' + format(resumed, ',') if resumed else 'writing'} {directory}"
