"""Families of models: what each setting of their config.json means for the core, and back.

A setting that the core does not have is refused by name, never ignored. What a config.json leaves out has the default
of transformers' class. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tfcli.config import ModelConfig, Wiring
from tfcli.errors import UserError
from tfcli.formats import names
from tfcli.formats.settings import Settings, read_rope, write_rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
WRITTEN: Mapping[Activation, str] = {
    "silu": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family of transformers: its names, and its settings as the core's."""

    model_type: str
    architecture: str
    """The class that is written."""
    names: names.Names
    sizes: Mapping[str, str]
    """Settings that are a field of ModelConfig under another name."""
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    """Settings that the core has one value for."""
    read: Callable[[Settings], dict[str, Any]]
    """The other fields of ModelConfig."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """The other settings; of a model that the family has not, settings of another."""


def read(path: Path, data: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and the shape of the model whose config.json, at ``path``, holds ``data``.

    Raises UserError for what the core does not have and for what is no value.
    """
    kind = data.get("model_type")
    family = next((family for family in FAMILIES if family.model_type == kind), None)
    if family is None:
        raise UserError(
            f"{path.parent} holds a model of type {kind!r}, which tfcli does not read",
            hint=f"it reads: {', '.join(family.model_type for family in FAMILIES)}",
        )
    settings = Settings(path, data, family.defaults)
    for key, value in family.fixed.items():
        if settings.data.get(key) not in (None, value):
            raise settings.error(key, f"tfcli has only {value!r}")
    fields = {ours: settings.get(theirs) for theirs, ours in family.sizes.items()}
    return family, ModelConfig(**fields | family.read(settings))


def written(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that has this model, the first that reads its own settings back as it, and those settings.

    Raises UserError where there is none.
    """
    for family in FAMILIES:
        sizes = {theirs: getattr(config, ours) for theirs, ours in family.sizes.items()}
        settings = {"model_type": family.model_type, **sizes, **family.write(config)}
        try:
            if read(Path(family.model_type), settings)[1] == config:
                return family, {"architectures": [family.architecture], **settings}
        except UserError:
            continue
    raise UserError(
        "no family of transformers has this model's wiring, so it cannot be written as one",
        hint=f"tfcli writes: {', '.join(family.architecture for family in FAMILIES)}",
    )


# What families share.


def _heads(settings: Settings) -> dict[str, int]:
    """Key/value heads and head width, which follow from others where they are not given."""
    heads, width = settings.whole("num_attention_heads"), settings.whole("hidden_size")
    kv_heads, head_width = settings.data.get("num_key_value_heads"), settings.data.get("head_dim")
    if head_width is None and width % heads:
        raise settings.error("num_attention_heads", f"it does not divide hidden_size, {width}")
    return {
        "kv_heads": heads if kv_heads is None else settings.whole("num_key_value_heads"),
        "head_width": width // heads if head_width is None else settings.whole("head_dim"),
    }


def _read_llama_like(settings: Settings, wiring: Wiring) -> dict[str, Any]:
    """Fields of a decoder with rotary positions; ``wiring`` is completed."""
    rope = settings.data.get("rope_scaling") or settings.data.get("rope_parameters") or {}
    theta, scaling = read_rope(settings, rope, settings.get("rope_theta"))
    if wiring.local_window:
        if scaling.kind != "none":
            raise settings.error("sliding_window", "tfcli has no windows where rotary positions are scaled")
        wiring = replace(wiring, local_theta=theta)
    return {
        **_heads(settings),
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


def _local_every(settings: Settings, kinds: Any, depth: int) -> int:
    """``Wiring.local_every`` of a list of layer types."""
    if not isinstance(kinds, list) or len(kinds) != depth or any(kind not in (LOCAL, GLOBAL) for kind in kinds):
        raise settings.error("layer_types", f"expected {depth} of {LOCAL} and {GLOBAL}")
    every = kinds.index(GLOBAL) + 1 if GLOBAL in kinds else 0
    if any((kind == LOCAL) != (every == 0 or (layer + 1) % every != 0) for layer, kind in enumerate(kinds)):
        raise settings.error("layer_types", "tfcli has models whose every n-th layer sees all, and no other order")
    return every


SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "num_hidden_layers": "depth",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn_width",
}
DECODER = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False}
FIXED: dict[str, Any] = {"quantization_config": None}


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
    heads, width = settings.whole("n_head"), settings.whole("n_embd")
    if width % heads:
        raise settings.error("n_head", f"it does not divide n_embd, {width}")
    return {
        "kv_heads": heads,
        "head_width": width // heads,
        "ffn_width": 4 * width if settings.data.get("n_inner") is None else settings.whole("n_inner"),
        "norm_eps": settings.number("layer_norm_epsilon"),
        "tied": settings.flag("tie_word_embeddings"),
        "wiring": Wiring(
            norm="layer",
            norm_bias=True,
            qk_norm=False,
            positions="learned",
            activation=settings.one_of("activation_function", ACTIVATIONS),
            gated=False,
            qkv_bias=True,
            out_bias=True,
            ffn_bias=True,
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
    if settings.data.get("layer_types") is None:
        every = settings.whole("sliding_window_pattern")
        every = 0 if every > depth else every
    else:
        every = _local_every(settings, settings.data["layer_types"], depth)
    bias, scalar = settings.flag("attention_bias"), settings.number("query_pre_attn_scalar")
    return {
        **_heads(settings),
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


# BERT (Devlin et al. 2019): the encoder.


def _read_bert(settings: Settings) -> dict[str, Any]:
    return {
        **_heads(settings),
        "norm_eps": settings.number("layer_norm_eps"),
        "tied": True,
        "wiring": Wiring(
            causal=False,
            norm="layer",
            norm_bias=True,
            norm_place="post",
            qk_norm=False,
            positions="learned",
            activation=settings.one_of("hidden_act", ACTIVATIONS),
            gated=False,
            qkv_bias=True,
            out_bias=True,
            ffn_bias=True,
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
    depth, heads, width = (settings.whole(key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if width % heads:
        raise settings.error("num_attention_heads", f"it does not divide hidden_size, {width}")
    wide, near = _modernbert_rope(settings)
    theta, scaling = read_rope(settings, wide, 160_000.0)
    local_theta, local_scaling = read_rope(settings, near, 10_000.0)
    if local_scaling.kind != "none":
        raise settings.error("rope_parameters", f"tfcli does not scale those of {LOCAL}")
    every = _global_every(settings, depth)
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
        "kv_heads": heads,
        "head_width": width // heads,
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
    kinds = settings.data.get("layer_types")
    if kinds is None:
        every = settings.whole("global_attn_every_n_layers")
        return min(every, depth)
    if not isinstance(kinds, list) or len(kinds) != depth or any(kind not in (LOCAL, GLOBAL) for kind in kinds):
        raise settings.error("layer_types", f"expected {depth} of {LOCAL} and {GLOBAL}")
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
    heads, width = settings.whole("decoder_attention_heads"), settings.whole("d_model")
    if width % heads:
        raise settings.error("decoder_attention_heads", f"it does not divide d_model, {width}")
    for key in ("attention_heads", "ffn_dim"):
        if settings.whole(f"encoder_{key}") != settings.whole(f"decoder_{key}"):
            raise settings.error(f"encoder_{key}", f"tfcli has only decoder_{key}, {settings.get(f'decoder_{key}')}")
    return {
        "kv_heads": heads,
        "head_width": width // heads,
        "norm_eps": 1e-5,
        "tied": True,
        "wiring": Wiring(
            norm="layer",
            norm_bias=True,
            qk_norm=False,
            positions="learned",
            activation=settings.one_of("activation_function", ACTIVATIONS),
            gated=False,
            qkv_bias=True,
            out_bias=True,
            ffn_bias=True,
            embed_norm=True,
            embed_scale=width**0.5 if settings.flag("scale_embedding") else 1.0,
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

FAMILIES = (QWEN3, LLAMA, QWEN2, MISTRAL, GEMMA, GPT2, BERT, MODERNBERT, MBART)
