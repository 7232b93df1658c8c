"""The decoder families in GGUF files: their settings, their tensors' names and shapes, their order of rotary rows.

Tables and rules, no weights. Sources: llama.cpp's src/llama-model.cpp (what it reads) and convert_hf_to_gguf.py (how
the files come from Hugging Face models); the names are those of the package ``gguf``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfcli.errors import UserError
from tfcli.formats.gguf.blocks import TYPES
from tfcli.formats.gguf.file import GgufFile
from tfcli.formats.hf.stored import counted

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""GGUF -> Hugging Face; {} is the layer."""
LAYER = {
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}
QK_NORM = {
    "blk.{}.attn_q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
}
POST_NORMS = {
    "blk.{}.post_attention_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blk.{}.post_ffw_norm.weight": "model.layers.{}.post_feedforward_layernorm.weight",
}
"""Gemma 3's; its ``ffn_norm`` is not the norm that the others call so."""
QKV_BIAS = {
    "blk.{}.attn_q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blk.{}.attn_k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blk.{}.attn_v.bias": "model.layers.{}.self_attn.v_proj.bias",
}
OUTPUT_BIAS = {"blk.{}.attn_output.bias": "model.layers.{}.self_attn.o_proj.bias"}
FFN_BIAS = {
    "blk.{}.ffn_gate.bias": "model.layers.{}.mlp.gate_proj.bias",
    "blk.{}.ffn_up.bias": "model.layers.{}.mlp.up_proj.bias",
    "blk.{}.ffn_down.bias": "model.layers.{}.mlp.down_proj.bias",
}
ROPE_FREQS = "rope_freqs.weight"
IGNORED = "blk.{}.attn_rot_embd.weight"
"""A table of old converters; llama.cpp skips it too."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""``general.file_type`` by what most matrices are (enum llama_ftype)."""
LARGEST = 1 << 27
"""No width, vocabulary or context of a real model is larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What sets the models of one ``general.architecture`` apart."""

    qk_norm: bool = False
    """Queries and keys are normalised per head."""
    rotary_pairs: bool = False
    """The rows of q and k are stored so that rotary positions turn neighbours: see ``rotary_halves``."""
    gemma: bool = False
    """Norms after attention and feed-forward, gelu (tanh), embeddings times sqrt(width), norm weights with 1 added."""


FAMILIES = {
    "llama": Family(rotary_pairs=True),
    "qwen2": Family(),
    "qwen3": Family(qk_norm=True),
    "gemma3": Family(qk_norm=True, gemma=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary positions were stretched."""

    type: str
    """"linear" (positions / factor) or "yarn" (Peng et al. 2023)."""
    factor: float
    original_context: int
    attention_factor: float = 1.0
    """Of yarn: cosines and sines are times this."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufConfig:
    """The shape of a model in a GGUF file; names as in ``tfcli.config.ModelConfig``."""

    architecture: str
    """A key of ``FAMILIES``."""
    vocab_size: int
    context: int
    depth: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True
    """The head is the embedding: there is no ``output.weight``."""
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    rope_scaling: RopeScaling | None = None
    rope_freqs: tuple[float, ...] | None = None
    """Llama 3's scaling, head_width / 2 numbers: each rotary frequency is divided by its own."""
    sliding_window: int | None = None
    """Tokens that the layers of ``sliding_layers`` see."""
    sliding_layers: tuple[bool, ...] = ()
    sliding_theta: float = 10_000.0
    """Rotary base of the sliding layers, whose positions are not scaled."""
    logit_softcap: float | None = None

    @property
    def family(self) -> Family:
        """What sets its architecture apart."""
        return FAMILIES[self.architecture]

    @property
    def attention_scale(self) -> float:
        """What products of queries and keys are times; of Gemma 3 27B (62 layers) another than of all the others."""
        wide = self.family.gemma and self.depth == 62
        return (self.width / self.heads if wide else self.head_width) ** -0.5


def rotary_halves(heads: int, head_width: int) -> NDArray[np.intp]:
    """Where each row of q or k stands in a llama file: ``rows[order]`` are Hugging Face's.

    Rotary positions turn pairs of rows: (2i, 2i + 1) of a head in a llama file, (i, i + head_width / 2) in Hugging
    Face's model and in tfcli. It goes for numbers, blocks, groups and biases. ``heads``: of the keys for k.
    """
    return np.arange(heads * head_width).reshape(heads, head_width // 2, 2).swapaxes(1, 2).ravel()


def rotary_pairs(heads: int, head_width: int) -> NDArray[np.intp]:
    """The way back: ``rows[order]`` are what a llama file stores of Hugging Face's rows."""
    return np.arange(heads * head_width).reshape(heads, 2, head_width // 2).swapaxes(1, 2).ravel()


def tensor_names(config: GgufConfig) -> dict[str, str]:
    """{name in the file: Hugging Face's name} of every weight of such a model."""
    layer = dict(LAYER)
    for wanted, names in (
        (config.family.qk_norm, QK_NORM),
        (config.family.gemma, POST_NORMS),
        (config.qkv_bias, QKV_BIAS),
        (config.output_bias, OUTPUT_BIAS),
        (config.ffn_bias, FFN_BIAS),
    ):
        layer |= names if wanted else {}
    outer = {ours: theirs for ours, theirs in OUTER.items() if not (config.tied and ours == "output.weight")}
    return outer | {ours.format(at): theirs.format(at) for at in range(config.depth) for ours, theirs in layer.items()}


def tensor_shapes(config: GgufConfig) -> dict[str, tuple[int, ...]]:
    """{name in the file: shape, outermost first} of every weight of such a model."""
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    matrices = {
        "token_embd": (config.vocab_size, config.width),
        "output": (config.vocab_size, config.width),
        "attn_q": (queries, config.width),
        "attn_k": (keys, config.width),
        "attn_v": (keys, config.width),
        "attn_output": (config.width, queries),
        "ffn_gate": (config.ffn_width, config.width),
        "ffn_up": (config.ffn_width, config.width),
        "ffn_down": (config.width, config.ffn_width),
    }

    def shape(name: str) -> tuple[int, ...]:
        part, kind = name.split(".")[-2:]
        if part in matrices:
            return matrices[part] if kind == "weight" else matrices[part][:1]
        return (config.head_width if part in ("attn_q_norm", "attn_k_norm") else config.width,)

    return {name: shape(name) for name in tensor_names(config)}


def stored_type(name: str, shape: tuple[int, ...], type: str) -> str:
    """The type to store a tensor in when the matrices are to be ``type``, by llama.cpp's rules.

    Norms and biases are F32; a matrix whose rows are not whole blocks is F16.
    """
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return "F32"
    return "F16" if shape[-1] % TYPES[type].block else type


def config_from_gguf(file: GgufFile) -> GgufConfig:
    """The settings of the model in an open file, after comparing them with every tensor.

    Raises UserError for an architecture that is not read, settings that are missing, absurd or not supported, and
    tensors that are missing, unexpected or mis-shaped.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(
            f"{file.path} holds a model of the architecture {str(architecture)[:64]!r}, which tfcli does not read",
            hint=f"it reads {', '.join(FAMILIES)}",
        )
    _refuse(file, architecture)
    config = _config(file, _Settings(file, architecture))
    _check_tensors(file, config)
    return config


def _refuse(file: GgufFile, architecture: str) -> None:
    """UserError for what the family's name does not say: a part of a file, experts, an encoder, an adapter."""
    part = file.metadata.get("split.count", 1)
    if part not in (0, 1):
        raise UserError(
            f"{file.path} is one of {part!s:.20} parts of a model",
            hint="join them: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )
    if file.metadata.get("general.type", "model") != "model":
        raise UserError(f"{file.path} holds no model: general.type is {str(file.metadata['general.type'])[:64]!r}")
    if file.metadata.get(f"{architecture}.expert_count", 0) != 0:
        raise UserError(f"{file.path} holds a mixture of experts", hint="tfcli reads dense models")
    if file.metadata.get(f"{architecture}.attention.causal", True) is not True:
        raise UserError(f"{file.path} holds an encoder (attention.causal is false)", hint="tfcli reads decoders here")


class _Settings:
    """Numbers of one architecture in the metadata, each checked."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def wrong(self, key: str, expected: str) -> UserError:
        value = self.file.metadata.get(key)
        said = f"has no {key}" if value is None else f"says that {key} is {str(value)[:64]}"
        return UserError(f"{self.file.path} {said}, expected {expected}", hint="the file was not made for this model")

    def get(self, key: str) -> tuple[str, Any]:
        full = f"{self.architecture}.{key}"
        value = self.file.metadata.get(full)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # llama.cpp allows one for each layer
        return full, value

    def count(self, key: str, default: int | None = None) -> int:
        full, value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, list):
            raise self.wrong(full, "one number for all layers")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            raise self.wrong(full, f"a whole number from 1 to {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        full, value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, float) or not 1e-30 < value < 1e30:
            raise self.wrong(full, "a positive number")
        return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06: the decimal that was meant


def _config(file: GgufFile, settings: _Settings) -> GgufConfig:
    depth, tensors = settings.count("block_count"), file.tensors
    if depth * len(LAYER) > len(tensors):  # before anything is made for each layer
        raise settings.wrong(f"{settings.architecture}.block_count", f"no more than its {len(tensors)} tensors make")
    width, heads = settings.count("embedding_length"), settings.count("attention.head_count")
    kv_heads = settings.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise settings.wrong(f"{settings.architecture}.attention.head_count_kv", f"a divisor of {heads} heads")
    head_width = settings.count("attention.key_length", width // heads if width % heads == 0 else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.count(key, head_width) != head_width:
            raise settings.wrong(f"{settings.architecture}.{key}", f"the {head_width} of a head")
    if head_width % 2:
        raise settings.wrong(f"{settings.architecture}.attention.key_length", "an even number")
    window, sliding = _sliding(settings, depth)
    softcap = settings.get("final_logit_softcapping")[1]
    return GgufConfig(
        architecture=settings.architecture,
        vocab_size=_vocab_size(file, settings),
        context=settings.count("context_length"),
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn_width=settings.count("feed_forward_length"),
        rope_theta=settings.number("rope.freq_base", 10_000.0),
        norm_eps=settings.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        qkv_bias=any(name.format(0) in tensors for name in QKV_BIAS),
        output_bias=any(name.format(0) in tensors for name in OUTPUT_BIAS),
        ffn_bias=any(name.format(0) in tensors for name in FFN_BIAS),
        rope_scaling=_rope_scaling(settings),
        rope_freqs=_rope_freqs(file, head_width),
        sliding_window=window,
        sliding_layers=sliding,
        sliding_theta=settings.number("rope.freq_base_swa", 10_000.0),
        logit_softcap=settings.number("final_logit_softcapping") if softcap else None,
    )


def _vocab_size(file: GgufFile, settings: _Settings) -> int:
    """The rows of the embedding, which the vocabulary of the file must name one by one."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(
            f"{file.path} has no token_embd.weight", hint="it holds a vocabulary alone, or no language model"
        )
    rows = embedding.shape[0]
    pieces = file.metadata.get("tokenizer.ggml.tokens")
    named = len(pieces) if isinstance(pieces, list) else settings.count("vocab_size", rows)
    if named != rows:
        raise UserError(f"{file.path} has a vocabulary of {named} pieces, its embedding {rows} rows")
    return rows


def _rope_scaling(settings: _Settings) -> RopeScaling | None:
    full, kind = settings.get("rope.scaling.type")
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0))
    attention = settings.number("rope.scaling.attn_factor", 1.0)
    kind = "linear" if kind is None else kind
    if kind not in ("none", "linear", "yarn"):
        raise settings.wrong(full, "none, linear or yarn")
    if kind != "yarn" and attention != 1.0:
        raise settings.wrong(f"{settings.architecture}.rope.scaling.attn_factor", "1 without yarn")
    if kind == "none" or factor == 1.0:
        return None
    original = settings.count("rope.scaling.original_context_length", settings.count("context_length"))
    if kind == "linear":
        return RopeScaling(type="linear", factor=factor, original_context=original)
    return RopeScaling(
        type="yarn",
        factor=factor,
        original_context=original,
        attention_factor=attention * (1.0 + 0.1 * math.log(factor)),
        beta_fast=settings.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=settings.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _rope_freqs(file: GgufFile, head_width: int) -> tuple[float, ...] | None:
    tensor = file.tensors.get(ROPE_FREQS)
    if tensor is None:
        return None
    if tensor.type != "F32" or tensor.shape != (head_width // 2,):
        raise UserError(
            f"{file.path}: {ROPE_FREQS} is {tensor.type} of shape {tensor.shape}, expected F32 of ({head_width // 2},)"
        )
    values = tensor.dequantize()
    if not np.isfinite(values).all() or values.min() <= 0:
        raise UserError(f"{file.path}: {ROPE_FREQS} holds numbers that are not positive")
    return tuple(values.tolist())


def _sliding(settings: _Settings, depth: int) -> tuple[int | None, tuple[bool, ...]]:
    """Window and layers of Gemma 3: five of six slide unless the file says which; llama.cpp has none in the others."""
    if not FAMILIES[settings.architecture].gemma or not settings.get("attention.sliding_window")[1]:
        return None, ()
    window = settings.count("attention.sliding_window")
    key = f"{settings.architecture}.attention.sliding_window_pattern"
    pattern = settings.file.metadata.get(key, 6)
    if isinstance(pattern, list):
        if len(pattern) != depth or not all(isinstance(item, int) for item in pattern):
            raise settings.wrong(key, f"{depth} truth values")
        return window, tuple(bool(item) for item in pattern)
    if not isinstance(pattern, int) or pattern < 0:
        raise settings.wrong(key, "a whole number")
    return window, tuple(pattern == 0 or layer % pattern < pattern - 1 for layer in range(depth))


def _check_tensors(file: GgufFile, config: GgufConfig) -> None:
    expected = tensor_shapes(config)
    ignored = {ROPE_FREQS, *(IGNORED.format(layer) for layer in range(config.depth))}
    problems = {
        "missing": [name for name in expected if name not in file.tensors],
        "unexpected": [repr(name)[1:-1] for name in file.tensors if name not in expected and name not in ignored],
        "mis-shaped": [
            f"{name} {file.tensors[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if name in file.tensors and file.tensors[name].shape != shape
        ],
    }
    if any(problems.values()):
        raise UserError(
            f"{file.path} does not hold the tensors that its metadata describes: {counted(problems)}",
            hint=f"expected a {config.architecture} model as llama.cpp's converter writes it",
        )


def metadata_from_config(config: GgufConfig, *, type: str, name: str | None = None) -> dict[str, Any]:
    """The metadata of such a model for ``write_gguf``, without its vocabulary: the inverse of ``config_from_gguf``.

    ``type``: what most matrices are stored in. ``rope_freqs`` are not metadata: they are the tensor ``ROPE_FREQS``.
    """
    general: Mapping[str, Any] = {
        "general.architecture": config.architecture,
        "general.type": "model",
        **({"general.name": name} if name else {}),
        "general.file_type": FILE_TYPES[type],
        "general.quantization_version": 2,
    }
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.depth,
        "feed_forward_length": config.ffn_width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_width,
        "rope.freq_base": float(config.rope_theta),
    }
    if (scaling := config.rope_scaling) is not None:
        settings["rope.scaling.type"] = scaling.type
        settings["rope.scaling.factor"] = float(scaling.factor)
        settings["rope.scaling.original_context_length"] = scaling.original_context
        if scaling.type == "yarn":
            settings["rope.scaling.attn_factor"] = scaling.attention_factor / (1.0 + 0.1 * math.log(scaling.factor))
            settings["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
            settings["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    if config.sliding_window is not None:
        settings["attention.sliding_window"] = config.sliding_window
        settings["attention.sliding_window_pattern"] = list(config.sliding_layers)
        settings["rope.freq_base_swa"] = float(config.sliding_theta)
    if config.logit_softcap is not None:
        settings["final_logit_softcapping"] = float(config.logit_softcap)
    return {**general, **{f"{config.architecture}.{key}": value for key, value in settings.items()}}
