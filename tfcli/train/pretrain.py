"""Pretraining from files to a model directory: prepare the text, plan, train, leave a model that works everywhere."""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tfcli
from tfcli.config import PretrainConfig, from_dict, resolve, to_dict
from tfcli.errors import UserError
from tfcli.formats import hf
from tfcli.model.transformer import Transformer, initialize
from tfcli.runtime import Runtime
from tfcli.tasks.lm import LanguageModeling
from tfcli.text.corpus import Corpus, found, prepare
from tfcli.text.tokenizer import Tokenizer
from tfcli.train import checkpoint, plan
from tfcli.train.checkpoint import TrainState, write_whole
from tfcli.train.events import Listener, Note, Preparing
from tfcli.train.metrics import Metrics
from tfcli.train.optim import Optimizers
from tfcli.train.trainer import Trainer

RUN_FILE, DATA_FILE, SHARDS = "run.json", "data.json", ".shards"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a finished run left: its directory, the steps taken and the best model's bits per byte."""

    directory: Path
    steps: int
    bits_per_byte: float | None


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
    """Train a GPT on text and leave a Hugging Face model directory.

    ``corpus`` names files, directories, globs or "-"; ``settings`` are dotted keys of ``PretrainConfig`` such as
    {"train.steps": 500}; ``out`` defaults to ``runs/NAME``. ``resume`` continues the run in ``out``, to bitwise
    the same end as a run never stopped (CPU). ``listen`` is told every event; ``started`` is when the clock began
    (``time.time()``, default now). Raises UserError for bad input, RunError for divergence or a full disk, Interrupted
    when a signal stopped it after saving.
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
    tell: Listener = listen or (lambda event: None)
    if resume:
        directory = _resumable(out, specs)
        record = _read_record(directory)
        if record["finished"]:
            raise UserError(f"{directory} is finished", hint=f"use it: tfcli generate --model {directory}")
        if specs and [_absolute(spec) for spec in specs] != record["corpus"]:
            raise UserError(
                f"{directory} was trained on other files: {', '.join(record['corpus'])}",
                hint="leave the files out to continue, or start a new run with another --out",
            )
        config = _unchanged(record, config, sources, directory)
        specs = record["corpus"]
        machine = record["machine"]
        runtime = Runtime.detect(
            device=device or machine["device"], precision=precision or machine["precision"], threads=machine["threads"]
        )
    else:
        if not specs:
            raise UserError("no text is given", hint="for example: tfcli pretrain corpus.txt")
        directory = _new_directory(out, specs)
        record = {}
        runtime = Runtime.detect(device=device, precision=precision, threads=threads)
    run = _Run(directory, specs, config, sources, runtime, tell, lambda: time.time() - began)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with checkpoint.locked(directory):
            return run.go(record, tokenizer, list(command))
    finally:
        _remove_if_empty(directory)


@dataclass
class _Run:
    """One call's fixed things."""

    directory: Path
    specs: list[str]
    config: PretrainConfig
    sources: dict[str, str]
    runtime: Runtime
    tell: Listener
    clock: Callable[[], float]

    def go(self, record: dict[str, Any], tokenizer: str | Path | None, command: list[str]) -> Result:
        """Prepare, plan, train; ``record`` is the run.json of a run to resume, or empty."""
        self.tell(Note(text=f"device: {self.runtime.describe()}"))
        corpus = self._corpus(record, tokenizer)
        if record:
            planned = _plan_of(record)
        else:
            planned = plan.make(
                self.config,
                vocab_size=corpus.tokenizer.vocab_size,
                train_tokens=corpus.train.tokens,
                runtime=self.runtime,
            )
        task = LanguageModeling(
            train=corpus.train,
            val=corpus.val,
            tokenizer=corpus.tokenizer,
            context=planned.model.context,
            runtime=self.runtime,
        )
        model = Transformer(planned.model).to(self.runtime.device)
        optimizers = Optimizers(model, self.config.optim, muon_lr=planned.muon_lr, lr=planned.lr)
        state = self._restore(model, optimizers) if record else TrainState(config_hash=_hash(to_dict(self.config)))
        if not state.step:
            initialize(model, self.config.seed)
        if not record:
            record = self._record(planned, corpus, command)
            corpus.tokenizer.save(self.directory / hf.TOKENIZER)
            write_whole(self.directory / DATA_FILE, _json(corpus.receipt))
            write_whole(self.directory / RUN_FILE, _json(record))
        for line in _announce(planned, corpus, self.directory, resumed=state.step):
            self.tell(Note(text=line))
        self._train(record, planned, task, model, optimizers, state, corpus.tokenizer)
        return Result(directory=self.directory, steps=state.step, bits_per_byte=state.best)

    def _corpus(self, record: dict[str, Any], tokenizer: str | Path | None) -> Corpus:
        """The encoded text: of a run to resume just as it was left, without reading the sources again."""
        note: Callable[[str], None] = lambda line: self.tell(Note(text=line))  # noqa: E731
        given: Any = self.config.tokenizer if tokenizer is None else Tokenizer.load(tokenizer)
        if record:
            left = found(self.directory.parent / record["shards"], note)
            if left is not None and left.tokenizer.hash == record["tokenizer_hash"]:
                return left
            given = Tokenizer.load(self.directory)
        corpus = prepare(
            self.specs,
            options=self.config.data,
            tokenizer=given,
            cache=self.directory.parent / SHARDS,
            threads=self.runtime.threads,
            vocab_size_for=plan.vocab_size,
            explicit_val_fraction=self.sources["data.val_fraction"] != "default",
            on_progress=lambda stage, done, total: self.tell(Preparing(stage=stage, done=done, total=total)),
            on_note=note,
        )
        if not corpus.val.tokens:
            raise UserError("nothing is held out for validation", hint="use --val FILE, or a larger --val-fraction")
        if record and record["data_hash"] != corpus.receipt["content_hash"]:
            raise UserError(
                f"the text is not the one that {self.directory} was trained on",
                hint="resume with the same files, or start a new run with another --out",
            )
        return corpus

    def _restore(self, model: Transformer, optimizers: Optimizers) -> TrainState:
        """Weights, optimizer and counters from the newest whole checkpoint, or a new state where there is none yet."""
        whole = checkpoint.complete(self.directory)
        if not whole:
            return TrainState(config_hash=_hash(to_dict(self.config)))
        state, weights, moments = checkpoint.load(whole[-1])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        optimizers.restore(moments)
        return state

    def _record(self, planned: plan.Plan, corpus: Corpus, command: list[str]) -> dict[str, Any]:
        return {
            "command": command,
            "corpus": [_absolute(spec) for spec in self.specs],
            "started": _now(),
            "finished": None,
            "config": to_dict(self.config),
            "sources": {key: source for key, source in self.sources.items() if source != "default"},
            "plan": {**asdict(planned), "model": asdict(planned.model)},
            "machine": {
                "device": str(self.runtime.device),
                "precision": self.runtime.precision,
                "threads": self.runtime.threads,
                "processor": platform.processor() or platform.machine(),
                "system": platform.platform(),
            },
            "versions": {"tfcli": tfcli.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "git_commit": _git_commit(),
            "seed": self.config.seed,
            "data_hash": corpus.receipt["content_hash"],
            "tokenizer_hash": corpus.tokenizer.hash,
            "shards": str(corpus.train.path.parent.relative_to(self.directory.parent)),
        }

    def _train(
        self,
        record: dict[str, Any],
        planned: plan.Plan,
        task: LanguageModeling,
        model: Transformer,
        optimizers: Optimizers,
        state: TrainState,
        tokenizer: Tokenizer,
    ) -> None:
        def save_model(weights: dict[str, Tensor]) -> None:
            best = Transformer(planned.model)
            best.load_state_dict(weights, strict=False)
            hf.save(self.directory, best, tokenizer)

        def settled(steps: int) -> None:
            tokens = steps * planned.tokens_per_step
            epochs = tokens / max(1, task.train.tokens)
            self.tell(Note(text=f"length: {steps:,} steps, {tokens:,} tokens, {epochs:.1f} passes over the text"))

        metrics = Metrics(self.directory, keep_bytes=state.metrics_bytes, tensorboard=self.config.train.tensorboard)
        try:
            with _stop_signals() as stop:
                Trainer(
                    run=self.directory,
                    model=model,
                    task=task,
                    plan=planned,
                    config=self.config,
                    runtime=self.runtime,
                    state=state,
                    optimizers=optimizers,
                    metrics=metrics,
                    listen=self.tell,
                    clock=self.clock,
                    stop=stop,
                    save_model=save_model,
                    on_settled=settled,
                ).train()
        finally:
            metrics.close()
        write_whole(self.directory / RUN_FILE, _json({**record, "finished": _now(), "steps": state.step}))


def _announce(planned: plan.Plan, corpus: Corpus, directory: Path, *, resumed: int) -> Iterator[str]:
    """What will be done, before it is done."""
    from tfcli.model.cost import parameters

    m = planned.model
    yield f"text: {corpus.train.bytes:,} bytes, {corpus.train.tokens:,} tokens; {corpus.val.tokens:,} tokens held out"
    yield (
        f"model: {parameters(m).total / 1e6:.2f} M parameters: depth {m.depth}, width {m.width}, heads {m.heads}, "
        f"context {m.context}, vocabulary {m.vocab_size}"
    )
    batch = f"{planned.batch_size} x {m.context} = {planned.tokens_per_step:,} tokens a step"
    if planned.steps is not None:
        yield f"length: {planned.steps:,} steps of {batch}"
    else:
        minutes = (planned.budget or 0) / 60
        yield f"length: about {minutes:.3g} minutes (choose with --steps, --epochs, --tokens or --budget); {batch}"
    yield f"{'continuing at step ' + format(resumed, ',') if resumed else 'writing'} {directory}"


def _new_directory(out: str | Path | None, specs: list[str]) -> Path:
    """Where a new run goes; refuses a directory that holds anything."""
    if out is not None:
        directory = Path(out)
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--out {directory} is a file", hint="it must be a new or an empty directory")
        if (directory / RUN_FILE).exists() and not _is_abandoned(directory):
            raise UserError(f"{directory} holds another run", hint="continue it with --resume, or choose another --out")
        if directory.exists() and any(p.name != ".lock" for p in directory.iterdir()) and not _is_abandoned(directory):
            raise UserError(f"{directory} is not empty", hint="choose another --out")
        return directory
    name = Path(specs[0]).name.split(".")[0].strip("*") if specs[0] != "-" else "stdin"
    base = Path("runs") / (name or "run")
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 10_000))
    return next(path for path in candidates if not path.exists() or not any(path.iterdir()))


def _is_abandoned(directory: Path) -> bool:
    """A run that was killed before it had anything to continue from or to use."""
    if not (directory / RUN_FILE).exists() or (directory / hf.WEIGHTS).exists():
        return False
    return not checkpoint.complete(directory)


def _resumable(out: str | Path | None, specs: list[str]) -> Path:
    """The run to continue: --out, else the one of the same text started last under runs/, else the one started last."""
    if out is not None:
        directory = Path(out)
        if not (directory / RUN_FILE).exists():
            raise UserError(
                f"no run to resume in {directory}", hint=f"a run has a {RUN_FILE}; leave --resume out to start one"
            )
        return directory
    runs = sorted(Path("runs").glob(f"*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime)
    wanted = [_absolute(spec) for spec in specs]
    same = [path for path in runs if not wanted or _read_record(path.parent)["corpus"] == wanted]
    if not same:
        raise UserError("no run to resume under runs/", hint="name it with --out DIR")
    return same[-1].parent


def _absolute(spec: str) -> str:
    return spec if spec == "-" else str(Path(spec).absolute())


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"config", "plan", "corpus", "machine", "data_hash"} - set(record)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", hint="it is damaged; start a new run") from None
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}", hint="it is damaged; start a new run")
    return dict(record)


def _plan_of(record: dict[str, Any]) -> plan.Plan:
    from tfcli.config import ModelConfig

    fields = dict(record["plan"])
    return plan.Plan(**{**fields, "model": ModelConfig(**fields["model"])})


def _unchanged(
    record: dict[str, Any], config: PretrainConfig, sources: dict[str, str], directory: Path
) -> PretrainConfig:
    """The run's own settings. Raises UserError, with the difference, where a given one is not the run's."""
    before = from_dict(PretrainConfig, record["config"])
    old, new = _flat(to_dict(before)), _flat(to_dict(config))
    changed = [key for key, source in sources.items() if source != "default" and old.get(key) != new.get(key)]
    if changed:
        lines = "; ".join(f"{key}: the run has {old.get(key)}, given {new.get(key)}" for key in changed)
        raise UserError(
            f"{directory} cannot be resumed with other settings: {lines}",
            hint="leave them out to continue as it was, or start a new run with another --out",
        )
    return before


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and key != "trainer":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever owns it owns the signals
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove_if_empty(directory: Path) -> None:
    """A run that failed before it wrote anything leaves no directory."""
    if directory.is_dir() and {path.name for path in directory.iterdir()} <= {".lock"}:
        (directory / ".lock").unlink(missing_ok=True)
        directory.rmdir()


def _git_commit() -> str | None:
    """The commit of the working directory, read without running git."""
    for parent in [Path.cwd(), *Path.cwd().parents]:
        head = parent / ".git" / "HEAD"
        if head.is_file():
            text = head.read_text().strip()
            ref = parent / ".git" / text.removeprefix("ref: ")
            if text.startswith("ref: "):
                return ref.read_text().strip() if ref.is_file() else None
            return text
    return None


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
