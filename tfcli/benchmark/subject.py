"""What is benched: a model that is there, or random weights of a known shape with a tokenizer for made-up words."""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from tfcli.config.model import ModelConfig
from tfcli.config.options import DataOptions, ModelOptions, PretrainConfig, TrainOptions
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.text.read.sources import Chunk, find, read, spooling
from tfcli.text.tokenizers.training import train as train_tokenizer

if TYPE_CHECKING:
    from tfcli.formats.open import Opened
    from tfcli.infer.engine import Engine
    from tfcli.runtime import Runtime
    from tfcli.train.plan import Plan

TEXT_BYTES = 4_000_000
"""Bytes of text that the tokenizer encodes in a call."""
TRAINING_BYTES = 1_000_000
"""Bytes of text that a tokenizer made for the occasion is trained on."""
TRAINED = 512
"""Tokens of a row of a training step at most, where the model's context is longer."""
VOCAB_SIZE = 4096
WORDS = 20_000
PLENTY = 10**12
"""Tokens of an imagined corpus, so many that nothing about a step depends on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured: a model that ``generate`` would load from ``path``, a text, and how it would be trained."""

    name: str
    path: Path
    engine: Engine
    plan: Plan
    """How ``pretrain`` would train the shape, where there is plenty of text: batch, micro-batch, learning rates."""
    text: str
    quantize: str | None = None
    """int8 or int4, where the weights are quantized as they are read."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.engine.model.config

    @property
    def weight_bytes(self) -> int:
        """Bytes that the model's weights hold in whatever form they are, shared ones once."""
        from tfcli.model.quant.quantize import weight_bytes

        return weight_bytes(self.engine.model)

    def load(self) -> Engine:
        """The model once more, on the same device, in the same precision."""
        return _load(self.path, self.engine.runtime, self.quantize)

    def ids(self, prompt: str) -> list[int]:
        """The ids that the engine reads for a prompt."""
        tokenizer = self.engine.tokenizer
        return [*tokenizer.prefix_ids, *tokenizer.encode(prompt)] or [tokenizer.eos_id]

    def prompt(self, tokens: int, at: int = 0) -> str:
        """Some of the text, from character ``at`` on, that is ``tokens`` tokens long, or as near below as it goes."""
        start = at % len(self.text)
        text = self.text[start : start + 32 * tokens]
        text *= 1 + 32 * tokens // len(text)
        # A character more is a token more, or none, or one less: near enough to a sorted row for a bisection.
        size = bisect_right(range(32 * tokens), tokens, key=lambda size: len(self.ids(text[:size]))) - 1
        return text[:size]


def from_model(
    opened: Opened,
    runtime: Runtime,
    *,
    text: str | None = None,
    batch_size: int | None = None,
    quantize: str | None = None,
) -> Subject:
    """The model that was opened, whatever ``generate`` reads. Raises UserError where there is none."""
    from tfcli.train.plan import make

    engine = _load(opened, runtime, quantize)
    config = engine.model.config
    shape = ModelOptions(depth=config.depth, context=min(config.context, TRAINED))
    options = PretrainConfig(model=shape, train=TrainOptions(batch_size=batch_size))
    plan = make(options, vocab_size=config.vocab_size, train_tokens=PLENTY, runtime=runtime)
    return Subject(
        name=str(opened.path),
        path=opened.path,
        engine=engine,
        plan=replace(plan, model=replace(config, context=plan.model.context)),
        text=text or synthetic_text(TEXT_BYTES),
        quantize=quantize,
    )


def from_config(
    config: PretrainConfig,
    name: str,
    runtime: Runtime,
    *,
    folder: Path,
    text: str | None = None,
    quantize: str | None = None,
) -> Subject:
    """Random weights of the shape that ``config`` fixes, written into ``folder``; the work is that of a trained model.

    The tokenizer is trained on the beginning of ``text`` (default: made-up words); a text too small for the vocabulary
    gives a smaller tokenizer, the model keeps the vocabulary asked for.
    """
    from tfcli.model.transformer import Transformer, initialize
    from tfcli.train.plan import make

    text = text or synthetic_text(TEXT_BYTES)
    size = VOCAB_SIZE if config.tokenizer.vocab_size is None else config.tokenizer.vocab_size
    options = replace(config.tokenizer, vocab_size=None)
    tokenizer = train_tokenizer([Chunk(text[:TRAINING_BYTES], True)], options, threads=runtime.threads, vocab_size=size)
    plan = make(config, vocab_size=size, train_tokens=PLENTY, runtime=runtime)
    model = Transformer(plan.model)
    initialize(model, seed=0)
    hf.save(folder, model.to(runtime.dtype), tokenizer)
    engine = _load(folder, runtime, quantize)
    return Subject(name=name, path=folder, engine=engine, plan=plan, text=text, quantize=quantize)


def _load(path: Path | Opened, runtime: Runtime, quantize: str | None) -> Engine:
    from tfcli.infer.engine import load

    device, precision, threads = str(runtime.device), runtime.precision, runtime.threads
    return load(path, device=device, precision=precision, threads=threads, quantize=quantize)


def read_text(path: Path) -> str:
    """The first ``TEXT_BYTES`` of a text file. Raises UserError for what is not text."""
    parts: list[str] = []
    made = 0
    with spooling() as spool:
        for chunk in read(find([str(path)], spool=spool), DataOptions()):
            parts.append(chunk.text[: TEXT_BYTES - made])
            made += len(parts[-1])
            if made >= TEXT_BYTES:
                break
    if not made:
        raise UserError(f"{path} has no text in it")
    return "".join(parts)


def synthetic_text(size: int, seed: int = 0) -> str:
    """At least ``size`` bytes of made-up text, the same for a seed: words whose frequencies follow Zipf's law.

    Words are made of syllables; the k-th most frequent is drawn with a probability proportional to 1 / k (Zipf 1949).
    """
    chance = random.Random(seed)
    onsets, nuclei, codas = [*"bdfklmnprstv", ""], [*"aeiou"], ["", "", "n", "r", "s", "t"]

    def word() -> str:
        return "".join(
            chance.choice(onsets) + chance.choice(nuclei) + chance.choice(codas) for _ in range(chance.randint(1, 4))
        )

    words = list(dict.fromkeys(word() for _ in range(WORDS)))
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    sentences: list[str] = []
    made = 0
    while made < size:
        drawn = chance.choices(words, cum_weights=weights, k=chance.randint(4, 24))
        sentences.append(" ".join(drawn).capitalize() + ".\n")
        made += len(sentences[-1])
    return "".join(sentences)
