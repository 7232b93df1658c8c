"""mBART (Liu et al. 2020): the encoder-decoder.

Of the families that CTranslate2 reads it is the one that tfcli's encoder-decoder matches exactly: norms before the
parts and after the last (BART and Marian have them after each sum), learned positions and a norm on the embedding, as
tfcli's encoders have them (Pegasus and M2M100 need sinusoids, T5 relative positions). CTranslate2 takes
"normalize_before" and "tokenizer_class" from config.json and requires a bos_token; transformers defaults
"forced_eos_token_id" to 2 unless it is null. Standard library only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tfcli.config.model import ModelConfig
from tfcli.formats.hf.families.base import ACTIVATIONS, CLASSIC, WRITTEN, Family, Names, Place, head_width
from tfcli.formats.hf.settings import Settings

STACKS = {"": "decoder", "encoder.": "encoder"}
PARTS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "cross.q": "encoder_attn.q_proj",
    "cross.k": "encoder_attn.k_proj",
    "cross.v": "encoder_attn.v_proj",
    "cross.o": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
    "ffn.up": "fc1",
    "ffn.down": "fc2",
    "ffn_norm": "final_layer_norm",
}

OUTER = {"positions": "embed_positions", "embed_norm": "layernorm_embedding", "norm": "layer_norm"}
NAMES = Names(
    outer={"embed": "shared"}
    | {
        f"{ours}{part}": Place(name=f"{theirs}.{name}", skip=2 if part == "positions" else 0)
        for ours, theirs in STACKS.items()
        for part, name in OUTER.items()
    },
    layer={
        f"{ours}{part}": f"{theirs}.layers.{{}}.{name}"
        for ours, theirs in STACKS.items()
        for part, name in PARTS.items()
    },
    prefixes=("model.", ""),
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    zeros=("final_logits_bias",),
)


FIXED = (
    "tie_word_embeddings", "is_encoder_decoder", "normalize_before", "normalize_embedding", "add_final_layer_norm",
)  # fmt: skip
"""Settings that must be true."""


def _read_mbart(settings: Settings) -> dict[str, Any]:
    for key in ("attention_heads", "ffn_dim"):
        if settings.whole(f"encoder_{key}") != settings.whole(f"decoder_{key}"):
            raise settings.error(f"encoder_{key}", f"expected that of decoder_{key}, {settings.get(f'decoder_{key}')}")
    return {
        "kv_heads": settings.whole("decoder_attention_heads"),
        "head_width": head_width(settings, "decoder_attention_heads", "d_model"),
        "norm_eps": 1e-5,
        "tied": True,
        "architecture": replace(
            CLASSIC,
            feed_forward=replace(CLASSIC.feed_forward, activation=settings.one_of("activation_function", ACTIVATIONS)),
            embedding=replace(
                CLASSIC.embedding,
                norm=True,
                scale=settings.whole("d_model") ** 0.5 if settings.flag("scale_embedding") else 1.0,
            ),
        ),
    }


def _write_mbart(config: ModelConfig) -> dict[str, Any]:
    act = config.architecture.feed_forward.activation
    return {
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.ffn_width,
        "activation_function": "gelu_new" if act == "gelu_tanh" else WRITTEN[act],
        "scale_embedding": config.architecture.embedding.scale != 1.0,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
        # For CTranslate2: the places of the norms, and (by the class) what begins a translation.
        **dict.fromkeys(("normalize_before", "normalize_embedding", "add_final_layer_norm"), True),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


MBART = Family(
    model_type="mbart",
    architecture="MBartForConditionalGeneration",
    names=NAMES,
    sizes={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "context",
        "encoder_layers": "encoder_depth",
        "decoder_layers": "depth",
        "d_model": "width",
        "decoder_attention_heads": "heads",
        "decoder_ffn_dim": "ffn_width",
    },
    defaults={"activation_function": "gelu", "scale_embedding": False},
    fixed=dict.fromkeys(FIXED, True),
    read=_read_mbart,
    write=_write_mbart,
)
