"""What the trainer asks of an application: everything else about it stays in its own file."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.model.transformer import Transformer


class Task(Protocol):
    """Data, loss and metrics of one application."""

    @property
    def size(self) -> int:
        """Examples in one epoch."""

    @property
    def tokens_per_example(self) -> int:
        """Supervised tokens of one example, to count what was trained on."""

    @property
    def evaluation_tokens(self) -> int:
        """Tokens that one evaluation runs through the model."""

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Tensor:
        """The examples at ``indices``, each as its epoch sees it, as one CPU tensor with a row for each."""

    def loss(self, model: Transformer, rows: Tensor, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed loss and the count to divide it by; never a mean."""

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Metrics over the whole held-out part; the first, lower is better, decides which model is best."""

    def sample(self, model: Transformer, seed: int) -> str:
        """A short specimen of what the model makes, for people."""
