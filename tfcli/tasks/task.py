"""The whole contract of an application: what the trainer asks of it, and what finetune, predict and evaluate do.

What an application leaves out has a default here: nothing is looked for by its name. Everything else about an
application stays in its own folder, but for a few helpers at the end that several share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError
from tfcli.formats.hf.families import registry as families
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Batch, Rows
from tfcli.tasks.common.options import FinetuneConfig
from tfcli.text.tokenizers.codec import Codec


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """One number of many."""

    name: str
    value: float
    higher_is_better: bool = False
    error: float = 0.0
    """Its standard error, where it is a share of few examples."""

    @classmethod
    def share(cls, name: str, value: float, count: int) -> Headline:
        """What part of ``count`` things is right; its error is that of one more right and one more wrong."""
        p = (value * count + 1) / (count + 2)
        return cls(name=name, value=value, higher_is_better=True, error=(p * (1 - p) / (count + 2)) ** 0.5)


class Task(ABC):
    """Data, loss and metrics: all that the trainer sees. ``model`` is of the kind that the task is for."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Examples in one epoch."""

    @property
    def lengths(self) -> npt.NDArray[np.int64] | None:
        """Tokens of each example, for batches of similar length; None where all are alike."""
        return None

    @property
    @abstractmethod
    def evaluation_tokens(self) -> int:
        """Tokens that one evaluation runs through the model."""

    @abstractmethod
    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Rows:
        """The examples at ``indices``, each as its epoch sees it, on the CPU."""

    @abstractmethod
    def count(self, rows: Any) -> int:
        """What the summed loss of ``rows`` is divided by: the second of what ``loss`` gives, known before."""

    @abstractmethod
    def tokens(self, rows: Any) -> int:
        """Tokens that ``rows`` train on, for the speed and the length of a run."""

    @abstractmethod
    def loss(self, model: Any, rows: Any, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed loss and the count to divide it by; never a mean."""

    @abstractmethod
    def evaluate(self, model: Any) -> dict[str, float]:
        """Metrics over the whole held-out part."""

    @abstractmethod
    def headline(self, scores: Mapping[str, float]) -> Headline:
        """The number of ``evaluate`` that people see first, and by which the best model is chosen."""

    def sample(self, model: Any, seed: int) -> str | None:
        """A short specimen of what the model makes, for people; None where it makes nothing to read."""
        return None

    def keep(self, scores: Mapping[str, float]) -> None:
        """Take note of the scores of an evaluation whose model is the best so far."""
        return


@dataclass(frozen=True, kw_only=True)
class Start:
    """What ``Application.prepare`` is given. ``model`` computes in fp32 weights; a head is attached to it."""

    model: Transformer
    codec: Codec
    data: Sequence[str]
    """Files of the training part."""
    config: Any
    """An instance of the application's ``config``."""
    runtime: Runtime
    about: Mapping[str, Any]
    """config.json of the model that is finetuned."""
    note: Callable[[str], None]


class Finetuning(Task):
    """A task that ``Application.prepare`` made: what ``finetune`` asks beside what the trainer does."""

    data_report: dict[str, Any]
    """data.json. "content_hash" is of all that was read: a run is resumed with the same data only."""
    epochs: float | None = None
    """Passes over the data where no length is asked for; None: the usual ones."""

    @property
    def about(self) -> dict[str, Any]:
        """What the model's config.json says beside its shape: id2label and the like."""
        return {}

    def saved_codec(self, codec: Codec) -> Codec:
        """The tokenizer that is saved beside the model: the one that it came with."""
        return codec

    @abstractmethod
    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """At the end, of the best model: its scores for a program, and lines for people (tables)."""

    def draw(self, directory: Path, scores: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Draw the scores of ``report`` into a file in ``directory``."""
        return

    def save(self, directory: Path, model: Transformer) -> bool:
        """Write something else than the whole model into ``directory``; False for a task that does not."""
        return False

    def restore(self, directory: Path, model: Transformer) -> bool:
        """Put what ``save`` wrote back into ``model``; False for a task without it."""
        return False


class JudgedByF1(Finetuning):
    """One whose rows are read whole and whose best model has the best F1."""

    def tokens(self, rows: Batch) -> int:
        """All that are read."""
        return rows.real_tokens

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """F1."""
        return Headline(name="F1", value=scores["val_f1"], higher_is_better=True)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ``tfcli evaluate`` prints and writes."""

    scores: dict[str, Any]
    """For --json, with "examples" and "interval" {score: [low, high]} beside them."""
    lines: list[str]
    """Tables for people."""
    predictions: list[dict[str, Any]]
    """One object an example, in the order of the data."""
    notes: tuple[str, ...] = ()
    """What a person should know of the data."""


class Predictor(ABC):
    """A finetuned model that answers."""

    key: str
    """The field that an object of JSON lines must have, for messages."""
    multi: bool = False
    """Whether it gives any number of labels for each input."""

    @abstractmethod
    def plain(self, line: str) -> Any:
        """An input from a line of text."""

    @abstractmethod
    def parse(self, row: dict[str, Any]) -> Any:
        """An input from an object of JSON lines; UserError where it has none."""

    @abstractmethod
    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """One object for each input, in their order; with "cut" where it was longer than the context."""

    @abstractmethod
    def show(self, answer: Mapping[str, Any]) -> str:
        """An answer of ``predict`` as a line for people (--format text)."""

    def search(self, width: int) -> None:
        """Search with so many beams from here on. Raises UserError for a model that searches nothing."""
        raise UserError("--beam goes with models that translate", hint="leave it out")

    def evaluate(self, data: Sequence[str], config: Any, *, limit: int | None) -> Evaluation:
        """Scores of labelled files, and every answer."""
        raise UserError("there is nothing to score this model by")

    def draw(self, path: Path, scores: Mapping[str, Any]) -> None:
        """Draw the confusion matrix of ``evaluate`` as a PNG."""
        raise UserError("--confusion goes with a model that classifies", hint="leave it out")


class Application(ABC):
    """One --task, with a line in ``applications``. Its module has an instance as ``APPLICATION``."""

    name: ClassVar[str]
    """The word after --task."""
    config: ClassVar[type[FinetuneConfig]]
    """Its settings."""
    sizes_models: ClassVar[bool] = False
    """Whether ``fresh`` makes a model of a size for the data."""

    def fresh(
        self, specs: Sequence[str], config: Any, runtime: Runtime, note: Callable[[str], None]
    ) -> tuple[Transformer, Codec]:
        """A new model for these files, and its tokenizer. Raises UserError where a model must be given."""
        raise UserError(f"--task {self.name} begins from a model", hint=f"tfcli finetune MODEL DATA --task {self.name}")

    @abstractmethod
    def prepare(self, start: Start) -> Finetuning:
        """Read the data, attach the head that it needs to ``start.model``, and give the task.

        Raises UserError for data that cannot be used and for a model that does not fit the task.
        """

    @abstractmethod
    def predictor(self, model: Transformer, codec: Codec, about: Mapping[str, Any], runtime: Runtime) -> Predictor:
        """Of a finetuned model, whose config.json holds ``about``."""

    def check_drawing(self, path: Path) -> None:
        """Raise UserError for a confusion matrix that cannot be drawn at ``path``, or that the task does not have."""
        raise UserError(f"--confusion goes with a model that classifies, this one is of the task {self.name}")

    def next_step(self, directory: Path) -> str:
        """The command that a person goes on with."""
        return f"tfcli predict {directory}"


def check_head(shape: ModelConfig, kind: str) -> None:
    """Raise UserError for a model whose family has no head of a kind."""
    families.head_names(families.written(shape)[0], kind)


def settings_of(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json holds of tfcli's; nothing in one of another's."""
    ours = about.get("tfcli")
    return ours if isinstance(ours, Mapping) else {}


def label_ids(names: Sequence[str]) -> dict[str, Any]:
    """Labels by their ids and back, as transformers' config.json has them."""
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
