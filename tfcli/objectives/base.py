"""The contract of an objective: everything that --arch decides, from the vocabulary to the saved directory.

An objective is a file here with an ``OBJECTIVE`` and a line in ``table``. The defaults are those of a decoder that
predicts the next token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tfcli.config.model import Architecture, ModelConfig
from tfcli.config.options import ModelOptions, PretrainConfig, TokenizerOptions
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.model.base import Model
from tfcli.model.cost import training_flops
from tfcli.model.transformer import Transformer, initialize
from tfcli.runtime import Runtime
from tfcli.tasks.task import Task
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.sentencepiece import Tokenizer


class Objective(ABC):
    """One --arch, without state. A ``model`` is of the kind that ``build`` makes."""

    name: ClassVar[str]
    """The word after --arch."""
    called: ClassVar[str]
    """The kind of model, for messages: "a GPT"."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Sections of ``PretrainConfig`` that only this objective uses."""
    score: ClassVar[str] = "bits_per_byte"
    """The name of a run's final score, as in --json."""
    unit: ClassVar[str] = "bits per byte"
    """The unit of the score, for people."""
    muon: ClassVar[bool] = True
    """True if Muon updates the matrices; else AdamW updates everything."""
    muon_lr: ClassVar[float] = 0.02
    lr: ClassVar[float] = 0.02
    """Peak rates up to a width of 192; beyond it ``lr`` falls."""
    compiles: ClassVar[bool] = True
    """True if torch.compile may help."""
    begins_documents: ClassVar[bool] = True
    """True if each document begins with the tokenizer's beginning-of-text id; else ``task`` puts it before windows."""
    least_context: ClassVar[int] = 1
    wider: ClassVar[tuple[int, int]] = (1, 1)
    """The width per block is 64 times the first over the second."""
    layout: ClassVar[Architecture] = Architecture()
    norm_eps: ClassVar[float] = 1e-6
    two_stacks: ClassVar[bool] = False
    """True if there is an encoder with as many blocks as the decoder."""

    def tokenizer_options(self, config: PretrainConfig) -> TokenizerOptions:
        """The options of a new tokenizer."""
        return config.tokenizer

    def check_tokenizer(self, config: PretrainConfig, tokenizer: Tokenizer) -> None:
        """Raise UserError for a tokenizer without the special tokens that are needed; by default none are."""
        return

    def check(self, config: PretrainConfig) -> None:
        """Raise UserError for settings that no text can be trained with."""
        context = config.model.context
        if context is not None and context < self.least_context:
            raise UserError(
                f"model.context is {context}", hint=f"that of {self.called} must be at least {self.least_context}"
            )

    def depth(self, width: int) -> int:
        """The depth of a model whose width is given."""
        times, over = self.wider
        return max(1, width * over // (64 * times))

    def ffn_width(self, width: int) -> int:
        """8/3 of the width, in whole 64s (Shazeer 2020, 2)."""
        return math.ceil(8 * width / 3 / 64) * 64

    def shape(self, options: ModelOptions, *, depth: int, vocab_size: int) -> ModelConfig:
        """The shape for a depth, with heads of 64 and with what ``options`` fixes. Raises UserError for odd heads."""
        times, over = self.wider
        width = options.width or 64 * math.ceil(times * depth / over)
        heads = options.heads or max(1, width // 64)
        if width % heads:
            raise UserError(
                f"a width of {width} cannot be divided into {heads} heads",
                hint=f"choose a width that is a multiple of {heads}, or other heads",
            )
        return ModelConfig(
            vocab_size=vocab_size,
            context=options.context or (128 if depth <= 4 else 256 if depth <= 8 else 512),
            depth=depth,
            width=width,
            heads=heads,
            kv_heads=options.kv_heads or heads,
            head_width=width // heads,
            ffn_width=options.ffn_width or self.ffn_width(width),
            tied=options.tied,
            norm_eps=self.norm_eps,
            encoder_depth=depth if self.two_stacks else 0,
            architecture=self.layout,
        )

    def built(self, shape: ModelConfig) -> ModelConfig:
        """The shape to train where ``shape`` was planned: for a baseline, another one of the same size."""
        return shape

    def window(self, config: PretrainConfig, context: int) -> int:
        """Tokens of the text in one example."""
        return context

    def training_flops(self, config: PretrainConfig, shape: ModelConfig) -> float:
        """FLOPs of training per token of the text."""
        return training_flops(shape, shape.context)

    @abstractmethod
    def task(self, config: PretrainConfig, shape: ModelConfig, corpus: Corpus, runtime: Runtime) -> Task:
        """The task: examples, loss and scores of the text."""

    def build(self, shape: ModelConfig) -> Model:
        """The model with its head, not yet initialized."""
        return Transformer(shape)

    def fill(self, model: Any, seed: int) -> None:
        """Initialize every parameter."""
        initialize(model, seed)

    def write(self, directory: Path, model: Any, tokenizer: Tokenizer) -> None:
        """Write the model directory."""
        hf.save(directory, model, tokenizer)

    def save(self, directory: Path, shape: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
        """Write the model directory of trained ``weights``."""
        model = self.build(shape)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        self.write(directory, model, tokenizer)

    @abstractmethod
    def next_step(self, directory: Path) -> str:
        """A command to continue with."""

    # For objectives with a format of their own, "model_type": "tfcli-NAME" in config.json.

    def load(self, directory: Path, hf_config: Mapping[str, Any], runtime: Runtime) -> tuple[Model, Codec]:
        """Load the model in ``directory``, with ``hf_config`` in config.json. Raises UserError for damaged files."""
        raise NotImplementedError

    def sizes(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes that ``inspect`` shows."""
        raise NotImplementedError


def check_encoder(options: ModelOptions) -> None:
    """Raise UserError for settings that families of encoders do not have."""
    if not options.tied:
        raise UserError("model.tied is false", hint="the head of an encoder is its token embedding: leave it out")
    if options.kv_heads not in (None, options.heads):
        raise UserError(
            f"model.kv_heads is {options.kv_heads}", hint="an encoder has as many as heads: leave it out (ModernBERT)"
        )
