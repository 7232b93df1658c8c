"""Events of a run in progress, which the command line draws and a library user may listen to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """One line that a person should read."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparing:
    """Progress of reading, tokenizer training or encoding, in bytes."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Progress of training. ``steps`` and ``seconds_left`` are None until the length is fixed."""

    step: int
    steps: int | None
    seconds: float
    seconds_left: float | None
    train_loss: float
    lr: float
    tokens_per_second: float
    memory: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """The headline score of an evaluation, such as ("bits per byte", 1.9) or ("accuracy", 0.9)."""

    step: int
    name: str
    value: float
    higher_is_better: bool = False
    best: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A sample of the model's output."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint is on disk."""

    step: int


Event: TypeAlias = Note | Preparing | Progress | Evaluated | Sampled | Saved
Listener: TypeAlias = Callable[[Event], None]
