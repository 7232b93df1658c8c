"""The families of decoders: Llama, Mistral, Qwen, GPT-2, Gemma. Standard library only."""

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

DECODER = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False}


def _read_llama_like(settings: Settings, wiring: Wiring) -> dict[str, Any]:
    """Fields of a decoder with rotary positions; ``wiring`` is completed."""
    rope = settings.data.get("rope_scaling") or settings.data.get("rope_parameters") or {}
    theta, scaling = read_rope(settings, rope, settings.get("rope_theta"))
    if wiring.local_window:
        if scaling.kind != "none":
            raise settings.error("sliding_window", "tfcli has no windows where rotary positions are scaled")
        wiring = replace(wiring, local_theta=theta)
    return {
        **heads(settings),
        "rope_theta": theta,
        "norm_eps": settings.number("rms_norm_eps"),
        "tied": settings.flag("tie_word_embeddings"),
        "wiring": replace(wiring, activation=settings.one_of("hidden_act", ACTIVATIONS), rope_scaling=scaling),
    }


def _write_llama_like(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(config.rope_theta, config.wiring.rope_scaling)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "head_dim": config.head_width,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": WRITTEN[config.wiring.activation],
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,  # transformers 4, llama.cpp
        "rope_scaling": None if config.wiring.rope_scaling.kind == "none" else scaling,
        "rope_parameters": rope,  # transformers 5
    }


def _local_every(settings: Settings, kinds: list[str]) -> int:
    """``Wiring.local_every`` of a list of layer types."""
    every = kinds.index(GLOBAL) + 1 if GLOBAL in kinds else 0
    if any((kind == LOCAL) != (every == 0 or (layer + 1) % every != 0) for layer, kind in enumerate(kinds)):
        raise settings.error("layer_types", "tfcli has models whose every n-th layer sees all, and no other order")
    return every


# Llama (Touvron et al. 2023) and Mistral (Jiang et al. 2023).


def _read_llama(settings: Settings) -> dict[str, Any]:
    bias = settings.flag("attention_bias")
    wiring = Wiring(qk_norm=False, qkv_bias=bias, out_bias=bias, ffn_bias=settings.flag("mlp_bias"))
    return _read_llama_like(settings, wiring)


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    wiring = config.wiring
    return {**_write_llama_like(config), "attention_bias": wiring.qkv_bias, "mlp_bias": wiring.ffn_bias}


def _read_mistral(settings: Settings) -> dict[str, Any]:
    window = 0 if settings.get("sliding_window") is None else settings.whole("sliding_window")
    if window >= settings.whole("max_position_embeddings"):
        window = 0
    return _read_llama_like(settings, Wiring(qk_norm=False, local_window=window))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**_write_llama_like(config), "sliding_window": config.wiring.local_window or None}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    names=names.LLAMA,
    sizes=SIZES,
    defaults={**DECODER, "attention_bias": False, "mlp_bias": False},
    fixed=FIXED,
    read=_read_llama,
    write=_write_llama,
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    names=names.LLAMA,
    sizes=SIZES,
    defaults={**DECODER, "num_key_value_heads": 8, "sliding_window": 4096},
    fixed=FIXED,
    read=_read_mistral,
    write=_write_mistral,
)


# Qwen2 and Qwen3 (Yang et al. 2024, 2025).


def _read_qwen(settings: Settings, wiring: Wiring) -> dict[str, Any]:
    kinds = settings.data.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != GLOBAL for kind in kinds)):
        raise settings.error("layer_types", f"tfcli has only {GLOBAL} in this family")
    return _read_llama_like(settings, wiring)


def _read_qwen2(settings: Settings) -> dict[str, Any]:
    return _read_qwen(settings, Wiring(qk_norm=False, qkv_bias=True))


def _read_qwen3(settings: Settings) -> dict[str, Any]:
    bias = settings.flag("attention_bias")
    return _read_qwen(settings, Wiring(qkv_bias=bias, out_bias=bias))


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    windows = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.depth}
    return {**_write_llama_like(config), **windows}


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**_write_qwen2(config), "attention_bias": config.wiring.qkv_bias}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    names=names.LLAMA,
    sizes=SIZES,
    defaults=DECODER,
    fixed={**FIXED, "use_sliding_window": False},
    read=_read_qwen2,
    write=_write_qwen2,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    names=names.LLAMA,
    sizes=SIZES,
    defaults={**DECODER, "head_dim": 128, "attention_bias": False},
    fixed={**FIXED, "use_sliding_window": False},
    read=_read_qwen3,
    write=_write_qwen3,
)


# GPT-2 (Radford et al. 2019).


def _read_gpt2(settings: Settings) -> dict[str, Any]:
    return {
        "kv_heads": settings.whole("n_head"),
        "head_width": head_width(settings, "n_head", "n_embd"),
        "ffn_width": 4 * settings.whole("n_embd")
        if settings.data.get("n_inner") is None
        else settings.whole("n_inner"),
        "norm_eps": settings.number("layer_norm_epsilon"),
        "tied": settings.flag("tie_word_embeddings"),
        "wiring": replace(
            CLASSIC,
            activation=settings.one_of("activation_function", ACTIVATIONS),
            attention_scale=None if settings.flag("scale_attn_weights") else 1.0,
        ),
    }


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    act = config.wiring.activation
    return {
        "n_inner": config.ffn_width,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "activation_function": "gelu_new" if act == "gelu_tanh" else WRITTEN[act],
        "scale_attn_weights": config.wiring.attention_scale is None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    names=names.GPT2,
    sizes={
        "vocab_size": "vocab_size",
        "n_positions": "context",
        "n_layer": "depth",
        "n_embd": "width",
        "n_head": "heads",
    },
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    fixed={**FIXED, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    read=_read_gpt2,
    write=_write_gpt2,
)


# Gemma 3 (Gemma Team 2025), its text part.


def _read_gemma(settings: Settings) -> dict[str, Any]:
    depth, width = settings.whole("num_hidden_layers"), settings.whole("hidden_size")
    wide, near = _gemma_rope(settings)
    theta, scaling = read_rope(settings, wide, 1_000_000.0)
    local_theta, local_scaling = read_rope(settings, near, 10_000.0)
    if local_scaling.kind != "none":
        raise settings.error("rope_parameters", f"tfcli does not scale those of {LOCAL}")
    kinds = layer_types(settings, depth)
    if kinds is None:
        every = settings.whole("sliding_window_pattern")
        every = 0 if every > depth else every
    else:
        every = _local_every(settings, kinds)
    bias, scalar = settings.flag("attention_bias"), settings.number("query_pre_attn_scalar")
    return {
        **heads(settings),
        "rope_theta": theta,
        "norm_eps": settings.number("rms_norm_eps"),
        "tied": settings.flag("tie_word_embeddings"),
        "wiring": Wiring(
            norm_place="sandwich",
            activation=settings.one_of("hidden_activation", ACTIVATIONS),
            qkv_bias=bias,
            out_bias=bias,
            embed_scale=width**0.5,
            attention_scale=None if scalar == settings.whole("head_dim") else scalar**-0.5,
            local_window=settings.whole("sliding_window"),
            local_every=every,
            local_theta=local_theta,
            rope_scaling=scaling,
        ),
    }


def _gemma_rope(settings: Settings) -> tuple[Any, Any]:
    """The rotary settings of global and of local layers: under their names (transformers 5), or apart (4)."""
    rope, data = settings.data.get("rope_parameters"), settings.data
    if isinstance(rope, Mapping) and rope.keys() & {GLOBAL, LOCAL}:
        return rope.get(GLOBAL) or {}, rope.get(LOCAL) or {}
    scaling = data.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise settings.error("rope_scaling", "expected an object")
    wide = {"rope_theta": data.get("rope_theta", 1_000_000.0), **scaling}
    return wide, {"rope_theta": data.get("rope_local_base_freq", 10_000.0)}


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    wiring = config.wiring
    scale = config.head_width**-0.5 if wiring.attention_scale is None else wiring.attention_scale
    rope = write_rope(config.rope_theta, wiring.rope_scaling)
    return {
        "head_dim": config.head_width,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_activation": WRITTEN[wiring.activation],
        "attention_bias": wiring.qkv_bias,
        "attention_dropout": 0.0,
        "query_pre_attn_scalar": round(scale**-2),
        "sliding_window": wiring.local_window,
        "layer_types": [LOCAL if config.is_local(layer) else GLOBAL for layer in range(config.depth)],
        "rope_parameters": {GLOBAL: rope, LOCAL: {"rope_type": "default", "rope_theta": wiring.local_theta}},
    }


GEMMA = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    names=names.GEMMA,
    sizes=SIZES,
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    fixed={
        **FIXED,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    read=_read_gemma,
    write=_write_gemma,
)
