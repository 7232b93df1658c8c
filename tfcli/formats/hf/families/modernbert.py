"""The families of encoders: BERT and ModernBERT, and mBART, an encoder beside a decoder. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tfcli.config.model import ModelConfig, Wiring
from tfcli.formats.hf.families import names
from tfcli.formats.hf.families.base import (
    ACTIVATIONS,
    CLASSIC,
    FIXED,
    GLOBAL,
    LOCAL,
    SIZES,
    WRITTEN,
    Family,
    head_width,
    heads,
    layer_types,
)
from tfcli.formats.hf.settings import Settings, read_rope, write_rope

# BERT (Devlin et al. 2019): the encoder.


def _read_bert(settings: Settings) -> dict[str, Any]:
    return {
        **heads(settings),
        "norm_eps": settings.number("layer_norm_eps"),
        "tied": True,
        "wiring": replace(
            CLASSIC,
            causal=False,
            norm_place="post",
            activation=settings.one_of("hidden_act", ACTIVATIONS),
            embed_norm=True,
            token_types=settings.whole("type_vocab_size"),
        ),
    }


def _write_bert(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm_eps,
        "hidden_act": WRITTEN[config.wiring.activation],
        "type_vocab_size": config.wiring.token_types,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


BERT = Family(
    model_type="bert",
    architecture="BertModel",
    names=names.BERT,
    sizes=SIZES,
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2},
    fixed={**FIXED, "is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
    read=_read_bert,
    write=_write_bert,
)


# ModernBERT (Warner et al. 2024): the encoder that tfcli pretrains.


def _read_modernbert(settings: Settings) -> dict[str, Any]:
    wide, near = _modernbert_rope(settings)
    theta, scaling = read_rope(settings, wide, 160_000.0)
    local_theta, local_scaling = read_rope(settings, near, 10_000.0)
    if local_scaling.kind != "none":
        raise settings.error("rope_parameters", f"tfcli does not scale those of {LOCAL}")
    every = _global_every(settings, settings.whole("num_hidden_layers"))
    bias = settings.flag("attention_bias")
    wiring = Wiring(
        causal=False,
        norm="layer",
        norm_bias=settings.flag("norm_bias"),
        first_norm=False,
        qk_norm=False,
        activation=settings.one_of("hidden_activation", ACTIVATIONS),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=settings.flag("mlp_bias"),
        embed_norm=True,
        rope_scaling=scaling,
    )
    if every > 1:
        window = settings.whole("local_attention")
        wiring = replace(wiring, local_window=window, local_every=every, global_first=True, local_theta=local_theta)
    return {
        "kv_heads": settings.whole("num_attention_heads"),
        "head_width": head_width(settings, "num_attention_heads", "hidden_size"),
        "rope_theta": theta,
        "norm_eps": settings.number("norm_eps"),
        "tied": settings.flag("tie_word_embeddings"),
        "wiring": wiring,
    }


def _modernbert_rope(settings: Settings) -> tuple[Any, Any]:
    """The rotary settings of global and of local layers: under their names (transformers 5), or apart (4)."""
    rope, data = settings.data.get("rope_parameters"), settings.data
    given = rope if isinstance(rope, Mapping) else {}
    wide, near = given.get(GLOBAL) or {}, given.get(LOCAL) or {}
    return (
        {"rope_theta": data.get("global_rope_theta", 160_000.0), **wide} if isinstance(wide, Mapping) else wide,
        {"rope_theta": data.get("local_rope_theta", 10_000.0), **near} if isinstance(near, Mapping) else near,
    )


def _global_every(settings: Settings, depth: int) -> int:
    """Of how many layers the first sees all and the others a window."""
    kinds = layer_types(settings, depth)
    if kinds is None:
        return min(settings.whole("global_attn_every_n_layers"), depth)
    later = [layer for layer, kind in enumerate(kinds) if kind == GLOBAL and layer]
    every = later[0] if later else depth
    if any((kind == GLOBAL) != (layer % every == 0) for layer, kind in enumerate(kinds)):
        raise settings.error("layer_types", "tfcli has models whose every n-th layer, from the first, sees all")
    return every


def _write_modernbert(config: ModelConfig) -> dict[str, Any]:
    wiring = config.wiring
    return {
        "norm_eps": config.norm_eps,
        "norm_bias": wiring.norm_bias,
        "tie_word_embeddings": config.tied,
        "hidden_activation": WRITTEN[wiring.activation],
        "attention_bias": wiring.qkv_bias,
        "mlp_bias": wiring.ffn_bias,
        "local_attention": wiring.local_window or config.context,
        "layer_types": [LOCAL if config.is_local(layer) else GLOBAL for layer in range(config.depth)],
        "global_attn_every_n_layers": wiring.local_every or 1,  # transformers 4, and its rotary bases
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": wiring.local_theta,
        "rope_parameters": {
            GLOBAL: write_rope(config.rope_theta, wiring.rope_scaling),
            LOCAL: {"rope_type": "default", "rope_theta": wiring.local_theta},
        },
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
    }


MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertModel",
    names=names.MODERNBERT,
    sizes=SIZES,
    defaults={
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
    },
    fixed=FIXED,
    read=_read_modernbert,
    write=_write_modernbert,
)


# mBART (Liu et al. 2020): the encoder-decoder, and of the families that CTranslate2 reads the one that is the core's
# exactly: norms before the parts and after the last (BART and Marian have them after each sum), learned positions, a
# norm on the embedding, as the core's encoders have them (Pegasus and M2M100 need sinusoids, T5 relative positions).
# CTranslate2 takes "normalize_before" and "tokenizer_class" from config.json and wants a bos_token; transformers takes
# "forced_eos_token_id" for 2 unless it is null.


def _read_mbart(settings: Settings) -> dict[str, Any]:
    for key in ("attention_heads", "ffn_dim"):
        if settings.whole(f"encoder_{key}") != settings.whole(f"decoder_{key}"):
            raise settings.error(f"encoder_{key}", f"tfcli has only decoder_{key}, {settings.get(f'decoder_{key}')}")
    return {
        "kv_heads": settings.whole("decoder_attention_heads"),
        "head_width": head_width(settings, "decoder_attention_heads", "d_model"),
        "norm_eps": 1e-5,
        "tied": True,
        "wiring": replace(
            CLASSIC,
            activation=settings.one_of("activation_function", ACTIVATIONS),
            embed_norm=True,
            embed_scale=settings.whole("d_model") ** 0.5 if settings.flag("scale_embedding") else 1.0,
        ),
    }


def _write_mbart(config: ModelConfig) -> dict[str, Any]:
    act = config.wiring.activation
    return {
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.ffn_width,
        "activation_function": "gelu_new" if act == "gelu_tanh" else WRITTEN[act],
        "scale_embedding": config.wiring.embed_scale != 1.0,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        # What CTranslate2 asks for: the places of the norms, and (by the class) what begins a translation.
        "normalize_before": True,
        "normalize_embedding": True,
        "add_final_layer_norm": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


MBART = Family(
    model_type="mbart",
    architecture="MBartForConditionalGeneration",
    names=names.MBART,
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
    fixed={
        **FIXED,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "normalize_before": True,
        "normalize_embedding": True,
        "add_final_layer_norm": True,
    },
    read=_read_mbart,
    write=_write_mbart,
)
