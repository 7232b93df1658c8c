"""The shape of a model, as data: what distinguishes one from another is here, never in a name or a subclass."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tfcli.config.resolve import from_dict, to_dict
from tfcli.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched to a context longer than the one trained on; ``none`` leaves them."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    """Context before stretching (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original_context / this are divided by ``factor``."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original_context / this stay."""
    beta_fast: float = 32.0
    """yarn: rotations in the original context above which a frequency stays (Peng et al. 2023, 3.2)."""
    beta_slow: float = 1.0
    """yarn: rotations below which it is divided by ``factor``."""
    attention_factor: float = 1.0
    """yarn: what cos and sin are multiplied by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormConfig:
    """The norms of a model and where they stand."""

    kind: Literal["rms", "layer"] = "rms"
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016)."""
    bias: bool = False
    place: Literal["pre", "post", "sandwich"] = "pre"
    """Before each part; after the sum (Vaswani et al. 2017); or before and after each part (Gemma 2)."""
    first: bool = True
    """Whether the first block norms what its attention reads; not after an ``embedding.norm`` (ModernBERT)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """What attention does to its queries, keys and values."""

    qk_norm: bool = True
    """RMSNorm of queries and keys, per head (Henry et al. 2020)."""
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    """What q k^T is multiplied by; left out: head_width^-1/2."""
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
    """What the first block reads."""

    positions: Literal["rope", "learned"] = "rope"
    norm: bool = False
    """A norm right after the embedding (BERT)."""
    scale: float = 1.0
    """What embeddings are multiplied by (Gemma: sqrt(width))."""
    token_types: int = 0
    """Segment embeddings (BERT: 2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """Which layers are local: see only a window of positions."""

    size: int = 0
    """Positions that a local layer sees, itself among them; an encoder's sees half to each side. 0: no local layers."""
    every: int = 0
    """Every this-many-th layer sees all, the others are local; 0: all are local."""
    global_first: bool = False
    """Of each ``every`` layers the first sees all (ModernBERT), not the last."""
    theta: float = 10_000.0
    """rope_theta of local layers, which are not stretched by ``attention.rope_scaling``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How the parts of a model are put together: what distinguishes one family from another, as data.

    The defaults are tfcli's own decoder (Qwen3): causal, RMSNorm before each part, QK-norm, rotary positions, SwiGLU,
    no biases.
    """

    causal: bool = True
    """Each position sees those before it (a decoder); else all (an encoder)."""
    norms: NormConfig = NormConfig()
    attention: AttentionConfig = AttentionConfig()
    feed_forward: FeedForwardConfig = FeedForwardConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    windows: WindowConfig = WindowConfig()


STORED_AS = "wiring"
"""The key of an architecture in files, which have its settings in one list."""
STORED: Mapping[str, tuple[str, ...]] = {
    "causal": ("causal",),
    "norm": ("norms", "kind"),
    "norm_bias": ("norms", "bias"),
    "norm_place": ("norms", "place"),
    "first_norm": ("norms", "first"),
    "qk_norm": ("attention", "qk_norm"),
    "positions": ("embedding", "positions"),
    "activation": ("feed_forward", "activation"),
    "gated": ("feed_forward", "gated"),
    "qkv_bias": ("attention", "qkv_bias"),
    "out_bias": ("attention", "out_bias"),
    "ffn_bias": ("feed_forward", "bias"),
    "embed_norm": ("embedding", "norm"),
    "embed_scale": ("embedding", "scale"),
    "token_types": ("embedding", "token_types"),
    "attention_scale": ("attention", "scale"),
    "local_window": ("windows", "size"),
    "local_every": ("windows", "every"),
    "global_first": ("windows", "global_first"),
    "local_theta": ("windows", "theta"),
    "rope_scaling": ("attention", "rope_scaling"),
}
"""The name of each setting in files and messages: where ``Architecture`` has it."""


def flat(architecture: Architecture) -> dict[str, Any]:
    """The settings of an architecture under the names of ``STORED``."""
    return {name: functools.reduce(getattr, path, architecture) for name, path in STORED.items()}


def from_flat(settings: Mapping[str, Any], base: Architecture | None = None) -> Architecture:
    """``base`` (default: tfcli's own decoder) with other settings, under the names of ``STORED``."""
    made = base or Architecture()
    for name, value in settings.items():
        *group, field = STORED[name]
        if group:
            field, value = group[0], dataclasses.replace(getattr(made, group[0]), **{field: value})
        made = dataclasses.replace(made, **{field: value})
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of one model; every field is needed to build it. Dimensions as in ``tfcli/model/__init__.py``."""

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
    """Blocks of an encoder beside the decoder, each of whose blocks then attends to what the encoder saw; 0: none."""
    architecture: Architecture = Architecture()

    @property
    def encoder(self) -> ModelConfig:
        """The shape of the encoder beside the decoder."""
        architecture = dataclasses.replace(self.architecture, causal=False)
        return dataclasses.replace(self, depth=self.encoder_depth, encoder_depth=0, architecture=architecture)

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only a window of positions."""
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
            raise UserError("an encoder has no other beside it", hint="model.encoder_depth goes with a decoder")
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
    own = shape.pop("architecture")
    shape[STORED_AS] = {name: functools.reduce(operator.getitem, path, own) for name, path in STORED.items()}
    return shape


def from_stored(data: Mapping[str, Any]) -> ModelConfig:
    """The shape that ``stored`` wrote. Raises UserError for settings that are unknown or no values."""
    nested: dict[str, Any] = {}
    for name, value in data.get(STORED_AS, {}).items():
        if name not in STORED:
            raise unknown("setting", name, STORED)
        *group, field = STORED[name]
        (nested.setdefault(group[0], {}) if group else nested)[field] = value
    shape = {key: value for key, value in data.items() if key != STORED_AS}
    return from_dict(ModelConfig, {**shape, "architecture": nested})
