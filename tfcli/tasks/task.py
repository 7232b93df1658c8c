"""What an application is: what the trainer asks of it, and what finetune, predict and evaluate do.

Everything else about an application stays in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Rows
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


class Task(Protocol):
    """Data, loss and metrics of one application: all that the trainer sees. ``model`` is of the kind that it is for.

    A task with a method ``keep`` is given the scores of each evaluation whose model is kept.
    """

    @property
    def size(self) -> int:
        """Examples in one epoch."""

    @property
    def lengths(self) -> npt.NDArray[np.int64] | None:
        """Tokens of each example, for batches of similar length; None where all are alike."""

    @property
    def evaluation_tokens(self) -> int:
        """Tokens that one evaluation runs through the model."""

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Rows:
        """The examples at ``indices``, each as its epoch sees it, on the CPU."""

    def count(self, rows: Rows) -> int:
        """What the summed loss of ``rows`` is divided by: the second of what ``loss`` gives, known before."""

    def tokens(self, rows: Rows) -> int:
        """Tokens that ``rows`` train on, for the speed and the length of a run."""

    def loss(self, model: Any, rows: Any, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed loss and the count to divide it by; never a mean."""

    def evaluate(self, model: Any) -> dict[str, float]:
        """Metrics over the whole held-out part."""

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """The number of ``evaluate`` that people see first, and by which the best model is chosen."""

    def sample(self, model: Any, seed: int) -> str | None:
        """A short specimen of what the model makes, for people; None where it makes nothing to read."""


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


class Finetuning(Task, Protocol):
    """A task that ``Application.prepare`` made: what ``finetune`` asks beside what the trainer does."""

    @property
    def data_report(self) -> dict[str, Any]:
        """data.json. "content_hash" is of all that was read: a run is resumed with the same data only."""

    @property
    def about(self) -> dict[str, Any]:
        """What the model's config.json says beside its shape: id2label and the like."""

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        """At the end, of the best model: its scores for a program, and lines for people (tables)."""


class Predictor(Protocol):
    """A finetuned model that answers."""

    @property
    def key(self) -> str:
        """The field that an object of JSON lines must have, for messages."""

    def plain(self, line: str) -> Any:
        """An input from a line of text."""

    def parse(self, row: dict[str, Any]) -> Any:
        """An input from an object of JSON lines; UserError where it has none."""

    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """One object for each input, in their order; with "cut" where it was longer than the context."""

    def show(self, answer: Mapping[str, Any]) -> str:
        """An answer of ``predict`` as a line for people (--format text)."""

    def evaluate(self, data: Sequence[str], config: Any, *, limit: int | None) -> Evaluation:
        """Scores of labelled files, and every answer."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ``tfcli evaluate`` prints and writes."""

    scores: dict[str, Any]
    """For --json: the names of DESIGN.md, with "examples" and "interval" {score: [low, high]} beside them."""
    lines: list[str]
    """Tables for people."""
    predictions: list[dict[str, Any]]
    """One object an example, in the order of the data."""
    notes: tuple[str, ...] = ()
    """What a person should know of the data."""


class Application(Protocol):
    """One --task. A module ``tfcli.tasks.NAME`` has it as ``APPLICATION``."""

    @property
    def name(self) -> str:
        """The word after --task."""

    @property
    def config(self) -> type[FinetuneConfig]:
        """Its settings."""

    def prepare(self, start: Start) -> Finetuning:
        """Read the data, attach the head that it needs to ``start.model``, and give the task.

        Raises UserError for data that cannot be used and for a model that does not fit the task.
        """

    def predictor(self, model: Transformer, codec: Codec, about: Mapping[str, Any], runtime: Runtime) -> Predictor:
        """Of a finetuned model, whose config.json holds ``about``."""
