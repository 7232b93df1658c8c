"""Masked language modelling (Devlin et al. 2019, 3.1): guess the pieces of a text that were covered up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
)
from tfcli.config.options import MaskOptions, PretrainConfig, TokenizerOptions
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.infer.fill import mask_piece
from tfcli.model import heads
from tfcli.model.heads import MaskedHead, Transform
from tfcli.model.transformer import Transformer
from tfcli.objectives.base import Objective, check_encoder
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Batch, Rows
from tfcli.tasks.common.windows import Seeded, seeded
from tfcli.tasks.task import Headline, Task
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.corpus.shards import Shard
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.sentencepiece import Tokenizer

Ids = npt.NDArray[np.int64]
NONE = -1
"""The target where there is nothing to guess."""
EVALUATION = 0
"""The seed of the masks of the held-out text: all runs are scored on the same."""
ROWS_TOKENS = 4096
"""Tokens that are scored at once."""
SPECIMEN = 48
"""Pieces of a sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingConfig:
    """Settings of an evaluation."""

    mlm: MaskOptions = field(default_factory=MaskOptions)


def attach(model: Transformer) -> MaskedHead:
    """Make the head of ModernBERT a part of ``model``, not yet filled."""
    head = MaskedHead(model.config.vocab_size, Transform(model.config.width, model.config.norm_eps))
    heads.attach(model, head)
    return head


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How pieces are covered up. What is chosen depends on the generator alone, which the caller seeds."""

    tokenizer: Codec
    options: MaskOptions

    @cached_property
    def mask_id(self) -> int:
        """The piece that covers others. Raises UserError where there is none."""
        found = mask_piece(self.tokenizer)
        if found is None:
            raise UserError(f"{self.tokenizer.name} has no [MASK]", hint="name an encoder that fills in")
        return found[0]

    @cached_property
    def _written(self) -> npt.NDArray[np.bool_]:
        """[V] whether a piece has a text."""
        return np.array([len(self.tokenizer.id_bytes(id)) > 0 for id in range(self.tokenizer.vocab_size)], bool)

    @cached_property
    def ordinary(self) -> Ids:
        """The ids of pieces that have a text."""
        return np.flatnonzero(self._written)

    @cached_property
    def _inside(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """[V] whether a piece begins, and ends, with a letter or a digit: two such meet within a word."""
        texts = [self.tokenizer.id_bytes(id) for id in range(self.tokenizer.vocab_size)]
        begins = [_in_word(text, first=True) for text in texts]
        ends = [_in_word(text, first=False) for text in texts]
        return np.array(begins, bool), np.array(ends, bool)

    def words(self, ids: Ids) -> Ids:
        """The number (T,) of the word that each id is in, from 0; a sign that is no letter is a word of its own."""
        begins, ends = self._inside
        goes_on = begins[ids].copy()
        goes_on[1:] &= ends[ids[:-1]]
        goes_on[:1] = False
        numbers: Ids = np.cumsum(~goes_on) - 1
        return numbers

    def choose(self, ids: Ids, random: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Which of the ids (T,) are to be guessed: the share ``rate`` of those with a text, at least one of them.

        Of whole words as many as the share has room for.
        """
        chosen = np.zeros(len(ids), bool)
        places = np.flatnonzero(self._written[ids])
        room = max(1, round(self.options.rate * len(places)))
        if not len(places):
            return chosen
        if not self.options.whole_words:
            chosen[random.permutation(places)[:room]] = True
            return chosen
        words = self.words(ids)[places]
        listed, sizes = np.unique(words, return_counts=True)
        order = random.permutation(len(listed))
        fits = max(1, int(np.searchsorted(np.cumsum(sizes[order]), room, side="right")))
        chosen[places[np.isin(words, listed[order[:fits]])]] = True
        return chosen

    def cover(self, ids: Ids, random: np.random.Generator) -> tuple[Ids, Ids]:
        """Inputs and targets (T,) of a text: NONE where there is nothing to guess.

        Of what is chosen most becomes [MASK], some another piece, some stays, so that a model cannot know which of the
        other pieces it may trust.
        """
        chosen = self.choose(ids, random)
        how = random.random(len(ids))
        others = self.ordinary[random.integers(len(self.ordinary), size=len(ids))]
        masked, options = chosen & (how < self.options.mask_share), self.options
        replaced = chosen & ~masked & (how < options.mask_share + options.random_share)
        inputs = np.where(masked, self.mask_id, np.where(replaced, others, ids))
        return inputs, np.where(chosen, ids, NONE)

    def room(self, context: int) -> int:
        """Ids of the text in a window of ``context`` tokens."""
        return context - len(self.tokenizer.prefix_ids) - len(self.tokenizer.suffix_ids)

    def batch(self, windows: list[Seeded]) -> Batch:
        """A batch of equally long windows, each with the seed of its masks: tokens_BT, mask_BT and targets_BT."""
        before, after = list(self.tokenizer.prefix_ids), list(self.tokenizer.suffix_ids)
        pairs = [self.cover(np.asarray(ids, np.int64), np.random.default_rng(seed)) for ids, seed in windows]
        tokens_BT = np.stack([np.concatenate([before, inputs, after]) for inputs, _ in pairs]).astype(np.int64)
        around = (len(before), len(after))
        targets_BT = np.stack([np.pad(targets, around, constant_values=NONE) for _, targets in pairs])
        tensors = {"tokens_BT": torch.from_numpy(tokens_BT), "targets_BT": torch.from_numpy(targets_BT)}
        tensors["mask_BT"] = torch.ones_like(tensors["tokens_BT"], dtype=torch.bool)
        return Batch(tensors, padded=("tokens_BT", "mask_BT", "targets_BT"))

    def whole(self, ids: npt.NDArray[Any], context: int) -> Iterator[Batch]:
        """Batches of windows over a whole text, the last of which may be shorter; the masks are always the same."""
        body = self.room(context)
        full, together = len(ids) // body, max(1, ROWS_TOKENS // context)
        for first in range(0, full, together):
            numbers = range(first, min(full, first + together))
            yield self.batch([(ids[n * body : (n + 1) * body], (EVALUATION, 0, n)) for n in numbers])
        if len(ids) % body:
            yield self.batch([(ids[full * body :], (EVALUATION, 0, full))])


def _in_word(text: bytes, *, first: bool) -> bool:
    """Whether the first, or last, character of a piece is a letter or a digit; a part of a character counts as one."""
    characters = text.decode("utf-8", "replace")
    end = characters[:1] if first else characters[-1:]
    return end.isalnum() or end == "\ufffd"


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedScores:
    """Of the pieces of a text that were covered up: loss (nats a piece), perplexity, and how many are guessed right."""

    masked_loss: float
    perplexity: float
    accuracy: float
    masked_tokens: int
    tokens: int


@torch.no_grad()
def score(
    model: Transformer,
    ids: npt.NDArray[Any],
    masking: Masking,
    *,
    context: int,
    runtime: Runtime,
    on_progress: Callable[[int, int], None] | None = None,
) -> MaskedScores:
    """Score the whole of ``ids`` (N,) in windows of ``context`` tokens, with the same pieces covered up at every time.

    ``on_progress`` is told (tokens done, tokens in all). ``ids`` may be memory-mapped.
    """
    nats, right, count, done = 0.0, 0, 0, 0
    for rows in masking.whole(ids, context):
        hidden_ND, targets_N = _at_targets(model, rows.to(runtime.device), runtime.dtype, 0.0)
        logits_NV = heads.masked_logits(model, hidden_ND)
        nats += float(torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum"))
        right += int((logits_NV.argmax(dim=-1) == targets_N).sum())
        count += len(targets_N)
        done += len(rows) * masking.room(rows["tokens_BT"].shape[1])
        if on_progress:
            on_progress(done, len(ids))
    loss = nats / max(1, count)
    return MaskedScores(
        masked_loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        accuracy=right / max(1, count),
        masked_tokens=count,
        tokens=len(ids),
    )


@dataclass(frozen=True, kw_only=True)
class MaskedLanguageModeling(Task):
    """Windows of one training shard between [CLS] and [SEP]; the cuts and the masks are others in every epoch."""

    train: Shard
    val: Shard
    tokenizer: Tokenizer
    context: int
    runtime: Runtime
    options: MaskOptions
    seed: int

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer)
        if self.context < 8:
            raise UserError(f"a context of {self.context} is too short for an encoder", hint="it must be at least 8")
        if self.train.tokens < self.body:
            raise UserError(
                f"the training text has {self.train.tokens} tokens, too few for a context of {self.context}",
                hint=f"use more text, or --context {max(8, self.train.tokens)} at most",
            )

    @property
    def body(self) -> int:
        """Ids of the text in one window."""
        return self.masking.room(self.context)

    @property
    def size(self) -> int:
        """Windows in one epoch; a last partial one waits for the next epoch's cuts."""
        return max(1, self.train.tokens // self.body - 1)

    @property
    def evaluation_tokens(self) -> int:
        """The held-out text once."""
        return self.val.tokens

    @cached_property
    def masking(self) -> Masking:
        """How pieces are covered up."""
        return Masking(tokenizer=self.tokenizer, options=self.options)

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Rows:
        """Windows: tokens_BT, mask_BT and targets_BT; every epoch begins at an offset of its own, by the golden ratio.

        Masks are a function of the seed, the epoch and the window, and so of the seed and the step.
        """
        return self.masking.batch(
            seeded(self.train.ids, indices, epochs, size=self.size, step=self.body, seed=self.seed)
        )

    def count(self, rows: Rows) -> int:
        """Pieces to guess."""
        assert isinstance(rows, Batch)
        return int((rows["targets_BT"] != NONE).sum())

    def tokens(self, rows: Rows) -> int:
        """Tokens that are read."""
        assert isinstance(rows, Batch)
        return rows["tokens_BT"].numel()

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed cross-entropy of the pieces that are covered up, and how many they are."""
        hidden_ND, targets_N = _at_targets(model, rows, dtype, dropout)
        return heads.masked_loss(model, hidden_ND, targets_N), len(targets_N)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Loss (nats) and accuracy over the pieces covered up in the held-out text, the same ones at every time."""
        found = score(model, self.val.ids, self.masking, context=self.context, runtime=self.runtime)
        return {"val_loss": found.masked_loss, "val_accuracy": found.accuracy}

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """The loss."""
        return Headline(name="nats per masked piece", value=scores["val_loss"])

    @torch.no_grad()
    def sample(self, model: Transformer, seed: int) -> str:
        """A piece of the held-out text with the model's guesses in brackets."""
        start = seed % max(1, self.val.tokens - SPECIMEN)
        length = min(SPECIMEN, self.body, self.val.tokens)
        rows = self.masking.batch([(self.val.ids[start : start + length], (EVALUATION, 1, start))])
        hidden_ND, _ = _at_targets(model, rows.to(self.runtime.device), self.runtime.dtype, 0.0)
        guesses = iter(heads.masked_logits(model, hidden_ND).argmax(dim=-1).tolist())
        parts: list[str] = []
        known: list[int] = []
        for id, target in zip(rows["tokens_BT"][0].tolist(), rows["targets_BT"][0].tolist(), strict=True):
            if target == NONE:
                known.append(id)
                continue
            text = self.tokenizer.decode([next(guesses)])
            space = text[: len(text) - len(text.lstrip())]
            parts.append(f"{self.tokenizer.decode(known)}{space}[{text.strip()}]")
            known = []
        return "".join(parts) + self.tokenizer.decode(known)


def _at_targets(model: Transformer, rows: Batch, dtype: torch.dtype, dropout: float) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) where there is something to guess, and what (N,)."""
    hidden_BTD = model(rows["tokens_BT"], dtype=dtype, dropout=dropout)
    targets_BT = rows["targets_BT"]
    there_BT = targets_BT != NONE
    return hidden_BTD[there_BT], targets_BT[there_BT]


def check_shares(options: MaskOptions) -> None:
    """Raise UserError for shares that are none."""
    if not 0 < options.rate < 1:
        raise UserError(f"mlm.rate is {options.rate}", hint="it must be above 0 and below 1")
    shares = (options.mask_share, options.random_share)
    if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        raise UserError(
            f"mlm.mask_share is {options.mask_share} and mlm.random_share {options.random_share}",
            hint="they are shares of what is guessed: at least 0, and at most 1 together",
        )


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise UserError for a tokenizer without the pieces that an encoder needs."""
    if tokenizer.mask_id is None or not tokenizer.prefix_ids or not tokenizer.suffix_ids:
        raise UserError(
            f"{tokenizer.name} has no [MASK] between a beginning and an end of text, which an encoder needs",
            hint="leave --tokenizer out, or give one that pretrain --arch bert made",
        )


class Masked(Objective):
    """--arch bert: an encoder laid out as ModernBERT (Warner et al. 2024), each layer of which sees all."""

    name = "bert"
    called = "an encoder"
    settings = ("mlm",)
    score, unit = "loss", "nats per masked piece"
    begins_documents = False
    least_context = 8
    layout = Architecture(
        causal=False,
        norms=NormConfig(kind="layer", first=False),
        attention=AttentionConfig(qk_norm=False),
        feed_forward=FeedForwardConfig(activation="gelu"),
        embedding=EmbeddingConfig(norm=True),
    )
    norm_eps = 1e-5

    def tokenizer_options(self, config: PretrainConfig) -> TokenizerOptions:
        """A vocabulary with [CLS], [SEP], [MASK] and [PAD]."""
        return replace(config.tokenizer, trainer={**training.ENCODER, **config.tokenizer.trainer})

    def check_tokenizer(self, config: PretrainConfig, tokenizer: Tokenizer) -> None:
        """Raise UserError for a tokenizer without those pieces."""
        check_tokenizer(tokenizer)

    def check(self, config: PretrainConfig) -> None:
        """Raise UserError also for shares that are none, and for what ModernBERT does not have."""
        super().check(config)
        check_encoder(config.model)
        check_shares(config.mlm)

    def task(
        self, config: PretrainConfig, shape: ModelConfig, corpus: Corpus, runtime: Runtime
    ) -> MaskedLanguageModeling:
        """Masked language modelling."""
        return MaskedLanguageModeling(
            train=corpus.train,
            val=corpus.val,
            tokenizer=corpus.tokenizer,
            context=shape.context,
            runtime=runtime,
            options=config.mlm,
            seed=config.seed,
        )

    def build(self, shape: ModelConfig) -> Transformer:
        """An encoder with ModernBERT's head."""
        model = Transformer(shape)
        attach(model)
        return model

    def write(self, directory: Path, model: Transformer, tokenizer: Tokenizer) -> None:
        """Write the directory, with how the model is finetuned: nothing has taught its [CLS] to speak for a text."""
        ids = {"cls_token_id": tokenizer.bos_id, "sep_token_id": tokenizer.eos_id, "mask_token_id": tokenizer.mask_id}
        about = {**ids, "classifier_pooling": "mean", "tfcli": {"optimizer": "muon"}}
        hf.save(directory, model, tokenizer, card=_card(model.config), about=about)

    def next_step(self, directory: Path) -> str:
        """A text with a mask filled in."""
        return f'tfcli predict {directory} --task fill "... [MASK] ..."'


def _card(config: ModelConfig) -> str:
    """The README of an encoder with its masked-language head."""
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags:
- tfcli
---

# A small encoder, made with tfcli

{config.depth} blocks of width {config.width}, {config.heads} heads, a vocabulary of {config.vocab_size} pieces and a
context of {config.context} tokens, wired as ModernBERT. It says what stands where a text has [MASK], and is what
classifiers and taggers are finetuned from.

With tfcli:

```sh
tfcli predict . --task fill "Once upon a [MASK]."
```

With transformers:

```python
from transformers import pipeline

print(pipeline("fill-mask", ".")("Once upon a [MASK]."))
```
"""


OBJECTIVE = Masked()
