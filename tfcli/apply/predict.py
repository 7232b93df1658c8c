"""Prediction: a model of any task applied to texts, one answer for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from tfcli.errors import UserError, unknown
from tfcli.formats.hf.heads import Loaded
from tfcli.formats.open import Opened, open_path
from tfcli.infer.engine import Engine
from tfcli.model.quant.quantize import Quantization, quantize_model
from tfcli.objectives.fill import FillPredictor, TextPredictor
from tfcli.runtime import Machine, Runtime
from tfcli.tasks.applications import APPLICATIONS, application, of_head
from tfcli.tasks.task import Predictor
from tfcli.train import notebook

Note: TypeAlias = Callable[[str], None]
EMBED, FILL = "embed", "fill"
"""Tasks that need no finetuning: vectors of texts, words for [MASK]."""
WINDOW = 1024
"""Inputs that are in memory at once."""


def silent(line: str) -> None:
    """Ignore a note."""
    return


def predict(
    model: str | Path | Opened,
    texts: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]],
    *,
    task: str | None = None,
    beam: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    on_note: Note | None = None,
) -> list[dict[str, Any]]:
    """Answer each text by the model's task: one object for each, in order, as ``tfcli predict`` prints them.

    A text is a string, or an object with the fields that the task reads, such as {"question": ..., "context": ...}.
    ``task`` defaults to the one that the model was finetuned for, else "embed": unit vectors, computed in fp32 unless
    ``precision`` is given; "fill" gives words for each [MASK]. ``beam`` is the beam width of a translation. An answer
    has "cut" where its text was truncated to the model's context. ``device``, ``precision``, ``threads`` and
    ``quantize`` are as in ``load``. Raises UserError for a task that the model does not have, and for an invalid text.

    To reuse a loaded model, or to answer a stream of texts, use ``TaskModel``.

    Example:
        >>> import tfcli
        >>> [answer] = tfcli.predict("runs/reviews", ["A lovely film."])
        >>> sorted(answer)
        ['label', 'probabilities', 'score', 'text']
        >>> [len(answer["embedding"]) for answer in tfcli.predict("runs/first", ["a king", "a well"], task="embed")]
        [32, 32]
    """
    machine = Machine(device=device, precision=precision, threads=threads, quantize=quantize)
    loaded = TaskModel.load(model, task=task, beam=beam, machine=machine, on_note=on_note)
    rows = [texts] if isinstance(texts, str | Mapping) else texts
    total = len(rows) if isinstance(rows, Sequence) else 0
    tell = notebook.counter("texts")
    answers: list[dict[str, Any]] = []
    for answer in loaded.predict(loaded.parsed(rows)):
        answers.append(answer)
        if len(answers) % WINDOW == 0 or len(answers) == total:
            tell(len(answers), total)
    return answers


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A loaded model for one task.

    Example:
        >>> import tfcli
        >>> model = tfcli.TaskModel.load("runs/reviews")
        >>> model.task
        'classify'
        >>> for answer in model.predict(model.parsed(["Lovely.", "Dull."])):
        ...     print(answer["text"])
        Lovely.
        Dull.
    """

    task: str
    predictor: Predictor
    runtime: Runtime

    @classmethod
    def load(
        cls,
        model: str | Path | Opened,
        *,
        task: str | None = None,
        beam: int | None = None,
        machine: Machine | None = None,
        on_note: Note | None = None,
    ) -> TaskModel:
        """Load the model at a path for ``task``; ``on_note`` receives the device. Raises UserError as ``predict``."""
        opened = model if isinstance(model, Opened) else open_path(model)
        machine, note = machine or Machine(), on_note or silent
        name = choose_task(opened, task)
        predictor, runtime = load_predictor(opened, name, machine, note)
        if beam is not None:
            predictor.search(beam)
        return cls(task=name, predictor=predictor, runtime=runtime)

    def parsed(self, texts: Iterable[str | Mapping[str, Any]]) -> Iterator[Any]:
        """Parse strings and objects for ``predict``. Raises UserError for one that the task cannot read."""
        for number, text in enumerate(texts, 1):
            try:
                yield self.predictor.plain(text) if isinstance(text, str) else self.predictor.parse(dict(text))
            except UserError as error:
                raise UserError(f"text {number} {error.message}", hint=error.hint) from None

    def predict(self, inputs: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The answers of parsed inputs, in order and in bounded memory."""
        inputs = iter(inputs)
        while window := list(islice(inputs, WINDOW)):
            with self.runtime.active():
                answers = self.predictor.predict(window)
            yield from answers


class EmbedPredictor(TextPredictor):
    """Vectors of texts: the normalized mean of the last hidden states."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def predict(self, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """{"text", "embedding"}, with "cut" where the text was truncated."""
        encoded = [self.engine.fitted(text) for text in inputs]
        vectors = self.engine.embed(encoded)
        return [
            {"text": text, "embedding": [round(float(number), 7) for number in vector]}
            | ({"cut": True} if one.cut else {})
            for text, vector, one in zip(inputs, vectors, encoded, strict=True)
        ]

    def show(self, answer: Mapping[str, Any]) -> str:
        """The text, a tab and its vector."""
        return f"{' '.join(answer['text'].split())}\t{' '.join(map(str, answer['embedding']))}"


def task_of(model: Opened) -> str | None:
    """The task that a model was finetuned for; None for other models."""
    ours = model.hf_config.get("tfcli")
    name = ours.get("task") if isinstance(ours, dict) else None
    name = name or of_head(model.head)
    return name if isinstance(name, str) and name in APPLICATIONS else None


def choose_task(model: Opened, asked: str | None) -> str:
    """The task that is asked for, else that of the model, else "embed". Raises UserError for one it does not have."""
    finetuned = task_of(model)
    name = asked or finetuned or EMBED
    if name in (finetuned, EMBED, FILL):
        return name
    if name in APPLICATIONS:
        path = model.path
        raise UserError(f"{path} was not finetuned for {name}", hint=f"tfcli finetune {path} DATA --task {name}")
    raise unknown("task", name, (EMBED, FILL, *APPLICATIONS))


def load_predictor(model: Opened, task: str, machine: Machine, note: Note) -> tuple[Predictor, Runtime]:
    """Load the model for one of its tasks. Raises UserError as ``Opened.load_whole`` does."""
    if task == EMBED:
        machine = replace(machine, precision=machine.precision or "fp32")
        runtime = runtime_of(machine, note)
        with runtime.active():
            return EmbedPredictor(Engine(*model.load(runtime=runtime, quantize=machine.quantize), runtime)), runtime
    loaded, runtime = load_whole(model, machine, note)
    if task == FILL:
        return FillPredictor(loaded.model, loaded.codec), runtime
    return application(task).predictor(loaded.model, loaded.codec, loaded.hf_config, runtime), runtime


def load_whole(model: Opened, machine: Machine, note: Note) -> tuple[Loaded, Runtime]:
    """Load the model with its head, quantized if asked for."""
    runtime = runtime_of(machine, note)
    with runtime.active():
        loaded = model.load_whole(runtime=runtime, on_note=note)
        if machine.quantize is not None:
            quantize_model(loaded.model, Quantization.of(machine.quantize), name=str(model.path))
    loaded.model.requires_grad_(False)
    return loaded, runtime


def runtime_of(machine: Machine, note: Note) -> Runtime:
    """The runtime that is asked for; ``note`` receives its device."""
    runtime = machine.runtime()
    note(f"device: {runtime.describe()}")
    return runtime
