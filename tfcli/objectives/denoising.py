"""The base of objectives that mask tokens of a text: windows, held-out text, and samples of restored text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from tfcli.errors import UserError
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Batch
from tfcli.tasks.common.windows import Seeded, seeded
from tfcli.tasks.task import Headline, Task
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.corpus.shards import Shard
from tfcli.text.tokenizers.sentencepiece import Tokenizer

Ids = npt.NDArray[np.int64]
EVALUATION = 0
"""The seed of masks in the held-out text: every run is scored on the same tokens."""
ROWS_TOKENS = 4096
"""Tokens scored per batch."""
SAMPLE_TOKENS = 48


def held_out(ids: npt.NDArray[Any], *, body: int, together: int, ragged: bool) -> Iterator[list[Seeded]]:
    """Windows of ``body`` ids over a whole text, ``together`` at a time, with the seeds of an evaluation.

    The last window may be shorter; unless ``ragged`` it then comes alone.
    """
    windows = -(-len(ids) // body)
    equal = windows if ragged else len(ids) // body
    groups = [range(first, min(first + together, equal)) for first in range(0, equal, together)]
    for numbers in [*groups, range(equal, windows)]:
        if numbers:
            yield [(ids[n * body : (n + 1) * body], (EVALUATION, 0, n)) for n in numbers]


@dataclass(frozen=True, kw_only=True)
class Denoising(Task):
    """Windows of one training shard with masked tokens, which are the targets.

    Windows begin at other places in every epoch. Masks are a function of the seed, the epoch and the window, and so of
    the seed and the step.
    """

    train: Shard
    val: Shard
    tokenizer: Tokenizer
    context: int
    runtime: Runtime
    options: Any
    """The objective's own section of ``PretrainConfig``."""
    seed: int
    unit: ClassVar[str]
    """The unit of the loss, for people."""

    @classmethod
    def of(cls, corpus: Corpus, options: Any, *, context: int, runtime: Runtime, seed: int) -> Self:
        """The task on both parts of a corpus."""
        train, val, tokenizer = corpus.train, corpus.val, corpus.tokenizer
        return cls(
            train=train, val=val, tokenizer=tokenizer, options=options, context=context, runtime=runtime, seed=seed
        )

    @property
    @abstractmethod
    def body(self) -> int:
        """Tokens of the text in one window."""

    @abstractmethod
    def batch(self, windows: list[Seeded]) -> Batch:
        """A batch of windows, each with the seed of its masks."""

    @abstractmethod
    def restored(self, model: Transformer, window: Seeded) -> tuple[list[int], dict[int, list[int]]]:
        """The ids that the model reads, and by position the ids that it predicts for masked ones."""

    def check_length(self, longest: int) -> None:
        """Raise UserError for a training text without a whole window; ``longest`` is a context that would do."""
        if self.train.tokens < self.body:
            raise UserError(
                f"the training text has {self.train.tokens} tokens, too few for a context of {self.context}",
                hint=f"use more text, or --context {longest} at most",
            )

    @property
    def size(self) -> int:
        """Windows in one epoch; a last partial one is read in an epoch whose windows begin elsewhere."""
        return max(1, self.train.tokens // self.body - 1)

    @property
    def evaluation_tokens(self) -> int:
        """The held-out text once."""
        return self.val.tokens

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """The windows at ``indices`` of their epochs."""
        return self.batch(seeded(self.train.ids, indices, epochs, size=self.size, step=self.body, seed=self.seed))

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """The loss."""
        return Headline(name=self.unit, value=scores["val_loss"])

    def sample(self, model: Transformer, seed: int) -> str:
        """An excerpt of the held-out text with the model's predictions for masked tokens in brackets."""
        start = seed % max(1, self.val.tokens - SAMPLE_TOKENS)
        ids = self.val.ids[start : start + min(SAMPLE_TOKENS, self.body)]
        read, predicted = self.restored(model, (ids, (EVALUATION, 1, start)))
        parts: list[str] = []
        known: list[int] = []
        for position, id in enumerate(read):
            if position not in predicted:
                known.append(id)
                continue
            text = self.tokenizer.decode(predicted[position])
            space = text[: len(text) - len(text.lstrip())]
            parts.append(f"{self.tokenizer.decode(known)}{space}[{text.strip()}]")
            known = []
        return "".join(parts) + self.tokenizer.decode(known)
