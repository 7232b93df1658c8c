"""The model to measure: a given one, or random weights of a known shape with a tokenizer for synthetic words."""

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
"""Bytes of text encoded per call of the tokenizer."""
TRAINING_BYTES = 1_000_000
"""Bytes of text that the tokenizer for random weights is trained on."""
TRAINED = 512
"""The most tokens of a row of a training step."""
VOCAB_SIZE = 4096
WORDS = 20_000
PLENTY = 10**12
"""Tokens of an imagined corpus, so large that a training step does not depend on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model that ``generate`` can load from ``path``, a text, and a training plan."""

    name: str
    path: Path
    engine: Engine
    plan: Plan
    """The plan of ``pretrain`` for this shape and plenty of text: batch, micro-batch, learning rates."""
    text: str
    quantize: str | None = None
    """int8 or int4 if the weights are quantized when loaded."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.engine.model.config

    @property
    def weight_bytes(self) -> int:
        """The bytes of the model's weights as they are held, shared ones once."""
        from tfcli.model.quant.quantize import weight_bytes

        return weight_bytes(self.engine.model)

    def load(self) -> Engine:
        """Load the model again, on the same device, in the same precision."""
        return _load(self.path, self.engine.runtime, self.quantize)

    def ids(self, prompt: str) -> list[int]:
        """Return the ids that the engine reads for a prompt."""
        tokenizer = self.engine.tokenizer
        return [*tokenizer.prefix_ids, *tokenizer.encode(prompt)] or [tokenizer.eos_id]

    def prompt(self, tokens: int, at: int = 0) -> str:
        """Return text from character ``at`` on, ``tokens`` tokens long or as close below that as possible."""
        start = at % len(self.text)
        text = self.text[start : start + 32 * tokens]
        text *= 1 + 32 * tokens // len(text)
        # One more character adds a token, none, or removes one: close enough to sorted for a bisection.
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
    """Return an opened model of any kind that ``generate`` reads. Raises UserError if there is none."""
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
    """Return random weights of the shape of ``config``, saved in ``folder``; they cost as much as a trained model.

    The tokenizer is trained on the beginning of ``text`` (default: synthetic words); a text too small for the
    vocabulary gives a smaller tokenizer, while the model keeps the requested vocabulary.
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
    """Read the first ``TEXT_BYTES`` characters of a text file. Raises UserError for one that is empty or not text."""
    parts: list[str] = []
    size = 0
    with spooling() as spool:
        for chunk in read(find([str(path)], spool=spool), DataOptions()):
            parts.append(chunk.text[: TEXT_BYTES - size])
            size += len(parts[-1])
            if size >= TEXT_BYTES:
                break
    if not size:
        raise UserError(f"{path} has no text in it")
    return "".join(parts)


def synthetic_text(size: int, seed: int = 0) -> str:
    """Generate at least ``size`` bytes of text, the same for a seed, with word frequencies by Zipf's law.

    Words are made of syllables; the k-th most frequent has a probability proportional to 1 / k (Zipf 1949).
    """
    chance = random.Random(seed)
    syllable = [*"bdfklmnprstv", ""], [*"aeiou"], ["", "", "n", "r", "s", "t"]

    def word() -> str:
        return "".join(chance.choice(part) for _ in range(chance.randint(1, 4)) for part in syllable)

    words = list(dict.fromkeys(word() for _ in range(WORDS)))
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    sentences: list[str] = []
    length = 0
    while length < size:
        drawn = chance.choices(words, cum_weights=weights, k=chance.randint(4, 24))
        sentences.append(" ".join(drawn).capitalize() + ".\n")
        length += len(sentences[-1])
    return "".join(sentences)
