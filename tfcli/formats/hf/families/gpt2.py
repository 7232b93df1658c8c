"""GPT-2 (Radford et al. 2019). Standard library only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tfcli.config.model import ModelConfig
from tfcli.formats.hf.families.base import ACTIVATIONS, CLASSIC, WRITTEN, Family, Names, Place, classifier, head_width
from tfcli.formats.hf.settings import Settings

NAMES = Names(
    outer={"embed": "wte", "positions": "wpe", "norm": "ln_f"},
    layer={
        "attention_norm": "h.{}.ln_1",
        "attention.q": Place(name="h.{}.attn.c_attn", transposed=True, part=0, parts=3),
        "attention.k": Place(name="h.{}.attn.c_attn", transposed=True, part=1, parts=3),
        "attention.v": Place(name="h.{}.attn.c_attn", transposed=True, part=2, parts=3),
        "attention.o": Place(name="h.{}.attn.c_proj", transposed=True),
        "ffn_norm": "h.{}.ln_2",
        "ffn.up": Place(name="h.{}.mlp.c_fc", transposed=True),
        "ffn.down": Place(name="h.{}.mlp.c_proj", transposed=True),
    },
    prefixes=("transformer.", ""),
    buffers=(".attn.bias", ".attn.masked_bias"),
    others=("score.",),
)


def _read_gpt2(settings: Settings) -> dict[str, Any]:
    width = settings.whole("n_embd")
    return {
        "kv_heads": settings.whole("n_head"),
        "head_width": head_width(settings, "n_head", "n_embd"),
        "ffn_width": 4 * width if settings.data.get("n_inner") is None else settings.whole("n_inner"),
        "norm_eps": settings.number("layer_norm_epsilon"),
        "tied": settings.flag("tie_word_embeddings"),
        "architecture": replace(
            CLASSIC,
            feed_forward=replace(CLASSIC.feed_forward, activation=settings.one_of("activation_function", ACTIVATIONS)),
            attention=replace(CLASSIC.attention, scale=None if settings.flag("scale_attn_weights") else 1.0),
        ),
    }


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    act = config.architecture.feed_forward.activation
    return {
        "n_inner": config.ffn_width,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "activation_function": "gelu_new" if act == "gelu_tanh" else WRITTEN[act],
        "scale_attn_weights": config.architecture.attention.scale is None,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    names=NAMES,
    heads=classifier("GPT2ForSequenceClassification", prefix="transformer."),
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
    fixed={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    read=_read_gpt2,
    write=_write_gpt2,
)
