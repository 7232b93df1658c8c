"""The families of models in GGUF files: metadata and tensors as tfcli's ``ModelConfig``, and back. No weights.

A new family is a row of ``FAMILIES``. Sources: llama.cpp's src/llama-model.cpp (what it reads) and
convert_hf_to_gguf.py (how the files come from Hugging Face models); names are those of the package ``gguf``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    flat,
    from_flat,
)
from tfcli.errors import UserError
from tfcli.formats.gguf.file import GgufFile
from tfcli.formats.gguf.rope import CLOSE, llama3_factors, rotary_halves, rotary_pairs, stretch
from tfcli.formats.gguf.settings import ROPE_FREQS, Settings, read_rope, write_rope
from tfcli.formats.hf.stored import mismatches

OUTER = {"token_embd": ("embed", "VD"), "output_norm": ("norm", "D"), "output": ("head", "VD")}
"""{part in the file: (tfcli's part, dimensions of its weight)}. q, k: rows of all queries, of all keys."""
LAYER = {
    "attn_norm": ("attention_norm", "D"),
    "attn_q": ("attention.q", "qD"),
    "attn_k": ("attention.k", "kD"),
    "attn_v": ("attention.v", "kD"),
    "attn_output": ("attention.o", "Dq"),
    "ffn_norm": ("ffn_norm", "D"),
    "ffn_gate": ("ffn.gate", "FD"),
    "ffn_up": ("ffn.up", "FD"),
    "ffn_down": ("ffn.down", "DF"),
}
"""The same for each layer; its parts in the file begin with "blk.3."."""
QK_NORM = {"attn_q_norm": ("attention.q_norm", "K"), "attn_k_norm": ("attention.k_norm", "K")}
POST_NORMS = {"post_attention_norm": ("attention_post_norm", "D"), "post_ffw_norm": ("ffn_post_norm", "D")}
BIASES = {
    "qkv_bias": ("attn_q", "attn_k", "attn_v"),
    "out_bias": ("attn_output",),
    "ffn_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
"""{setting (``config.model.STORED``): the parts that then have a bias}."""
IGNORED = "blk.{}.attn_rot_embd.weight"
"""A table of old converters; llama.cpp skips it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The models of one ``general.architecture``, as far as metadata do not describe them."""

    name: str
    architecture: Architecture
    """The settings that its models share."""
    biases: tuple[str, ...] = ()
    """Keys of ``BIASES`` that are optional in its models."""
    rotary_pairs: bool = False
    """Rows of q and k are stored so that rotary positions turn neighbors: see ``rotary_halves``."""
    rope_factors: bool = False
    """llama.cpp reads ``ROPE_FREQS``."""
    windows: bool = False
    """Some layers may be local."""
    scales: Callable[[ModelConfig], Mapping[str, Any]] = lambda _: {}
    """Return settings of the architecture that follow from a model's sizes."""

    def complete(self, config: ModelConfig) -> ModelConfig:
        """Add the settings that follow from a model's sizes."""
        return replace(config, architecture=from_flat(self.scales(config), config.architecture))


def _gemma3(config: ModelConfig) -> dict[str, Any]:
    """Return scales: embeddings times sqrt(width); attention of the 27B (62 layers) is scaled by its width."""
    by_width, by_head = (config.width / config.heads) ** -0.5, config.head_width**-0.5
    scale = by_width if config.depth == 62 and by_width != by_head else None
    return {"embed_scale": config.width**0.5, "attention_scale": scale}


FAMILIES = (
    Family(name="qwen3", architecture=Architecture()),
    Family(name="qwen2", architecture=Architecture(attention=AttentionConfig(qk_norm=False, qkv_bias=True))),
    Family(
        name="llama",
        architecture=Architecture(attention=AttentionConfig(qk_norm=False)),
        biases=tuple(BIASES),
        rotary_pairs=True,
        rope_factors=True,
    ),
    Family(
        name="gemma3",
        architecture=Architecture(
            norms=NormConfig(place="sandwich"), feed_forward=FeedForwardConfig(activation="gelu_tanh")
        ),
        windows=True,
        scales=_gemma3,
    ),
)
"""A model is written as the first family that has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """How a weight is stored in a file."""

    ours: str
    """tfcli's name."""
    shape: tuple[int, ...]
    """Outermost first, as tfcli's."""
    paired_heads: int = 0
    """Heads whose rows are stored in pairs; 0: rows are in order."""

    @property
    def rows_read(self) -> NDArray[np.intp] | None:
        """The file's rows that are tfcli's rows 0, 1, ...; None: rows are in order."""
        return rotary_halves(self.paired_heads, self.shape[0] // self.paired_heads) if self.paired_heads else None

    @property
    def rows_written(self) -> NDArray[np.intp] | None:
        """The rows of tfcli that are the file's rows 0, 1, ...; None: rows are in order."""
        return rotary_pairs(self.paired_heads, self.shape[0] // self.paired_heads) if self.paired_heads else None


def places(family: Family, config: ModelConfig) -> dict[str, Place]:
    """Return {name in the file: its place} of every weight of a model."""
    held, K = flat(config.architecture), config.head_width
    sizes = {"V": config.vocab_size, "D": config.width, "F": config.ffn_width, "K": K}
    sizes |= {"q": config.heads * K, "k": config.kv_heads * K}
    paired = {"attn_q": config.heads, "attn_k": config.kv_heads} if family.rotary_pairs else {}
    biased = {part for setting, parts in BIASES.items() if held[setting] for part in parts}
    outer = {part: entry for part, entry in OUTER.items() if not (config.tied and part == "output")}
    layer = LAYER | (QK_NORM if held["qk_norm"] else {}) | (POST_NORMS if held["norm_place"] == "sandwich" else {})
    parts = [("", part, ours, dims) for part, (ours, dims) in outer.items()]
    for at in range(config.depth):
        parts += [(f"blk.{at}.", part, f"blocks.{at}.{ours}", dims) for part, (ours, dims) in layer.items()]
    places = {}
    for prefix, part, ours, dims in parts:
        shape, heads = tuple(sizes[dim] for dim in dims), paired.get(part, 0)
        places[f"{prefix}{part}.weight"] = Place(ours=f"{ours}.weight", shape=shape, paired_heads=heads)
        if part in biased:
            places[f"{prefix}{part}.bias"] = Place(ours=f"{ours}.bias", shape=shape[:1], paired_heads=heads)
    return places


def read(file: GgufFile) -> tuple[Family, ModelConfig]:
    """Return the family and the shape of the model in an open file, after comparing them with every tensor.

    Raises UserError for an architecture that is not read, settings that are missing, absurd or not supported, and
    tensors that are missing, unexpected or mis-shaped.
    """
    given = file.metadata.get("general.architecture")
    family = next((family for family in FAMILIES if family.name == given), None)
    if family is None:
        raise UserError(
            f"{file.path} holds a model of the architecture {str(given)[:64]!r}, which tfcli does not read",
            hint=f"it reads {', '.join(family.name for family in FAMILIES)}",
        )
    settings = Settings(str(file.path), family.name, file.metadata)
    _refuse(file, settings)
    vocab_size, factors = _vocab_size(file, settings), _stored_factors(file, _head_width(settings))
    config = _model(family, settings, file.tensors, vocab_size=vocab_size, factors=factors)
    expected = {name: place.shape for name, place in places(family, config).items()}
    ignored = {ROPE_FREQS, *(IGNORED.format(layer) for layer in range(config.depth))}
    problems = mismatches(expected, {name: tensor.shape for name, tensor in file.tensors.items()}, ignored)
    if problems:
        hint = f"expected a {family.name} model as llama.cpp's converter writes it"
        raise UserError(f"{file.path} does not hold the tensors that its metadata describes: {problems}", hint=hint)
    return family, config


def written(config: ModelConfig, *, name: str = "the model") -> tuple[Family, dict[str, Any]]:
    """Return the first family whose settings are read back as this model, and those settings.

    ``name`` is the model's, for messages. Raises UserError for a model that no family has.
    """
    if not config.architecture.causal or config.encoder_depth:
        raise UserError(
            f"{name} is an encoder{'-decoder' if config.encoder_depth else ''}, for which tfcli writes no GGUF file",
            hint="GGUF files hold decoders; other models can be quantized as they are loaded: --quantize int8",
        )
    lacking: list[list[str]] = []
    refusal = None
    for family in FAMILIES:
        metadata = _metadata(family, config)
        settings, factors = Settings(name, family.name, metadata), rope_factors(family, config)
        own, theirs = flat(config.architecture), flat(family.architecture)
        biases = {key: theirs[key] or (key in family.biases and own[key]) for key in BIASES}  # that llama.cpp reads
        held = places(family, replace(config, architecture=from_flat(biases, config.architecture)))
        try:
            again = _model(family, settings, held, vocab_size=config.vocab_size, factors=factors)
        except UserError as error:
            refusal = error
            continue
        differences = _differences(config, again)
        if not differences:
            return family, metadata
        lacking.append(differences)
    if refusal is not None and not lacking:
        raise refusal
    nearest = min(lacking, key=len)
    hint = f"tfcli writes the families {', '.join(family.name for family in FAMILIES)}"
    raise UserError(f"{name} has an architecture that no family of GGUF files has: {', '.join(nearest)}", hint=hint)


def rope_factors(family: Family, config: ModelConfig) -> NDArray[np.float32] | None:
    """Return the tensor ``ROPE_FREQS`` of a model that is written as a family, None where it has none."""
    scaling = config.architecture.attention.rope_scaling
    if scaling.kind != "llama3" or not family.rope_factors:
        return None
    return llama3_factors(scaling, config.head_width, config.rope_theta).astype(np.float32)


def _refuse(file: GgufFile, settings: Settings) -> None:
    """Raise UserError for what tfcli supports in no family: parts of a file, experts, capped logits, ..."""
    part = file.metadata.get("split.count", 1)
    if part not in (0, 1):
        hint = "join them: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf"
        raise UserError(f"{file.path} is one of {part!s:.20} parts of a model", hint=hint)
    if file.metadata.get("general.type", "model") != "model":
        raise UserError(f"{file.path} holds no model: general.type is {str(file.metadata['general.type'])[:64]!r}")
    if file.metadata.get(f"{settings.architecture}.expert_count", 0) != 0:
        raise UserError(f"{file.path} holds a mixture of experts", hint="tfcli reads dense models")
    if file.metadata.get(f"{settings.architecture}.attention.causal", True) is not True:
        raise UserError(f"{file.path} holds an encoder (attention.causal is false)", hint="tfcli reads decoders here")
    if settings.get("final_logit_softcapping"):
        cap = settings.number("final_logit_softcapping")
        raise UserError(f"{file.path} caps its logits at {cap}", hint="tfcli does not support that")
    if settings.count("block_count") * len(LAYER) > len(file.tensors):  # before any allocation per layer
        raise settings.wrong("block_count", f"no more than its {len(file.tensors)} tensors make")


def _model(
    family: Family,
    settings: Settings,
    tensors: Container[str],
    *,
    vocab_size: int,
    factors: NDArray[np.float32] | None,
) -> ModelConfig:
    """Return the model that metadata describe, with the biases and the head that its tensors' names give."""
    depth, heads = settings.count("block_count"), settings.count("attention.head_count")
    kv_heads = settings.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise settings.wrong("attention.head_count_kv", f"a divisor of {heads} heads")
    head_width, theta = _head_width(settings), settings.number("rope.freq_base", 10_000.0)
    window, every = _windows(settings, depth) if family.windows else (0, 0)
    local_theta = settings.number("rope.freq_base_swa", 10_000.0)
    own: dict[str, Any] = {
        **{key: any(f"blk.0.{part}.bias" in tensors for part in parts) for key, parts in BIASES.items()},
        **({"local_window": window, "local_every": every, "local_theta": local_theta} if window else {}),
        "rope_scaling": read_rope(settings, factors, head_width, theta),
    }
    config = ModelConfig(
        vocab_size=vocab_size,
        context=settings.count("context_length"),
        depth=depth,
        width=settings.count("embedding_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn_width=settings.count("feed_forward_length"),
        rope_theta=theta,
        norm_eps=settings.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        architecture=from_flat(own, family.architecture),
    )
    return family.complete(config)


def _head_width(settings: Settings) -> int:
    width, heads = settings.count("embedding_length"), settings.count("attention.head_count")
    head_width = settings.count("attention.key_length", width // heads if width % heads == 0 else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.count(key, head_width) != head_width:
            raise settings.wrong(key, f"the {head_width} of a head")
    if head_width % 2:
        raise settings.wrong("attention.key_length", "an even number")
    return head_width


def _vocab_size(file: GgufFile, settings: Settings) -> int:
    """Return the number of rows of the embedding, which must be that of the vocabulary in the file."""
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


def _stored_factors(file: GgufFile, head_width: int) -> NDArray[np.float32] | None:
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
    return values


def _windows(settings: Settings, depth: int) -> tuple[int, int]:
    """Return ``local_window`` and ``local_every``: five layers of six are local unless the file says which."""
    if not settings.get("attention.sliding_window"):
        return 0, 0
    window, key = settings.count("attention.sliding_window"), "attention.sliding_window_pattern"
    pattern = settings.metadata.get(f"{settings.architecture}.{key}", 6)
    if isinstance(pattern, list):
        if len(pattern) != depth or not all(isinstance(item, int) for item in pattern):
            raise settings.wrong(key, f"{depth} booleans")
        local = [bool(item) for item in pattern]
    elif isinstance(pattern, int) and pattern >= 0:
        local = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(depth)]
    else:
        raise settings.wrong(key, "a whole number")
    every = local.index(False) + 1 if False in local else 0
    if local != [every == 0 or (layer + 1) % every != 0 for layer in range(depth)]:
        hint = "tfcli supports models with every n-th layer global, and no other order"
        raise UserError(f"{settings.name} has sliding windows in an irregular order of layers", hint=hint)
    return (window, every) if any(local) else (0, 0)


def _metadata(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Return the metadata that ``_model`` reads, for any model, whether or not the family has it."""
    arch = config.architecture
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
        **write_rope(arch.attention.rope_scaling, config.context),
    }
    if family.windows and arch.windows.size:
        settings["attention.sliding_window"] = arch.windows.size
        settings["attention.sliding_window_pattern"] = [config.is_local(layer) for layer in range(config.depth)]
        settings["rope.freq_base_swa"] = float(arch.windows.theta)
    return {f"{family.name}.{key}": value for key, value in settings.items()}


def _differences(wanted: ModelConfig, other: ModelConfig) -> list[str]:
    """Return each setting of a model that another lacks, in words, apart from equivalent settings."""
    shown = {**flat(wanted.architecture), "rope_scaling": wanted.architecture.attention.rope_scaling.kind}
    theirs = _values(other)
    return [
        f"{key} is {shown.get(key, value)!r}" for key, value in _values(wanted).items() if not _same(value, theirs[key])
    ]


def _values(config: ModelConfig) -> dict[str, Any]:
    """Return what a model computes with, the same for equivalent settings."""
    arch = config.architecture
    local = [config.is_local(layer) for layer in range(config.depth)]
    return {
        **flat(config.architecture),
        "rope_theta": config.rope_theta,
        "norm_eps": config.norm_eps,
        "attention_scale": arch.attention.scale or config.head_width**-0.5,
        "local_window": arch.windows.size if any(local) else 0,
        "local_every": local,
        "local_theta": arch.windows.theta if any(local) else None,
        "rope_scaling": stretch(arch.attention.rope_scaling, config.head_width, config.rope_theta),
    }


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, floats up to the rounding of fp32."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=10 * CLOSE)
    return bool(a == b)
