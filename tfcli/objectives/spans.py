"""Span corruption (Raffel et al. 2020, 3.1.4): an encoder-decoder reads a text with holes and says what was there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.config.model import ModelConfig
from tfcli.config.options import PretrainConfig, SpanOptions, TokenizerOptions
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.infer.beam import Beams, answers
from tfcli.model.cost import pair_flops
from tfcli.model.transformer import Transformer
from tfcli.objectives.base import Objective, check_encoder
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Batch, Rows
from tfcli.tasks.common.forcing import IGNORED, both_sides, forced
from tfcli.tasks.common.windows import Seeded, seeded
from tfcli.tasks.task import Headline, Task
from tfcli.tasks.translate.new_model import ARCHITECTURE
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.corpus.shards import Shard
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.sentencepiece import Tokenizer

Ids = npt.NDArray[np.int64]
EVALUATION = 0
"""The seed of the holes in the held-out text: all runs are scored on the same."""
LEAST_CONTEXT = 16
LONGEST = 512
"""The context whose windows a new vocabulary has sentinels for, where none is given: the longest of any depth."""
ROWS_TOKENS = 4096
"""Tokens that are scored at once."""
SPECIMEN = 48
"""Pieces of a sample."""


def counts(length: int, options: SpanOptions) -> tuple[int, int]:
    """How many of ``length`` tokens are hidden, and in how many spans; with a token between two of them."""
    hidden = min(max(1, round(options.rate * length)), length - 1)
    return hidden, max(min(1, hidden), min(round(hidden / options.mean_length), length - hidden))


def window(context: int, options: SpanOptions) -> int:
    """Tokens of the longest text of which neither what is left nor what is hidden is longer than the context."""

    def fits(length: int) -> bool:
        hidden, spans = counts(length, options)
        return max(length - hidden, hidden) + spans + 1 <= context  # a sentinel for each, and the end

    length = 2
    while fits(length + 1):
        length += 1
    return length


def sentinels(context: int | None, options: SpanOptions) -> int:
    """The pieces that a vocabulary needs to stand for the spans of one window."""
    return counts(window(context or LONGEST, options), options)[1]


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How a text is taken apart. What is hidden depends on the generator alone, which the caller seeds."""

    tokenizer: Tokenizer
    options: SpanOptions

    def starts(self, length: int, random: np.random.Generator) -> tuple[Ids, Ids]:
        """Where spans begin and how long they are: all ways to place so many are equally likely."""
        hidden, spans = counts(length, self.options)
        lengths = _parts(hidden, spans, random)
        gaps = _parts(length - hidden + 2, spans + 1, random)  # those at the two ends may be empty
        gaps[0] -= 1
        return np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths, lengths

    def corrupt(self, ids: Ids, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """Source and target of a text, each with the end of text behind it.

        In the source a sentinel stands for each span; the target is each sentinel followed by what it stands for. The
        ends of documents within the text are left out: in what a model reads and says the end of text is the end.
        """
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
    """``count`` numbers (count,) of at least 1 that add up to ``total``, all such lists equally likely."""
    cuts = np.sort(random.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Task):
    """Windows of one training shard; the cuts between them and the holes in them are others in every epoch."""

    train: Shard
    val: Shard
    tokenizer: Tokenizer
    context: int
    runtime: Runtime
    options: SpanOptions
    seed: int

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.context, self.options)
        if self.train.tokens < self.body:
            raise UserError(
                f"the training text has {self.train.tokens} tokens, too few for a context of {self.context}",
                hint=f"use more text, or --context {max(LEAST_CONTEXT, self.train.tokens // 2)} at most",
            )

    @cached_property
    def body(self) -> int:
        """Tokens of the text in one window."""
        return window(self.context, self.options)

    @property
    def size(self) -> int:
        """Windows in one epoch; a last partial one waits for the next epoch's cuts."""
        return max(1, self.train.tokens // self.body - 1)

    @property
    def evaluation_tokens(self) -> int:
        """The held-out text once."""
        return self.val.tokens

    @cached_property
    def corruption(self) -> Corruption:
        """How windows are taken apart."""
        return Corruption(tokenizer=self.tokenizer, options=self.options)

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """Both sides of windows; every epoch begins at an offset of its own, by the golden ratio.

        Holes are a function of the seed, the epoch and the window, and so of the seed and the step.
        """
        return self._corrupted(seeded(self.train.ids, indices, epochs, size=self.size, step=self.body, seed=self.seed))

    def _corrupted(self, windows: list[Seeded]) -> Batch:
        """A batch of windows, each with the seed of its holes."""
        made = [
            self.corruption.corrupt(np.asarray(ids, np.int64), np.random.default_rng(seed)) for ids, seed in windows
        ]
        return both_sides([source for source, _ in made], [target for _, target in made])

    def count(self, rows: Rows) -> int:
        """Tokens of the targets."""
        assert isinstance(rows, Batch)
        return int((rows["targets_BU"] != IGNORED).sum())

    def tokens(self, rows: Rows) -> int:
        """Tokens of the text."""
        return len(rows) * self.body

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Summed cross-entropy of the targets, sentinels and the end among them, and how many they are."""
        hidden_ND, targets_N = forced(model, rows, start_id=self.tokenizer.eos_id, dtype=dtype, dropout=dropout)
        return model.loss(hidden_ND[None], targets_N[None]), len(targets_N)

    @torch.no_grad()
    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Loss (nats a token) of what is hidden in the held-out text, the same at every time."""
        nats, count = 0.0, 0
        for rows in self._held_out():
            loss, tokens = self.loss(model, rows.to(self.runtime.device), dtype=self.runtime.dtype, dropout=0.0)
            nats, count = nats + float(loss), count + tokens
        return {"val_loss": nats / max(1, count)}

    def _held_out(self) -> Iterator[Batch]:
        """Batches of windows over the whole held-out text, the last of which may be shorter."""
        ids, body = self.val.ids, self.body
        numbers = range(-(-len(ids) // body))
        together = max(1, ROWS_TOKENS // self.context)
        for first in range(0, len(numbers), together):
            chosen = numbers[first : first + together]
            yield self._corrupted([(ids[n * body : (n + 1) * body], (EVALUATION, 0, n)) for n in chosen])

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """The loss."""
        return Headline(name="nats per hidden piece", value=scores["val_loss"])

    @torch.no_grad()
    def sample(self, model: Transformer, seed: int) -> str:
        """A piece of the held-out text with what the model says, greedily, in brackets in place of what is hidden."""
        start = seed % max(1, self.val.tokens - SPECIMEN)
        ids = np.asarray(self.val.ids[start : start + min(SPECIMEN, self.body)], np.int64)
        source, target = self.corruption.corrupt(ids, np.random.default_rng((EVALUATION, 1, start)))
        beams, end = Beams(width=1, max_tokens=2 * len(target)), self.tokenizer.eos_id
        (answer,) = answers(model, [source], beams, start_id=end, eos_ids=(end,))
        said: dict[int, list[int]] = {}
        sentinel = -1
        for id in answer.ids:
            if id in self.tokenizer.sentinel_ids:
                sentinel = id
            said.setdefault(sentinel, []).append(id)
        parts: list[str] = []
        known: list[int] = []
        for id in source:
            if id not in self.tokenizer.sentinel_ids:
                known.append(id)
                continue
            text = self.tokenizer.decode(said.get(id, []))
            space = text[: len(text) - len(text.lstrip())]
            parts.append(f"{self.tokenizer.decode(known)}{space}[{text.strip()}]")
            known = []
        return "".join(parts) + self.tokenizer.decode(known)


def check_tokenizer(tokenizer: Tokenizer, context: int | None, options: SpanOptions) -> None:
    """Raise UserError for a tokenizer without the pieces that stand for hidden spans; ``context`` where it is known."""
    have, hint = len(tokenizer.sentinel_ids), "leave --tokenizer out, or give one that pretrain --arch transformer made"
    if not have:
        raise UserError(f"{tokenizer.name} has no pieces that stand for hidden spans, as <extra_id_0>", hint=hint)
    if context is not None and have < sentinels(context, options):
        raise UserError(
            f"{tokenizer.name} has {have} pieces that stand for hidden spans, a context of {context} needs "
            f"{sentinels(context, options)}",
            hint=f"{hint} with this --context, or give a shorter one",
        )


class Spans(Objective):
    """--arch transformer: an encoder-decoder stored as mBART, of the shape of finetune --from-scratch.

    A third wider than a decoder of as many blocks in each of its stacks, with a feed-forward of four times the width.
    """

    name = "transformer"
    called = "an encoder-decoder"
    settings = ("spans",)
    score, unit = "loss", "nats per hidden piece"
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
        """Raise UserError for a tokenizer with too few of them."""
        check_tokenizer(tokenizer, config.model.context, config.spans)

    def check(self, config: PretrainConfig) -> None:
        """Raise UserError also for spans that cannot be, and for what mBART does not have."""
        super().check(config)
        check_encoder(config.model)
        if not 0 < config.spans.rate < 1:
            raise UserError(f"spans.rate is {config.spans.rate}", hint="it must be above 0 and below 1")
        if not 1 <= config.spans.mean_length < math.inf:
            raise UserError(f"spans.mean_length is {config.spans.mean_length}", hint="it must be at least 1")

    def ffn_width(self, width: int) -> int:
        """Four times the width (Vaswani et al. 2017)."""
        return 4 * width

    def window(self, config: PretrainConfig, context: int) -> int:
        """The longest text of which neither side is longer than the context."""
        return window(context, config.spans)

    def training_flops(self, config: PretrainConfig, shape: ModelConfig) -> float:
        """FLOPs of both sides of a window, each with its end, over its tokens."""
        length = window(shape.context, config.spans)
        hidden, spans = counts(length, config.spans)
        return 3 * pair_flops(shape, length - hidden + spans + 1, hidden + spans + 1) / length

    def task(self, config: PretrainConfig, shape: ModelConfig, corpus: Corpus, runtime: Runtime) -> SpanCorruption:
        """Span corruption."""
        return SpanCorruption(
            train=corpus.train,
            val=corpus.val,
            tokenizer=corpus.tokenizer,
            context=shape.context,
            runtime=runtime,
            options=config.spans,
            seed=config.seed,
        )

    def write(self, directory: Path, model: Transformer, tokenizer: Tokenizer) -> None:
        """Write the directory; its tokenizer ends every text with the end-of-text id."""
        ending = Tokenizer(tokenizer.model_bytes, name=tokenizer.name, suffix_ids=(tokenizer.eos_id,))
        hf.save(directory, model, ending, card=_card(model.config))

    def next_step(self, directory: Path) -> str:
        """A translation, which is what it is finetuned for."""
        return f"tfcli finetune {directory} PAIRS --task translate"


def _card(config: ModelConfig) -> str:
    """The README of an encoder-decoder that learnt to say what is hidden."""
    return f"""---
library_name: transformers
tags:
- tfcli
---

# An encoder-decoder, made with tfcli

An encoder of {config.encoder_depth} blocks and a decoder of {config.depth} (width {config.width}, {config.heads}
heads), a vocabulary of {config.vocab_size} pieces and a context of {config.context} tokens, stored as mBART. It was
pretrained by span corruption: of a text in which pieces such as <extra_id_0> stand for hidden words, it says these
words. It is what models that turn one text into another are finetuned from.

With tfcli:

```sh
tfcli finetune . pairs.tsv --task translate
```

With transformers:

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSeq2SeqLM.from_pretrained(".")
```
"""


OBJECTIVE = Spans()
