"""Small models and tokenizers that tests build for themselves."""

import functools
from pathlib import Path
from typing import Any

import torch

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
)
from tfcli.config.options import TokenizerOptions
from tfcli.formats.hf import directory as hf
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers.sentencepiece import Tokenizer
from tfcli.text.tokenizers.training import train

TEXT = (
    "Once upon a time there was a king who had three daughters, and the youngest was so lovely that the sun itself\n"
    "wondered whenever it shone in her face.  Hard by the castle lay a dark forest;\tand under an old lime tree was a\n"
    'well. 从前有一个国王，他有三个女儿。"Who is there?" she said. -- Ein König, été, naïve, 12345 67890 \u2603\n'
) * 12


@functools.cache
def tokenizer(type: str = "bpe", vocab_size: int = 400, user_symbols: tuple[str, ...] = ()) -> Tokenizer:
    """Trained on ``TEXT``."""
    options = TokenizerOptions(type=type, vocab_size=vocab_size, user_symbols=user_symbols)  # type: ignore[arg-type]
    return train([Chunk(TEXT, True)], options)


def config(**changes: Any) -> ModelConfig:
    """Two small blocks with grouped queries."""
    fields = {"vocab_size": 400, "context": 32, "depth": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 8}
    return ModelConfig(**{**fields, "ffn_width": 48, **changes})


def model(seed: int = 0, scale: float = 0.3, **changes: Any) -> Transformer:
    """A model whose every weight is random and not zero, norms included."""
    made = Transformer(config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, scale, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1.0)
    return made


SEQ2SEQ = Architecture(
    norms=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    embedding=EmbeddingConfig(positions="learned", norm=True),
    feed_forward=FeedForwardConfig(activation="relu", gated=False, bias=True),
)
"""An encoder-decoder's, as it is written."""


def encoder_decoder(seed: int = 0, scale: float = 0.3, **changes: Any) -> Transformer:
    """Like ``model``, with an encoder of three blocks."""
    shape = {"encoder_depth": 3, "kv_heads": 4, "norm_eps": 1e-5, "architecture": SEQ2SEQ}
    return model(seed, scale, **{**shape, **changes})


def save(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A saved model directory with the BPE tokenizer."""
    hf.save(directory, model(seed, **changes), tokenizer())
    return directory


def cpu(precision: str = "fp32") -> Runtime:
    """The runtime of all these tests."""
    return Runtime.detect(device="cpu", precision=precision)


NO_IDS = {f"{role}_token_id": 0 for role in ("pad", "bos", "eos", "cls", "sep")}
FOREIGN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 10}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 10}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "bert": ("BertConfig", "BertModel", {}),
    "modernbert": ("ModernBertConfig", "ModernBertModel", NO_IDS),
    "mbart": (
        "MBartConfig",
        "MBartForConditionalGeneration",
        {"encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 24, "vocab_size": 400},
    ),
}
"""transformers' classes of each family that is read, and the settings of a small model besides those that all share."""


def foreign(family: str, *, architecture: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A small model of transformers with every number random and not small, norms and biases included."""
    import transformers

    config_class, model_class, settings = FOREIGN[family]
    sizes: dict[str, Any] = {"vocab_size": 90, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 0.3}
    if family != "gpt2":
        sizes["intermediate_size"] = 40
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**sizes, **settings, **changes})
    made = getattr(transformers, architecture or model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1 or "bias" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return made
