"""The baseline: a recurrent language model (Hochreiter and Schmidhuber 1997) as large as a given decoder.

Its directory, which only tfcli reads, holds config.json, model.safetensors and the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tfcli import disk
from tfcli.config.model import Architecture, AttentionConfig, EmbeddingConfig, ModelConfig
from tfcli.config.options import PretrainConfig
from tfcli.errors import UserError
from tfcli.formats.hf.stored import CONFIG, OWN
from tfcli.formats.hf.weights import FILE
from tfcli.model.base import Model
from tfcli.model.cost import parameters
from tfcli.model.fused import linear_cross_entropy, torch_dropout
from tfcli.objectives.base import Objective
from tfcli.runtime import Runtime
from tfcli.tasks.lm.task import LanguageModeling
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.tokenizers.sentencepiece import FILE_NAME, Tokenizer

SIZES = ("vocab_size", "context", "width")
LAYERS = 2
"""The depth of Zaremba et al. 2014; deeper models are harder to train and no better."""


def size(vocab_size: int, width: int) -> int:
    """The number of parameters: the tied embedding, and for each layer two matrices and two biases of four gates."""
    return vocab_size * width + LAYERS * 4 * (2 * width * width + 2 * width)


def like(decoder: ModelConfig) -> ModelConfig:
    """The shape of the LSTM whose number of parameters is closest to a decoder's."""
    wanted, vocabulary = parameters(decoder).total, decoder.vocab_size
    width = min(range(1, wanted // vocabulary + 2), key=lambda width: abs(size(vocabulary, width) - wanted))
    return shape(vocab_size=vocabulary, context=decoder.context, width=width)


def shape(*, vocab_size: int, context: int, width: int) -> ModelConfig:
    """The shape as a ``ModelConfig``: one head, and a feed-forward width of four gates."""
    return ModelConfig(
        vocab_size=vocab_size,
        context=context,
        depth=LAYERS,
        width=width,
        heads=1,
        kv_heads=1,
        head_width=width,
        ffn_width=4 * width,
        architecture=Architecture(
            attention=AttentionConfig(qk_norm=False), embedding=EmbeddingConfig(positions="learned")
        ),
    )


class Lstm(Model):
    """A token embedding, ``LAYERS`` LSTM layers and the embedding as head; every row begins with a zero state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, D), freeze=False)
        with torch.device("meta"):  # no random numbers are drawn for what ``initialize`` or a file fills
            layers = [nn.LSTM(D, D, batch_first=True) for _ in range(LAYERS)]
        self.layers = nn.ModuleList(layer.to_empty(device="cpu") for layer in layers)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw the embedding (std 0.1) and matrices (uniform, bound width^-1/2); biases are 0, the forget gate's 1."""
        generator = torch.Generator().manual_seed(seed)
        D = self.config.width
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape)
            if name == "embed.weight":
                value.normal_(0.0, 0.1, generator=generator)
            elif "weight" in name:
                value.uniform_(-(D**-0.5), D**-0.5, generator=generator)
            elif "bias_ih" in name:
                value[D : 2 * D] = 1.0
            parameter.copy_(value)

    def forward(self, tokens_BT: Tensor, *, dtype: torch.dtype | None = None, dropout: float = 0.0) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D) in ``dtype`` (default: of its weights).

        Dropout applies to the inputs of layers and head, not to the state (Zaremba et al. 2014).
        """
        x_BTD = self.embed(tokens_BT).to(dtype or self.embed.weight.dtype)
        for layer in self.layers:
            x_BTD = torch_dropout(x_BTD, dropout)
            weights = {name: parameter.to(x_BTD.dtype) for name, parameter in layer.named_parameters()}
            x_BTD, _ = torch.func.functional_call(layer, weights, (x_BTD,))
        return torch_dropout(x_BTD, dropout)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed cross-entropy (nats, fp32) of the targets (B, T) given the hidden states (B, T, D)."""
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), self.embed.weight, targets_BT.flatten())


def read_config(directory: Path, data: Mapping[str, Any]) -> ModelConfig:
    """The shape. Raises UserError for a config.json, ``data``, that does not hold it."""
    sizes = {name: data.get(name) for name in SIZES}
    for name, value in {**sizes, "layers": data.get("layers")}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"{directory / CONFIG}: {name} is {value!r}", hint="it must be a whole number of at least 1"
            )
    if data["layers"] != LAYERS:
        raise UserError(f"{directory / CONFIG}: layers is {data['layers']}", hint=f"tfcli's have {LAYERS}")
    return shape(vocab_size=data["vocab_size"], context=data["context"], width=data["width"])


class Scored(LanguageModeling):
    """Language modeling by a model that generates no text."""

    def sample(self, model: Any, seed: int) -> None:
        return


class Baseline(Objective):
    """--arch lstm: planned like the GPT it is compared with, on the same text, windows and order."""

    name = "lstm"
    called = "an LSTM"
    muon = False
    lr = 1e-2
    compiles = False

    def built(self, shape: ModelConfig) -> ModelConfig:
        """An LSTM with as many parameters."""
        return like(shape)

    def task(self, config: PretrainConfig, shape: ModelConfig, corpus: Corpus, runtime: Runtime) -> Scored:
        """Language modeling."""
        return Scored(
            train=corpus.train, val=corpus.val, tokenizer=corpus.tokenizer, context=shape.context, runtime=runtime
        )

    def build(self, shape: ModelConfig) -> Lstm:
        """An LSTM, not yet initialized."""
        return Lstm(shape)

    def fill(self, model: Lstm, seed: int) -> None:
        model.initialize(seed)

    def write(self, directory: Path, model: Lstm, tokenizer: Tokenizer) -> None:
        """Write the directory, the weights last."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {"model_type": OWN + self.name, **{name: getattr(model.config, name) for name in SIZES}}
        config |= {"layers": LAYERS, "tfcli": {"tokenizer_sha256": tokenizer.hash}}
        tokenizer.save(directory / FILE_NAME)
        disk.write(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.state_dict().items()}
        disk.write(directory / FILE, save(state, metadata={"format": "pt"}))

    def next_step(self, directory: Path) -> str:
        """An evaluation."""
        return f"tfcli evaluate {directory} TEXT"

    def load(self, directory: Path, hf_config: Mapping[str, Any], runtime: Runtime) -> tuple[Lstm, Tokenizer]:
        """The model in fp32 on the runtime's device. Raises UserError for damaged files."""
        model, tokenizer = Lstm(read_config(directory, hf_config)), Tokenizer.load(directory)
        try:
            model.load_state_dict(load_file(directory / FILE))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{directory / FILE} cannot be read: {str(error).splitlines()[0]}",
                hint="it must be the one that pretrain wrote with config.json",
            ) from None
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(f"{directory} has a tokenizer of another model: {tokenizer.vocab_size} pieces")
        return model.to(runtime.device).requires_grad_(False), tokenizer

    def sizes(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes that config.json names."""
        return {name: hf_config.get(name) for name in (*SIZES, "layers")}


OBJECTIVE = Baseline()
