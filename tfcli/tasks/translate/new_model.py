"""A new encoder-decoder for pairs of texts: a shared tokenizer, and a model of a size that fits their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError
from tfcli.formats.hf.families.base import CLASSIC
from tfcli.model.transformer import Transformer, initialize
from tfcli.runtime import Runtime
from tfcli.tasks.translate.data import Pair
from tfcli.tasks.translate.options import NewModel, TranslateConfig
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers.sentencepiece import Tokenizer
from tfcli.text.tokenizers.training import train

HEAD_WIDTH = 64
MANY_PAIRS = 200_000
PIECES = 8000
ARCHITECTURE = replace(
    CLASSIC,
    feed_forward=replace(CLASSIC.feed_forward, activation="relu"),
    embedding=replace(CLASSIC.embedding, norm=True),
)
"""Architecture of the family that is written (``tfcli.formats.hf.families.mbart.MBART``)."""


def shape(options: NewModel, *, vocab_size: int, pairs: int) -> ModelConfig:
    """Return the shape of a model for so many pairs. Raises UserError for a width that is not whole heads."""
    many = pairs >= MANY_PAIRS
    depth, width = options.depth or (6 if many else 3), options.width or (512 if many else 256)
    if width % HEAD_WIDTH and width > HEAD_WIDTH:
        raise UserError(f"model.width is {width}", hint=f"heads have a width of {HEAD_WIDTH}: give a multiple of it")
    heads = max(1, width // HEAD_WIDTH)
    return ModelConfig(
        vocab_size=vocab_size, context=options.context, depth=depth, encoder_depth=depth, width=width, heads=heads,
        kv_heads=heads, head_width=width // heads, ffn_width=4 * width, norm_eps=1e-5, architecture=ARCHITECTURE,
    )  # fmt: skip


def make(
    pairs: Sequence[Pair], config: TranslateConfig, runtime: Runtime, note: Callable[[str], None]
) -> tuple[Transformer, Tokenizer]:
    """Return a model with new weights, and its tokenizer, which ends every text with the end-of-text id."""
    texts = [Chunk(f"{text}\n", True) for pair in pairs for text in (pair.source, pair.target)]
    plain = train(texts, config.tokenizer, vocab_size=PIECES, threads=runtime.threads, on_note=note)
    codec = Tokenizer(plain.model_bytes, suffix_ids=(plain.eos_id,))
    shaped = shape(config.model, vocab_size=codec.vocab_size, pairs=len(pairs))
    with torch.device("meta"):
        model = Transformer(shaped)
    model = model.to_empty(device="cpu")
    if shaped.tied:
        model.head.weight = model.embed.weight
    initialize(model, config.seed)
    note(f"new: {shaped.encoder_depth} + {shaped.depth} blocks of width {shaped.width}, {codec.vocab_size:,} pieces")
    return model.to(runtime.device), codec
