"""Llama (Touvron et al. 2023), and decoders that differ from it in a setting. Standard library only.

Mistral (Jiang et al. 2023), Qwen2 and Qwen3 (Yang et al. 2024, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tfcli.config.model import Architecture, AttentionConfig, FeedForwardConfig, ModelConfig, WindowConfig
from tfcli.formats.hf.families.base import ACTIVATIONS, GLOBAL, WRITTEN, Family, Names, classifier, heads
from tfcli.formats.hf.settings import Settings, read_rope, write_rope

LAYER = {
    "attention_norm": "layers.{}.input_layernorm",
    "attention.q": "layers.{}.self_attn.q_proj",
    "attention.k": "layers.{}.self_attn.k_proj",
    "attention.v": "layers.{}.self_attn.v_proj",
    "attention.o": "layers.{}.self_attn.o_proj",
    "attention.q_norm": "layers.{}.self_attn.q_norm",
    "attention.k_norm": "layers.{}.self_attn.k_norm",
    "ffn_norm": "layers.{}.post_attention_layernorm",
    "ffn.gate": "layers.{}.mlp.gate_proj",
    "ffn.up": "layers.{}.mlp.up_proj",
    "ffn.down": "layers.{}.mlp.down_proj",
}

NAMES = Names(
    outer={"embed": "embed_tokens", "norm": "norm"},
    layer=LAYER,
    prefixes=("model.", ""),
    buffers=("rotary_emb.inv_freq",),
    others=("score.",),
)

DECODER = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False}


def _read(settings: Settings, arch: Architecture) -> dict[str, Any]:
    """Return the fields of a decoder with rotary positions; ``arch`` is completed."""
    rope = settings.data.get("rope_scaling") or settings.data.get("rope_parameters") or {}
    theta, scaling = read_rope(settings, rope, settings.get("rope_theta"))
    if arch.windows.size:
        if scaling.kind != "none":
            raise settings.error("sliding_window", "tfcli supports no windows where rotary positions are scaled")
        arch = replace(arch, windows=replace(arch.windows, theta=theta))
    return {
        **heads(settings),
        "rope_theta": theta,
        "norm_eps": settings.number("rms_norm_eps"),
        "tied": settings.flag("tie_word_embeddings"),
        "architecture": replace(
            arch,
            feed_forward=replace(arch.feed_forward, activation=settings.one_of("hidden_act", ACTIVATIONS)),
            attention=replace(arch.attention, rope_scaling=scaling),
        ),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(config.rope_theta, config.architecture.attention.rope_scaling)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "head_dim": config.head_width,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": WRITTEN[config.architecture.feed_forward.activation],
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,  # transformers 4, llama.cpp
        "rope_scaling": None if config.architecture.attention.rope_scaling.kind == "none" else scaling,
        "rope_parameters": rope,  # transformers 5
    }


def _llama(settings: Settings) -> Architecture:
    bias = settings.flag("attention_bias")
    return Architecture(
        attention=AttentionConfig(qk_norm=False, qkv_bias=bias, out_bias=bias),
        feed_forward=FeedForwardConfig(bias=settings.flag("mlp_bias")),
    )


def _mistral(settings: Settings) -> Architecture:
    size = 0 if settings.get("sliding_window") is None else settings.whole("sliding_window")
    if size >= settings.whole("max_position_embeddings"):
        size = 0
    return Architecture(attention=AttentionConfig(qk_norm=False), windows=WindowConfig(size=size))


def _qwen2(settings: Settings) -> Architecture:
    kinds = settings.data.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != GLOBAL for kind in kinds)):
        raise settings.error("layer_types", f"tfcli supports only {GLOBAL} in this family")
    return Architecture(attention=AttentionConfig(qk_norm=False, qkv_bias=True))


def _qwen3(settings: Settings) -> Architecture:
    bias = settings.flag("attention_bias")
    return replace(_qwen2(settings), attention=AttentionConfig(qkv_bias=bias, out_bias=bias))


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    arch = config.architecture
    return {"attention_bias": arch.attention.qkv_bias, "mlp_bias": arch.feed_forward.bias}


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.architecture.windows.size or None}


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.depth}


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**_write_qwen2(config), "attention_bias": config.architecture.attention.qkv_bias}


def _family(
    name: str,
    architecture: Callable[[Settings], Architecture],
    write: Callable[[ModelConfig], dict[str, Any]],
    defaults: Mapping[str, Any],
    fixed: Mapping[str, Any],
) -> Family:
    return Family(
        model_type=name.lower(),
        architecture=f"{name}ForCausalLM",
        names=NAMES,
        heads=classifier(f"{name}ForSequenceClassification"),
        defaults={**DECODER, **defaults},
        fixed=fixed,
        read=lambda settings: _read(settings, architecture(settings)),
        write=lambda config: _write(config) | write(config),
    )


FULL = {"use_sliding_window": False}
LLAMA = _family("Llama", _llama, _write_llama, {"attention_bias": False, "mlp_bias": False}, {})
MISTRAL = _family("Mistral", _mistral, _write_mistral, {"num_key_value_heads": 8, "sliding_window": 4096}, {})
QWEN2 = _family("Qwen2", _qwen2, _write_qwen2, {}, FULL)
QWEN3 = _family("Qwen3", _qwen3, _write_qwen3, {"head_dim": 128, "attention_bias": False}, FULL)
