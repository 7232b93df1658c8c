"""Span corruption (Raffel et al. 2020, 3.1.4): an encoder-decoder reads a text and predicts its masked spans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tfcli.config.model import ModelConfig
from tfcli.config.options import PretrainConfig, SpanOptions, TokenizerOptions
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf.card import of_spans
from tfcli.infer.beam import Beams, answers
from tfcli.model.cost import pair_flops
from tfcli.model.transformer import Transformer
from tfcli.objectives.base import Objective, check_encoder
from tfcli.objectives.denoising import ROWS_TOKENS, Denoising, Ids, held_out
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Batch, Rows
from tfcli.tasks.common.forcing import IGNORED, both_sides, forced
from tfcli.tasks.common.windows import Seeded
from tfcli.tasks.translate.new_model import ARCHITECTURE
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.sentencepiece import Tokenizer

LEAST_CONTEXT = 16
LONGEST = 512
"""The default context that a new vocabulary has enough sentinels for: the longest of any depth."""


def counts(length: int, options: SpanOptions) -> tuple[int, int]:
    """The number of hidden tokens among ``length``, and of the spans they form, which never touch."""
    hidden = min(max(1, round(options.rate * length)), length - 1)
    return hidden, max(min(1, hidden), min(round(hidden / options.mean_length), length - hidden))


def window(context: int, options: SpanOptions) -> int:
    """Tokens of the longest text whose source and target both fit into the context."""

    def fits(length: int) -> bool:
        hidden, spans = counts(length, options)
        return max(length - hidden, hidden) + spans + 1 <= context  # a sentinel for each, and the end

    length = 2
    while fits(length + 1):
        length += 1
    return length


def sentinels(context: int | None, options: SpanOptions) -> int:
    """The sentinel tokens that a vocabulary needs for the spans of one window."""
    return counts(window(context or LONGEST, options), options)[1]


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """Masking of spans. The choice depends only on the seed that comes with a window."""

    tokenizer: Tokenizer
    options: SpanOptions

    def starts(self, length: int, random: np.random.Generator) -> tuple[Ids, Ids]:
        """Draw where spans begin and how long they are; all ways to place them are equally likely."""
        hidden, spans = counts(length, self.options)
        lengths = _parts(hidden, spans, random)
        gaps = _parts(length - hidden + 2, spans + 1, random)  # those at the two ends may be empty
        gaps[0] -= 1
        return np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths, lengths

    def corrupt(self, window: Seeded) -> tuple[list[int], list[int]]:
        """Source and target of a window, each followed by the end-of-text id.

        In the source a sentinel stands for each span; the target is each sentinel followed by its span. The ends of
        documents inside the window are left out, because to the model the end-of-text id ends a text.
        """
        ids, random = np.asarray(window[0], np.int64), np.random.default_rng(window[1])
        ids = ids[self.tokenizer.piece_bytes[ids] > 0]
        source: list[int] = []
        target: list[int] = []
        done = 0
        if len(ids) > 1:
            places = zip(self.tokenizer.sentinel_ids, *self.starts(len(ids), random), strict=False)
            for sentinel, start, length in places:
                source += [*ids[done:start].tolist(), sentinel]
                done = int(start + length)
                target += [sentinel, *ids[start:done].tolist()]
        end = self.tokenizer.eos_id
        return [*source, *ids[done:].tolist(), end], [*target, end]


def _parts(total: int, count: int, random: np.random.Generator) -> Ids:
    """Draw ``count`` numbers of at least 1 that add up to ``total``, all such lists equally likely."""
    cuts = np.sort(random.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Denoising):
    """Windows with masked spans, and the spans as targets."""

    options: SpanOptions
    unit = "nats per masked token"

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.context, self.options)
        self.check_length(max(LEAST_CONTEXT, self.train.tokens // 2))

    @cached_property
    def body(self) -> int:
        """Tokens of the text in one window."""
        return window(self.context, self.options)

    @cached_property
    def corruption(self) -> Corruption:
        """Masking of spans."""
        return Corruption(tokenizer=self.tokenizer, options=self.options)

    def batch(self, windows: list[Seeded]) -> Batch:
        """Sources and targets of windows."""
        sources, targets = zip(*map(self.corruption.corrupt, windows), strict=True)
        return both_sides(sources, targets)

    def count(self, rows: Rows) -> int:
        """Tokens of the targets."""
        assert isinstance(rows, Batch)
        return int((rows["targets_BU"] != IGNORED).sum())

    def tokens(self, rows: Rows) -> int:
        """Tokens of the text."""
        return len(rows) * self.body

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed cross-entropy of the targets, with sentinels and the end, and how many they are."""
        hidden_ND, targets_N = forced(model, rows, start_id=self.tokenizer.eos_id, dtype=dtype, dropout=dropout)
        return model.loss(hidden_ND[None], targets_N[None]), len(targets_N)

    @torch.no_grad()
    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Loss (nats per token) of the masked spans of the held-out text, the same ones every time."""
        nats, count, together = 0.0, 0, max(1, ROWS_TOKENS // self.context)
        for windows in held_out(self.val.ids, body=self.body, together=together, ragged=True):
            rows = self.batch(windows).to(self.runtime.device)
            loss, tokens = self.loss(model, rows, dtype=self.runtime.dtype, dropout=0.0)
            nats, count = nats + float(loss), count + tokens
        return {"val_loss": nats / max(1, count)}

    @torch.no_grad()
    def restored(self, model: Transformer, window: Seeded) -> tuple[list[int], dict[int, list[int]]]:
        """The source, and what the model generates, greedily, after each sentinel."""
        source, target = self.corruption.corrupt(window)
        beams, end = Beams(width=1, max_tokens=2 * len(target)), self.tokenizer.eos_id
        (answer,) = answers(model, [source], beams, start_id=end, eos_ids=(end,))
        predicted: dict[int, list[int]] = {}
        sentinel = -1
        for id in answer.ids:
            if id in self.tokenizer.sentinel_ids:
                sentinel = id
            predicted.setdefault(sentinel, []).append(id)
        hidden = (at for at, id in enumerate(source) if id in self.tokenizer.sentinel_ids)
        return source, {at: predicted.get(source[at], []) for at in hidden}


def check_tokenizer(tokenizer: Tokenizer, context: int | None, options: SpanOptions) -> None:
    """Raise UserError for a tokenizer with too few sentinels for a ``context``, or with none where that is None."""
    have, hint = len(tokenizer.sentinel_ids), "leave --tokenizer out, or give one that pretrain --arch transformer made"
    if not have:
        raise UserError(f"{tokenizer.name} has no sentinel tokens for masked spans, such as <extra_id_0>", hint=hint)
    if context is not None and have < sentinels(context, options):
        raise UserError(
            f"{tokenizer.name} has {have} sentinel tokens, a context of {context} needs {sentinels(context, options)}",
            hint=f"{hint} with this --context, or give a shorter one",
        )


class Spans(Objective):
    """--arch transformer: an encoder-decoder stored as mBART, shaped like one of finetune --from-scratch.

    It is a third wider than a decoder as deep as each of its stacks; its feed-forward layers are four times the width.
    """

    name = "transformer"
    called = "an encoder-decoder"
    settings = ("spans",)
    score, unit = "loss", SpanCorruption.unit
    least_context = LEAST_CONTEXT
    wider = (4, 3)
    layout = ARCHITECTURE
    norm_eps = 1e-5
    two_stacks = True

    def tokenizer_options(self, config: PretrainConfig) -> TokenizerOptions:
        """A vocabulary with a sentinel for each span of a window."""
        count = sentinels(config.model.context, config.spans)
        return replace(config.tokenizer, trainer={**training.sentinels(count), **config.tokenizer.trainer})

    def check_tokenizer(self, config: PretrainConfig, tokenizer: Tokenizer) -> None:
        """Raise UserError for a tokenizer with too few sentinels."""
        check_tokenizer(tokenizer, config.model.context, config.spans)

    def check(self, config: PretrainConfig) -> None:
        """Raise UserError also for settings that mBART does not have."""
        super().check(config)
        check_encoder(config.model)

    def ffn_width(self, width: int) -> int:
        """Four times the width (Vaswani et al. 2017)."""
        return 4 * width

    def window(self, config: PretrainConfig, context: int) -> int:
        """Tokens of the longest text whose source and target both fit into the context."""
        return window(context, config.spans)

    def training_flops(self, config: PretrainConfig, shape: ModelConfig) -> float:
        """FLOPs of a window's source and target, each with its end, per token of the window."""
        length = window(shape.context, config.spans)
        hidden, spans = counts(length, config.spans)
        return 3 * pair_flops(shape, length - hidden + spans + 1, hidden + spans + 1) / length

    def task(self, config: PretrainConfig, shape: ModelConfig, corpus: Corpus, runtime: Runtime) -> SpanCorruption:
        """Span corruption."""
        return SpanCorruption.of(corpus, config.spans, context=shape.context, runtime=runtime, seed=config.seed)

    def write(self, directory: Path, model: Transformer, tokenizer: Tokenizer) -> None:
        """Write the directory; its tokenizer appends the end-of-text id to every text."""
        ending = Tokenizer(tokenizer.model_bytes, name=tokenizer.name, suffix_ids=(tokenizer.eos_id,))
        hf.save(directory, model, ending, card=of_spans(model.config))

    def next_step(self, directory: Path) -> str:
        """Finetuning on translation."""
        return f"tfcli finetune {directory} PAIRS --task translate"


OBJECTIVE = Spans()
