"""The shape of a model as data: models differ only here, never by a name or a subclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from tfcli.config.resolve import from_dict, to_dict
from tfcli.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Stretching of rotary frequencies to a context longer than in training; ``none`` leaves them as they are."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    """Context before stretching (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original_context / this are divided by ``factor``."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original_context / this stay as they are."""
    beta_fast: float = 32.0
    """yarn: rotations in the original context above which a frequency stays (Peng et al. 2023, 3.2)."""
    beta_slow: float = 1.0
    """yarn: rotations below which it is divided by ``factor``."""
    attention_factor: float = 1.0
    """yarn: factor on cos and sin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormConfig:
    """The norms of a model and their places."""

    kind: Literal["rms", "layer"] = "rms"
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016)."""
    bias: bool = False
    place: Literal["pre", "post", "sandwich"] = "pre"
    """Before each sublayer, after the residual sum (Vaswani et al. 2017), or before and after it (Gemma 2)."""
    first: bool = True
    """True if the first block has a norm before its attention; not needed after an ``embedding.norm`` (ModernBERT)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Settings of attention."""

    qk_norm: bool = True
    """RMSNorm of queries and keys, per head (Henry et al. 2020)."""
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    """Factor on q k^T; left out: head_width^-1/2."""
    rope_scaling: RopeScaling = RopeScaling()


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedForwardConfig:
    """The feed-forward layer of a block."""

    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    """``act(gate) * up`` (Shazeer 2020) or ``act(up)``."""
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """The input of the first block."""

    positions: Literal["rope", "learned"] = "rope"
    norm: bool = False
    """True if a norm follows the embedding (BERT)."""
    scale: float = 1.0
    """Factor on embeddings (Gemma: sqrt(width))."""
    token_types: int = 0
    """Segment embeddings (BERT: 2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """Which layers are local, that is, attend only within a window of positions."""

    size: int = 0
    """Positions in a window, the query's own included; in an encoder half lie on each side. 0: no local layers."""
    every: int = 0
    """Every this-many-th layer is global, the others are local; 0: all are local."""
    global_first: bool = False
    """True if the first of each ``every`` layers is the global one (ModernBERT), not the last."""
    theta: float = 10_000.0
    """rope_theta of local layers, which are not stretched by ``attention.rope_scaling``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The layout of a model, which distinguishes one family from another.

    The defaults are tfcli's own decoder (Qwen3): causal, pre-RMSNorm, QK-norm, rotary positions, SwiGLU, no biases.
    """

    causal: bool = True
    """True if each position attends only to itself and those before it (a decoder), not to all (an encoder)."""
    norms: NormConfig = NormConfig()
    attention: AttentionConfig = AttentionConfig()
    feed_forward: FeedForwardConfig = FeedForwardConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    windows: WindowConfig = WindowConfig()


STORED_AS = "wiring"
"""The key of an architecture in files, where its settings are one flat list."""
STORED: Mapping[str, str] = {
    "causal": "causal", "norm": "norms.kind", "norm_bias": "norms.bias", "norm_place": "norms.place",
    "first_norm": "norms.first", "qk_norm": "attention.qk_norm", "positions": "embedding.positions",
    "activation": "feed_forward.activation", "gated": "feed_forward.gated", "qkv_bias": "attention.qkv_bias",
    "out_bias": "attention.out_bias", "ffn_bias": "feed_forward.bias", "embed_norm": "embedding.norm",
    "embed_scale": "embedding.scale", "token_types": "embedding.token_types", "attention_scale": "attention.scale",
    "local_window": "windows.size", "local_every": "windows.every", "global_first": "windows.global_first",
    "local_theta": "windows.theta", "rope_scaling": "attention.rope_scaling",
}  # fmt: skip
"""The name of each setting in files and messages, and its path in ``Architecture``."""


def flat(architecture: Architecture) -> dict[str, Any]:
    """The settings of an architecture under the names of ``STORED``."""
    return {name: attrgetter(path)(architecture) for name, path in STORED.items()}


def from_flat(settings: Mapping[str, Any], base: Architecture | None = None) -> Architecture:
    """``base`` (default: tfcli's own decoder) with other settings, under the names of ``STORED``."""
    architecture = base or Architecture()
    for name, value in settings.items():
        group, _, field = STORED[name].rpartition(".")
        if group:
            field, value = group, dataclasses.replace(getattr(architecture, group), **{field: value})
        architecture = dataclasses.replace(architecture, **{field: value})
    return architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of one model, all that is needed to build it. Dimensions as in ``tfcli/model/__init__.py``."""

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
    encoder_depth: int = 0
    """Blocks of an encoder, to whose output the decoder cross-attends; 0: none."""
    architecture: Architecture = Architecture()

    @property
    def encoder(self) -> ModelConfig:
        """The shape of the encoder of an encoder-decoder."""
        architecture = dataclasses.replace(self.architecture, causal=False)
        return dataclasses.replace(self, depth=self.encoder_depth, encoder_depth=0, architecture=architecture)

    def is_local(self, layer: int) -> bool:
        """Return whether a layer attends only within a window."""
        window, every = self.architecture.windows.size, self.architecture.windows.every
        return window > 0 and (every == 0 or (layer + (not self.architecture.windows.global_first)) % every != 0)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "depth", "width", "heads", "kv_heads", "head_width", "ffn_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model.{name} is {value!r}", hint="it must be a whole number of at least 1")
        if not isinstance(self.encoder_depth, int) or self.encoder_depth < 0:
            raise UserError(f"model.encoder_depth is {self.encoder_depth!r}", hint="it must be 0 (no encoder) or more")
        if self.encoder_depth and not self.architecture.causal:
            raise UserError("an encoder cannot have another encoder", hint="model.encoder_depth goes with a decoder")
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}",
                hint="each key/value head serves the same number of query heads",
            )
        if self.head_width % 2 and self.architecture.embedding.positions == "rope":
            raise UserError(f"model.head_width is {self.head_width}", hint="rotary positions need an even head width")


def stored(config: ModelConfig) -> dict[str, Any]:
    """A shape as plain JSON values, as run.json, ``inspect`` and ``bench`` have it."""
    shape = to_dict(config)
    del shape["architecture"]
    settings = flat(config.architecture)
    return {**shape, STORED_AS: {**settings, "rope_scaling": to_dict(settings["rope_scaling"])}}


def from_stored(data: Mapping[str, Any]) -> ModelConfig:
    """The shape that ``stored`` wrote. Raises UserError for unknown settings and for values of a wrong type."""
    nested: dict[str, Any] = {}
    for name, value in data.get(STORED_AS, {}).items():
        if name not in STORED:
            raise unknown("setting", name, STORED)
        group, _, field = STORED[name].rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[field] = value
    shape = {key: value for key, value in data.items() if key != STORED_AS}
    return from_dict(ModelConfig, {**shape, "architecture": nested})
