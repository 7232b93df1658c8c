"""Gemma 3 (Gemma Team 2025), its text part. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    WindowConfig,
)
from tfcli.formats.hf.families import base
from tfcli.formats.hf.families.base import ACTIVATIONS, GLOBAL, LOCAL, WRITTEN, Family, Names, Place
from tfcli.formats.hf.families.llama import LAYER
from tfcli.formats.hf.settings import Settings, write_rope

NAMES = Names(
    outer={"embed": "embed_tokens", "norm": Place(name="norm", plus=1.0)},
    layer=LAYER
    | {
        ours: Place(name=f"layers.{{}}.{theirs}", plus=1.0)
        for ours, theirs in {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "attention.q_norm": "self_attn.q_norm",
            "attention.k_norm": "self_attn.k_norm",
            "ffn_norm": "pre_feedforward_layernorm",
            "ffn_post_norm": "post_feedforward_layernorm",
        }.items()
    },
    prefixes=("model.", ""),
    buffers=("rotary_emb.inv_freq",),
    others=("score.",),
)


def _read_gemma(settings: Settings) -> dict[str, Any]:
    depth, width = settings.whole("num_hidden_layers"), settings.whole("hidden_size")
    theta, scaling, local_theta = base.read_ropes(settings, _gemma_ropes(settings), 1_000_000.0)
    window, every = settings.whole("sliding_window"), _local_every(settings, depth)
    bias, scalar = settings.flag("attention_bias"), settings.number("query_pre_attn_scalar")
    return {
        **base.heads(settings),
        "rope_theta": theta,
        "norm_eps": settings.number("rms_norm_eps"),
        "tied": settings.flag("tie_word_embeddings"),
        "architecture": Architecture(
            norms=NormConfig(place="sandwich"),
            feed_forward=FeedForwardConfig(activation=settings.one_of("hidden_activation", ACTIVATIONS)),
            attention=AttentionConfig(
                qkv_bias=bias,
                out_bias=bias,
                scale=None if scalar == settings.whole("head_dim") else scalar**-0.5,
                rope_scaling=scaling,
            ),
            embedding=EmbeddingConfig(scale=width**0.5),
            windows=WindowConfig(size=window, every=every, theta=local_theta),
        ),
    }


def _local_every(settings: Settings, depth: int) -> int:
    """Return ``WindowConfig.every``."""
    kinds = base.layer_types(settings, depth)
    if kinds is None:
        every = settings.whole("sliding_window_pattern")
        return 0 if every > depth else every
    every = kinds.index(GLOBAL) + 1 if GLOBAL in kinds else 0
    if any((kind == LOCAL) != (every == 0 or (layer + 1) % every != 0) for layer, kind in enumerate(kinds)):
        raise settings.error("layer_types", "tfcli supports models with every n-th layer global, and no other order")
    return every


def _gemma_ropes(settings: Settings) -> tuple[Any, Any]:
    """Return rotary settings of global and of local layers: under their names (transformers 5), or apart (4)."""
    rope, data = settings.data.get("rope_parameters"), settings.data
    if isinstance(rope, Mapping) and rope.keys() & {GLOBAL, LOCAL}:
        return rope.get(GLOBAL) or {}, rope.get(LOCAL) or {}
    scaling = data.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise settings.error("rope_scaling", "expected an object")
    wide = {"rope_theta": data.get("rope_theta", 1_000_000.0), **scaling}
    return wide, {"rope_theta": data.get("rope_local_base_freq", 10_000.0)}


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    arch = config.architecture
    scale = config.head_width**-0.5 if arch.attention.scale is None else arch.attention.scale
    rope = write_rope(config.rope_theta, arch.attention.rope_scaling)
    return {
        "head_dim": config.head_width,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_activation": WRITTEN[arch.feed_forward.activation],
        "attention_bias": arch.attention.qkv_bias,
        "attention_dropout": 0.0,
        "query_pre_attn_scalar": round(scale**-2),
        "sliding_window": arch.windows.size,
        "layer_types": base.written_types(config),
        "rope_parameters": {GLOBAL: rope, LOCAL: {"rope_type": "default", "rope_theta": arch.windows.theta}},
    }


GEMMA = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    names=NAMES,
    heads=base.classifier("Gemma3TextForSequenceClassification"),
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
    fixed={"final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False},
    read=_read_gemma,
    write=_write_gemma,
)
