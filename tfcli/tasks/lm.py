"""Language modelling: predict each token from those before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.config import Sampling
from tfcli.errors import UserError
from tfcli.infer.decode import decode
from tfcli.infer.score import evaluate
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.batch import Rows
from tfcli.tasks.task import Headline
from tfcli.text.shards import Shard
from tfcli.text.tokenizer import Tokenizer


def loss(model: Transformer, tokens_BT: Tensor, *, dtype: torch.dtype, dropout: float = 0.0) -> tuple[Tensor, int]:
    """Summed cross-entropy (nats, fp32) of every token but the first of each row, and how many they are.

    ``tokens_BT`` holds T + 1 ids a row: inputs are the first T, targets the last T.
    """
    hidden_BTD = model(tokens_BT[:, :-1], dtype=dtype, dropout=dropout)
    targets_BT = tokens_BT[:, 1:]
    return model.loss(hidden_BTD, targets_BT), targets_BT.numel()


@dataclass(frozen=True, kw_only=True)
class LanguageModeling:
    """Windows of ``context`` + 1 ids over one training shard; the cuts between them move every epoch."""

    train: Shard
    val: Shard
    tokenizer: Tokenizer
    context: int
    runtime: Runtime

    def __post_init__(self) -> None:
        if self.train.tokens < self.context + 1:
            raise UserError(
                f"the training text has {self.train.tokens} tokens, too few for a context of {self.context}",
                hint=f"use more text, or --context {max(1, self.train.tokens - 1)} at most",
            )
        if self.train.tokens and int(self.train.ids[:4096].max()) >= self.tokenizer.vocab_size:
            raise UserError(f"{self.train.path} has ids beyond the vocabulary", hint="delete it and encode again")

    @property
    def size(self) -> int:
        """Windows in one epoch; a last partial one waits for the next epoch's cuts."""
        return max(1, (self.train.tokens - 1) // self.context - 1)

    @property
    def lengths(self) -> None:
        """All windows have one length."""
        return

    @property
    def evaluation_tokens(self) -> int:
        """A third more than the held-out text: its windows overlap by a quarter."""
        return self.val.tokens * 4 // 3

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Tensor:
        """Windows (B, context + 1) as int64; every epoch begins at an offset of its own, by the golden ratio."""
        room = self.train.tokens - self.size * self.context  # so that the text's last token has its turn
        offsets = (epochs * 0.6180339887498949 % 1.0 * room).astype(np.int64)
        starts = offsets + indices * self.context
        ids = self.train.ids
        return torch.from_numpy(np.stack([ids[start : start + self.context + 1] for start in starts]).astype(np.int64))

    def count(self, rows: Rows) -> int:
        """Targets."""
        return len(rows) * self.context

    def tokens(self, rows: Rows) -> int:
        """Targets."""
        return len(rows) * self.context

    def loss(self, model: Transformer, rows: Tensor, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed next-token cross-entropy of the rows, and the number of targets."""
        return loss(model, rows, dtype=dtype, dropout=dropout)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Bits per byte and loss of the whole held-out text."""
        scores = evaluate(
            model,
            self.val.ids,
            text_bytes=self.val.bytes,
            first=self.tokenizer.eos_id,
            runtime=self.runtime,
        )
        return {"val_bits_per_byte": scores.bits_per_byte, "val_loss": scores.loss}

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Bits per byte."""
        return Headline(name="bits per byte", value=scores["val_bits_per_byte"])

    def sample(self, model: Transformer, seed: int) -> str:
        """Up to 64 tokens from an empty document."""
        sampling = Sampling(max_tokens=min(64, self.context), ignore_eos=True)
        eos = self.tokenizer.eos_id
        steps = decode(model, [[eos]], sampling, seeds=[seed], eos_id=eos)
        ids = [step.id for row in steps for step in row if step.id is not None]
        return self.tokenizer.decode(ids)
