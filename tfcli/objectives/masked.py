"""Masked language modeling (Devlin et al. 2019, 3.1): predict the masked tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from tfcli.formats.hf.card import of_masked
from tfcli.infer.fill import mask_piece
from tfcli.model import heads
from tfcli.model.heads import MaskedHead, Transform
from tfcli.model.transformer import Transformer
from tfcli.objectives.base import Objective, check_encoder
from tfcli.objectives.denoising import ROWS_TOKENS, Denoising, Ids, held_out
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Batch, Rows
from tfcli.tasks.common.windows import Seeded
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.sentencepiece import Tokenizer

NONE = -1
"""The target of positions that are not masked."""
LEAST_CONTEXT = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingConfig:
    """The settings of an evaluation."""

    mlm: MaskOptions = field(default_factory=MaskOptions)


def attach(model: Transformer) -> MaskedHead:
    """Attach ModernBERT's head to ``model``, not yet initialized."""
    head = MaskedHead(model.config.vocab_size, Transform(model.config.width, model.config.norm_eps))
    heads.attach(model, head)
    return head


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Masking of tokens. The choice depends only on the generator, which the caller seeds."""

    tokenizer: Codec
    options: MaskOptions

    @cached_property
    def mask_id(self) -> int:
        """The id of [MASK]. Raises UserError if there is none."""
        piece = mask_piece(self.tokenizer)
        if piece is None:
            raise UserError(f"{self.tokenizer.name} has no [MASK]", hint="name a masked language model")
        return piece[0]

    @cached_property
    def _written(self) -> npt.NDArray[np.bool_]:
        """True (V,) for tokens that have a text."""
        return np.array([len(self.tokenizer.id_bytes(id)) > 0 for id in range(self.tokenizer.vocab_size)], bool)

    @cached_property
    def ordinary(self) -> Ids:
        """The ids of tokens that have a text."""
        return np.flatnonzero(self._written)

    @cached_property
    def _inside(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """True (V,) for tokens that begin, and that end, with a letter or a digit: two such meet within a word."""
        texts = [self.tokenizer.id_bytes(id) for id in range(self.tokenizer.vocab_size)]
        begins = [_in_word(text, first=True) for text in texts]
        ends = [_in_word(text, first=False) for text in texts]
        return np.array(begins, bool), np.array(ends, bool)

    def words(self, ids: Ids) -> Ids:
        """The number (T,) of the word that each id is in, from 0; a sign that is not a letter is its own word."""
        begins, ends = self._inside
        goes_on = begins[ids].copy()
        goes_on[1:] &= ends[ids[:-1]]
        goes_on[:1] = False
        numbers: Ids = np.cumsum(~goes_on) - 1
        return numbers

    def choose(self, ids: Ids, random: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Choose the targets among the ids (T,): the share ``rate`` of those with a text, at least one of them.

        Of whole words, as many as fit into that share.
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

    def mask(self, ids: Ids, random: np.random.Generator) -> tuple[Ids, Ids]:
        """Inputs and targets (T,) of a text; NONE where there is no target.

        Most targets become [MASK], some another token, and some stay, so that a model cannot tell which of the other
        tokens it may trust.
        """
        chosen = self.choose(ids, random)
        how = random.random(len(ids))
        others = self.ordinary[random.integers(len(self.ordinary), size=len(ids))]
        masked, options = chosen & (how < self.options.mask_share), self.options
        replaced = chosen & ~masked & (how < options.mask_share + options.random_share)
        inputs = np.where(masked, self.mask_id, np.where(replaced, others, ids))
        return inputs, np.where(chosen, ids, NONE)

    def room(self, context: int) -> int:
        """Tokens of the text in a window of ``context`` tokens."""
        return context - len(self.tokenizer.prefix_ids) - len(self.tokenizer.suffix_ids)

    def batch(self, windows: list[Seeded]) -> Batch:
        """A batch of equally long windows, each with the seed of its masks: tokens_BT, mask_BT and targets_BT."""
        before, after = list(self.tokenizer.prefix_ids), list(self.tokenizer.suffix_ids)
        pairs = [self.mask(np.asarray(ids, np.int64), np.random.default_rng(seed)) for ids, seed in windows]
        tokens_BT = np.stack([np.concatenate([before, inputs, after]) for inputs, _ in pairs]).astype(np.int64)
        around = (len(before), len(after))
        targets_BT = np.stack([np.pad(targets, around, constant_values=NONE) for _, targets in pairs])
        tensors = {"tokens_BT": torch.from_numpy(tokens_BT), "targets_BT": torch.from_numpy(targets_BT)}
        tensors["mask_BT"] = torch.ones_like(tensors["tokens_BT"], dtype=torch.bool)
        return Batch(tensors, padded=("tokens_BT", "mask_BT", "targets_BT"))

    def whole(self, ids: npt.NDArray[Any], context: int) -> Iterator[Batch]:
        """Batches of windows over a whole text, the last of which may be shorter; the masks are always the same."""
        together = max(1, ROWS_TOKENS // context)
        return map(self.batch, held_out(ids, body=self.room(context), together=together, ragged=False))


def _in_word(text: bytes, *, first: bool) -> bool:
    """Return whether the first, or last, character of a token is a letter or a digit, or a part of a character."""
    characters = text.decode("utf-8", "replace")
    end = characters[:1] if first else characters[-1:]
    return end.isalnum() or end == "\ufffd"


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedScores:
    """Scores of the masked tokens of a text: loss (nats per token), perplexity, and the share predicted correctly."""

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
    """Score the whole of ``ids`` (N,) in windows of ``context`` tokens, with the same tokens masked every time.

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
class MaskedLanguageModeling(Denoising):
    """Windows between [CLS] and [SEP] with masked tokens."""

    options: MaskOptions
    unit = "nats per masked token"

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer)
        if self.context < LEAST_CONTEXT:
            raise UserError(
                f"a context of {self.context} is too short for an encoder", hint=f"it must be at least {LEAST_CONTEXT}"
            )
        self.check_length(max(LEAST_CONTEXT, self.train.tokens))

    @property
    def body(self) -> int:
        """Tokens of the text in one window."""
        return self.masking.room(self.context)

    @cached_property
    def masking(self) -> Masking:
        """Masking of tokens."""
        return Masking(tokenizer=self.tokenizer, options=self.options)

    def batch(self, windows: list[Seeded]) -> Batch:
        """Windows as tokens_BT, mask_BT and targets_BT."""
        return self.masking.batch(windows)

    def count(self, rows: Rows) -> int:
        """Targets."""
        assert isinstance(rows, Batch)
        return int((rows["targets_BT"] != NONE).sum())

    def tokens(self, rows: Rows) -> int:
        """Tokens that are read, [CLS] and [SEP] included."""
        assert isinstance(rows, Batch)
        return rows["tokens_BT"].numel()

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed cross-entropy of the targets, and how many they are."""
        hidden_ND, targets_N = _at_targets(model, rows, dtype, dropout)
        return heads.masked_loss(model, hidden_ND, targets_N), len(targets_N)

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Loss (nats) and accuracy over the masked tokens of the held-out text, the same ones every time."""
        scores = score(model, self.val.ids, self.masking, context=self.context, runtime=self.runtime)
        return {"val_loss": scores.masked_loss, "val_accuracy": scores.accuracy}

    @torch.no_grad()
    def restored(self, model: Transformer, window: Seeded) -> tuple[list[int], dict[int, list[int]]]:
        """The window as the model reads it, and the likeliest token at each masked position."""
        rows = self.batch([window])
        hidden_ND, _ = _at_targets(model, rows.to(self.runtime.device), self.runtime.dtype, 0.0)
        likeliest = heads.masked_logits(model, hidden_ND).argmax(dim=-1).tolist()
        positions = (rows["targets_BT"][0] != NONE).nonzero().flatten().tolist()
        return rows["tokens_BT"][0].tolist(), {at: [id] for at, id in zip(positions, likeliest, strict=True)}


def _at_targets(model: Transformer, rows: Batch, dtype: torch.dtype, dropout: float) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) at the targets, and the targets (N,)."""
    hidden_BTD = model(rows["tokens_BT"], dtype=dtype, dropout=dropout)
    chosen_BT = rows["targets_BT"] != NONE
    return hidden_BTD[chosen_BT], rows["targets_BT"][chosen_BT]


def check_shares(options: MaskOptions) -> None:
    """Raise UserError for shares of the targets that add up to more than all of them."""
    if options.mask_share + options.random_share > 1 + 1e-9:
        raise UserError(
            f"mlm.mask_share is {options.mask_share} and mlm.random_share {options.random_share}",
            hint="they are shares of the masked tokens: at most 1 together",
        )


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise UserError for a tokenizer without the special tokens that an encoder needs."""
    if tokenizer.mask_id is None or not tokenizer.prefix_ids or not tokenizer.suffix_ids:
        raise UserError(
            f"{tokenizer.name} has no [MASK] between a beginning and an end of text, which an encoder needs",
            hint="leave --tokenizer out, or give one that pretrain --arch bert made",
        )


class Masked(Objective):
    """--arch bert: an encoder with ModernBERT's architecture (Warner et al. 2024), whose layers are all global."""

    name = "bert"
    called = "an encoder"
    settings = ("mlm",)
    score, unit = "loss", MaskedLanguageModeling.unit
    begins_documents = False
    least_context = LEAST_CONTEXT
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
        """Raise UserError for a tokenizer without these tokens."""
        check_tokenizer(tokenizer)

    def check(self, config: PretrainConfig) -> None:
        """Raise UserError also for impossible shares, and for settings that ModernBERT does not have."""
        super().check(config)
        check_encoder(config.model)
        check_shares(config.mlm)

    def task(
        self, config: PretrainConfig, shape: ModelConfig, corpus: Corpus, runtime: Runtime
    ) -> MaskedLanguageModeling:
        """Masked language modeling."""
        return MaskedLanguageModeling.of(corpus, config.mlm, context=shape.context, runtime=runtime, seed=config.seed)

    def build(self, shape: ModelConfig) -> Transformer:
        """An encoder with ModernBERT's head."""
        model = Transformer(shape)
        attach(model)
        return model

    def write(self, directory: Path, model: Transformer, tokenizer: Tokenizer) -> None:
        """Write the directory, with how to finetune the model: by mean pooling, for its [CLS] was never trained."""
        ids = {"cls_token_id": tokenizer.bos_id, "sep_token_id": tokenizer.eos_id, "mask_token_id": tokenizer.mask_id}
        about = {**ids, "classifier_pooling": "mean", "tfcli": {"optimizer": "muon"}}
        hf.save(directory, model, tokenizer, card=of_masked(model.config), about=about)

    def next_step(self, directory: Path) -> str:
        """A text with a mask filled in."""
        return f'tfcli predict {directory} --task fill "... [MASK] ..."'


OBJECTIVE = Masked()
