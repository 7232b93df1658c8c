"""ModernBERT (Warner et al. 2024): the encoder that tfcli pretrains. Standard library only."""

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
from tfcli.formats.hf.families.base import ACTIVATIONS, GLOBAL, LOCAL, WRITTEN, Family, HeadNames, Names, Place
from tfcli.formats.hf.settings import Settings, write_rope

NAMES = Names(
    outer={"embed": "embeddings.tok_embeddings", "embed_norm": "embeddings.norm", "norm": "final_norm"},
    layer={
        "attention_norm": "layers.{}.attn_norm",
        "attention.q": Place(name="layers.{}.attn.Wqkv", part=0, parts=3),
        "attention.k": Place(name="layers.{}.attn.Wqkv", part=1, parts=3),
        "attention.v": Place(name="layers.{}.attn.Wqkv", part=2, parts=3),
        "attention.o": "layers.{}.attn.Wo",
        "ffn_norm": "layers.{}.mlp_norm",
        "ffn.gate": Place(name="layers.{}.mlp.Wi", part=0, parts=2),
        "ffn.up": Place(name="layers.{}.mlp.Wi", part=1, parts=2),
        "ffn.down": "layers.{}.mlp.Wo",
    },
    head="decoder",
    prefixes=("", "model."),
    buffers=("rotary_emb.inv_freq",),
    others=("head.", "decoder.bias", "classifier."),
)
HEADS = {
    kind: HeadNames(
        architecture=architecture,
        prefix="model.",
        parts={"transform.dense": "head.dense", "transform.norm": "head.norm", ours: theirs},
    )
    for kind, architecture, ours, theirs in (
        ("masked", "ModernBertForMaskedLM", "output", "decoder"),
        ("sequence", "ModernBertForSequenceClassification", "classifier", "classifier"),
        ("token", "ModernBertForTokenClassification", "classifier", "classifier"),
        ("span", "ModernBertForQuestionAnswering", "ends", "classifier"),
    )
}


def _read_modernbert(settings: Settings) -> dict[str, Any]:
    theta, scaling, local_theta = base.read_ropes(settings, _modernbert_ropes(settings), 160_000.0)
    every = _global_every(settings, settings.whole("num_hidden_layers"))
    bias = settings.flag("attention_bias")
    windows = WindowConfig()
    if every > 1:
        size = settings.whole("local_attention")
        windows = WindowConfig(size=size, every=every, global_first=True, theta=local_theta)
    arch = Architecture(
        causal=False,
        norms=NormConfig(kind="layer", bias=settings.flag("norm_bias"), first=False),
        attention=AttentionConfig(qk_norm=False, qkv_bias=bias, out_bias=bias, rope_scaling=scaling),
        feed_forward=FeedForwardConfig(
            activation=settings.one_of("hidden_activation", ACTIVATIONS), bias=settings.flag("mlp_bias")
        ),
        embedding=EmbeddingConfig(norm=True),
        windows=windows,
    )
    return {
        "kv_heads": settings.whole("num_attention_heads"),
        "head_width": base.head_width(settings, "num_attention_heads", "hidden_size"),
        "rope_theta": theta,
        "norm_eps": settings.number("norm_eps"),
        "tied": settings.flag("tie_word_embeddings"),
        "architecture": arch,
    }


def _modernbert_ropes(settings: Settings) -> list[Any]:
    """Return rotary settings of global and of local layers: under their names (transformers 5), or apart (4)."""
    data, given = settings.data, settings.data.get("rope_parameters")
    ropes = []
    for kind, key, theta in ((GLOBAL, "global_rope_theta", 160_000.0), (LOCAL, "local_rope_theta", 10_000.0)):
        rope = (given.get(kind) or {}) if isinstance(given, Mapping) else {}
        ropes.append({"rope_theta": data.get(key, theta), **rope} if isinstance(rope, Mapping) else rope)
    return ropes


def _global_every(settings: Settings, depth: int) -> int:
    """Return ``WindowConfig.every``: the first of each this-many layers is global, the others are local."""
    kinds = base.layer_types(settings, depth)
    if kinds is None:
        return min(settings.whole("global_attn_every_n_layers"), depth)
    later = [layer for layer, kind in enumerate(kinds) if kind == GLOBAL and layer]
    every = later[0] if later else depth
    if any((kind == GLOBAL) != (layer % every == 0) for layer, kind in enumerate(kinds)):
        raise settings.error("layer_types", "tfcli supports models with every n-th layer global, from the first")
    return every


def _write_modernbert(config: ModelConfig) -> dict[str, Any]:
    arch = config.architecture
    return {
        "norm_eps": config.norm_eps,
        "norm_bias": arch.norms.bias,
        "tie_word_embeddings": config.tied,
        "hidden_activation": WRITTEN[arch.feed_forward.activation],
        "attention_bias": arch.attention.qkv_bias,
        "mlp_bias": arch.feed_forward.bias,
        "local_attention": arch.windows.size or config.context,
        "layer_types": base.written_types(config),
        "global_attn_every_n_layers": arch.windows.every or 1,  # transformers 4, and its rotary bases
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": arch.windows.theta,
        "rope_parameters": {
            GLOBAL: write_rope(config.rope_theta, arch.attention.rope_scaling),
            LOCAL: {"rope_type": "default", "rope_theta": arch.windows.theta},
        },
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), 0.0),
    }


MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertModel",
    names=NAMES,
    heads=HEADS,
    head_defaults={"classifier_pooling": "cls", "classifier_activation": "gelu"},
    defaults={
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias"), False),
        "tie_word_embeddings": True,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
    },
    read=_read_modernbert,
    write=_write_modernbert,
)
