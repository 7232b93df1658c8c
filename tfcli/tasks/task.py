"""The contract of an application: all that the trainer, finetune, predict and evaluate ask of it, with defaults.

Everything else about an application is in its own folder, but for a few shared helpers at the end.
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
    """The score that people see first, and by which the best model is chosen."""

    name: str
    value: float
    higher_is_better: bool = False
    error: float = 0.0
    """Standard error, where the score is a share of few examples."""

    @classmethod
    def share(cls, name: str, value: float, count: int) -> Headline:
        """The share of ``count`` things that is right; its error is that with one more right and one more wrong."""
        p = (value * count + 1) / (count + 2)
        return cls(name=name, value=value, higher_is_better=True, error=(p * (1 - p) / (count + 2)) ** 0.5)


class Task(ABC):
    """Data, loss and metrics: all that the trainer sees."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of examples in one epoch."""

    @property
    def lengths(self) -> npt.NDArray[np.int64] | None:
        """Tokens of each example, for batches of similar length; None where all have the same."""
        return None

    @property
    @abstractmethod
    def evaluation_tokens(self) -> int:
        """Number of tokens that one evaluation runs through the model."""

    @abstractmethod
    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Rows:
        """Return the examples at ``indices``, each as its epoch sees it, on the CPU."""

    @abstractmethod
    def count(self, rows: Any) -> int:
        """Return the count that ``loss`` gives for ``rows``, without computing the loss."""

    @abstractmethod
    def tokens(self, rows: Any) -> int:
        """Return the number of tokens that ``rows`` train on, for the speed and the length of a run."""

    @abstractmethod
    def loss(self, model: Any, rows: Any, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Return the summed loss, never a mean, and the count to divide it by."""

    @abstractmethod
    def evaluate(self, model: Any) -> dict[str, float]:
        """Return the metrics of the whole held-out part."""

    @abstractmethod
    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Return the headline of what ``evaluate`` gave."""

    def sample(self, model: Any, seed: int) -> str | None:
        """Return a short specimen of the model's output, for people; None where it writes nothing to read."""
        return None

    def keep(self, scores: Mapping[str, float]) -> None:
        """Take note of the scores of the best model so far."""
        return


@dataclass(frozen=True, kw_only=True)
class Start:
    """The arguments of ``Application.prepare``. ``model`` has fp32 weights, and gets the head of the task."""

    model: Transformer
    codec: Codec
    data: Sequence[str]
    """Training files."""
    config: Any
    """An instance of ``Application.config``."""
    runtime: Runtime
    hf_config: Mapping[str, Any]
    """config.json of the model that is finetuned."""
    note: Callable[[str], None]
    read: Any = None
    """Data that ``Application.fresh`` has read, if it made ``model``."""


class Finetuning(Task):
    """A task made by ``Application.prepare``: all that ``finetune`` asks beyond the trainer."""

    data_report: dict[str, Any]
    """data.json. "content_hash" covers all that was read: a run is resumed with the same data only."""
    epochs: float | None = None
    """Default passes over the data; None: those of every task."""

    @property
    def hf_config(self) -> dict[str, Any]:
        """Entries of the model's config.json beside its shape, such as id2label."""
        return {}

    def saved_codec(self, codec: Codec) -> Codec:
        """Return the tokenizer to save beside the model; by default the one that it came with."""
        return codec

    @abstractmethod
    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """Return the scores of the best model, at the end, and tables of them for people."""

    def draw(self, directory: Path, scores: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Draw the scores of ``report`` to a file in ``directory``."""
        return


class OverExamples(Finetuning):
    """A task over examples in memory: each counts once in the loss, and is read whole."""

    data_report: dict[str, Any]

    @property
    @abstractmethod
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""

    @property
    def size(self) -> int:
        """Number of examples in one epoch."""
        return len(self.lengths)

    def count(self, rows: Batch) -> int:
        """Return the number of examples."""
        return len(rows)

    def tokens(self, rows: Batch) -> int:
        """Return the number of tokens without padding."""
        return rows.real_tokens


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of ``tfcli evaluate``."""

    scores: dict[str, Any]
    """Scores for --json, with "examples" and "interval" {score: [low, high]}."""
    lines: list[str]
    """Tables for people."""
    predictions: list[dict[str, Any]]
    """One object per example, in the order of the data."""
    notes: tuple[str, ...] = ()
    """Remarks on the data, for people."""


class Predictor(ABC):
    """A finetuned model, ready to answer."""

    key: str
    """Field that every JSON object must have, for messages."""
    multi: bool = False
    """True if an input may have any number of labels."""

    @abstractmethod
    def plain(self, line: str) -> Any:
        """Parse a line of text as an input."""

    @abstractmethod
    def parse(self, row: dict[str, Any]) -> Any:
        """Parse a JSON object as an input. Raises UserError where it holds none."""

    @abstractmethod
    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """Return one object per input, in their order, with "cut" where an input was longer than the context."""

    @abstractmethod
    def show(self, answer: Mapping[str, Any]) -> str:
        """Format an answer of ``predict`` as a line for people (--format text)."""

    def search(self, width: int) -> None:
        """Set the beam width. Raises UserError for a model without a search."""
        raise UserError("--beam goes with models that translate", hint="leave it out")

    def evaluate(self, data: Sequence[str], config: Any, *, limit: int | None) -> Evaluation:
        """Score labelled files, and return every answer."""
        raise UserError("there is nothing to score this model by")

    def draw(self, path: Path, scores: Mapping[str, Any]) -> None:
        """Draw the confusion matrix of ``evaluate`` as a PNG."""
        raise UserError("--confusion goes with a model that classifies", hint="leave it out")


class Application(ABC):
    """A --task: a line in ``applications``, whose module has an instance as ``APPLICATION``."""

    name: ClassVar[str]
    """The word after --task."""
    config: ClassVar[type[FinetuneConfig]]
    """Class of its settings."""
    sizes_models: ClassVar[bool] = False
    """True if ``fresh`` makes a model of a size that fits the data."""

    def fresh(
        self, specs: Sequence[str], config: Any, runtime: Runtime, note: Callable[[str], None]
    ) -> tuple[Transformer, Codec, Any]:
        """Return a new model for these files, its tokenizer, and the data as ``Start.read`` passes it on.

        Raises UserError where a model must be given.
        """
        raise UserError(f"--task {self.name} starts from a model", hint=f"tfcli finetune MODEL DATA --task {self.name}")

    @abstractmethod
    def prepare(self, start: Start) -> Finetuning:
        """Read the data, attach the head of the task to ``start.model``, and return the task.

        Raises UserError for data that cannot be used and for a model that does not fit the task.
        """

    @abstractmethod
    def predictor(self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any], runtime: Runtime) -> Predictor:
        """Return the predictor of a finetuned model, whose config.json is ``hf_config``."""

    def check_drawing(self, path: Path) -> None:
        """Raise UserError if the task has no confusion matrix, or none can be drawn at ``path``."""
        raise UserError(f"--confusion goes with a model that classifies, this one is of the task {self.name}")

    def next_step(self, directory: Path) -> str:
        """Return the command that a person would run next."""
        return f"tfcli predict {directory}"


def check_head(shape: ModelConfig, kind: str) -> None:
    """Raise UserError for a model whose family has no head of this kind."""
    families.head_names(families.written(shape)[0], kind)


def settings_of(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return tfcli's own settings in a config.json; {} where another program wrote it."""
    ours = hf_config.get("tfcli")
    return ours if isinstance(ours, Mapping) else {}


def label_ids(names: Sequence[str]) -> dict[str, Any]:
    """Return the entries id2label and label2id of a config.json."""
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def label_names(hf_config: Mapping[str, Any]) -> list[str]:
    """Return the labels that a config.json names, in the order of their ids; [] where it names none."""
    named = hf_config.get("id2label")
    if not isinstance(named, Mapping) or sorted(named) != sorted(map(str, range(len(named)))):
        return []
    return [str(named[str(index)]) for index in range(len(named))]
