"""What a run tells while it goes on; the command line draws it, a library user may listen too."""

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
    """Reading, tokenizer training or encoding: bytes done of bytes in all."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A few more steps are done. ``steps`` and ``seconds_left`` are None until the length is fixed."""

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
    """The held-out part was scored: by its first number, such as ("bits per byte", 1.9) or ("accuracy", 0.9)."""

    step: int
    name: str
    value: float
    higher_is_better: bool = False
    best: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """The model wrote something."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint is on disk."""

    step: int


Event: TypeAlias = Note | Preparing | Progress | Evaluated | Sampled | Saved
Listener: TypeAlias = Callable[[Event], None]
