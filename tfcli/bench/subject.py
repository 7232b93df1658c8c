"""What is benched: a model directory, or random weights of a known shape with a tokenizer trained on made-up text."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from tfcli.config import DataOptions, ModelConfig, ModelOptions, PretrainConfig, TrainOptions
from tfcli.errors import UserError
from tfcli.formats import hf
from tfcli.text.sources import Chunk, find, read, spooling
from tfcli.text.tokenizer import Tokenizer
from tfcli.text.training import train as train_tokenizer

if TYPE_CHECKING:
    import torch

    from tfcli.model.transformer import Transformer
    from tfcli.runtime import Runtime
    from tfcli.train.plan import Plan

TEXT_BYTES = 4_000_000
"""Bytes of text that the tokenizer encodes in a call."""
TRAINING_BYTES = 1_000_000
"""Bytes of text that a tokenizer made for the occasion is trained on."""
VOCAB_SIZE = 4096
WORDS = 20_000
PLENTY = 10**12
"""Tokens of an imagined corpus, so many that nothing about a step depends on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured: a tokenizer, a text for it, and a model that can be built anew in any dtype."""

    name: str
    plan: Plan
    """How ``pretrain`` would train it, where there is plenty of text: shape, batch, micro-batch, learning rates."""
    tokenizer: Tokenizer
    text: str
    build: Callable[[torch.dtype], Transformer]
    """Makes the model with weights of this dtype, on the device."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.plan.model


def from_directory(
    directory: Path, runtime: Runtime, *, text: str | None = None, batch_size: int | None = None
) -> Subject:
    """The model in a directory. Raises UserError where there is none."""
    from tfcli.train.plan import make

    config = hf.read_config(directory)
    options = PretrainConfig(
        model=ModelOptions(depth=config.depth, context=config.context), train=TrainOptions(batch_size=batch_size)
    )
    plan = make(options, vocab_size=config.vocab_size, train_tokens=PLENTY, runtime=runtime)
    return Subject(
        name=str(directory),
        plan=replace(plan, model=config),
        tokenizer=Tokenizer.load(directory),
        text=text or synthetic_text(TEXT_BYTES),
        build=lambda dtype: hf.load_model(directory, runtime=runtime, dtype=dtype),
    )


def from_config(config: PretrainConfig, name: str, runtime: Runtime, *, text: str | None = None) -> Subject:
    """Random weights of the shape that ``config`` fixes; the work is that of a trained model.

    The tokenizer is trained on the beginning of ``text`` (default: made-up words); a text too small for the vocabulary
    gives a smaller tokenizer, the model keeps the vocabulary asked for.
    """
    from tfcli.train.plan import make

    text = text or synthetic_text(TEXT_BYTES)
    size = VOCAB_SIZE if config.tokenizer.vocab_size is None else config.tokenizer.vocab_size
    options = replace(config.tokenizer, vocab_size=None)
    tokenizer = train_tokenizer([Chunk(text[:TRAINING_BYTES], True)], options, threads=runtime.threads, vocab_size=size)
    plan = make(config, vocab_size=size, train_tokens=PLENTY, runtime=runtime)

    def build(dtype: torch.dtype) -> Transformer:
        from tfcli.model.transformer import Transformer, initialize

        model = Transformer(plan.model)
        initialize(model, seed=0)
        return model.to(runtime.device, dtype)

    return Subject(name=name, plan=plan, tokenizer=tokenizer, text=text, build=build)


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
