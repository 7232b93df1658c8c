"""The shape of a model, as data: what distinguishes one from another is here, never in a name or a subclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tfcli.errors import UserError


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
class Wiring:
    """How the parts of a model are put together: what distinguishes one family from another, as data.

    The defaults are tfcli's own decoder (Qwen3): causal, RMSNorm before each part, QK-norm, rotary positions, SwiGLU,
    no biases.
    """

    causal: bool = True
    """Each position sees those before it (a decoder); else all (an encoder)."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016)."""
    norm_bias: bool = False
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    """Before each part; after the sum (Vaswani et al. 2017); or before and after each part (Gemma 2)."""
    first_norm: bool = True
    """Whether the first block norms what its attention reads; not after an ``embed_norm`` of pre-norm (ModernBERT)."""
    qk_norm: bool = True
    """RMSNorm of queries and keys, per head (Henry et al. 2020)."""
    positions: Literal["rope", "learned"] = "rope"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    """``act(gate) * up`` (Shazeer 2020) or ``act(up)``."""
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    embed_norm: bool = False
    """A norm right after the embedding (BERT)."""
    embed_scale: float = 1.0
    """What embeddings are multiplied by (Gemma: sqrt(width))."""
    token_types: int = 0
    """Segment embeddings (BERT: 2)."""
    attention_scale: float | None = None
    """What q k^T is multiplied by; left out: head_width^-1/2."""
    local_window: int = 0
    """Positions that a local layer sees, itself among them; an encoder's sees half to each side. 0: no local layers."""
    local_every: int = 0
    """Every this-many-th layer sees all, the others are local; 0: all are local."""
    global_first: bool = False
    """Of each ``local_every`` layers the first sees all (ModernBERT), not the last."""
    local_theta: float = 10_000.0
    """rope_theta of local layers, which are not stretched by ``rope_scaling``."""
    rope_scaling: RopeScaling = RopeScaling()


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
    wiring: Wiring = Wiring()

    @property
    def encoder(self) -> ModelConfig:
        """The shape of the encoder beside the decoder."""
        wiring = dataclasses.replace(self.wiring, causal=False)
        return dataclasses.replace(self, depth=self.encoder_depth, encoder_depth=0, wiring=wiring)

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only a window of positions."""
        window, every = self.wiring.local_window, self.wiring.local_every
        return window > 0 and (every == 0 or (layer + (not self.wiring.global_first)) % every != 0)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "depth", "width", "heads", "kv_heads", "head_width", "ffn_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model.{name} is {value!r}", hint="it must be a whole number of at least 1")
        if not isinstance(self.encoder_depth, int) or self.encoder_depth < 0:
            raise UserError(f"model.encoder_depth is {self.encoder_depth!r}", hint="it must be 0 (no encoder) or more")
        if self.encoder_depth and not self.wiring.causal:
            raise UserError("an encoder has no other beside it", hint="model.encoder_depth goes with a decoder")
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}",
                hint="each key/value head serves the same number of query heads",
            )
        if self.head_width % 2 and self.wiring.positions == "rope":
            raise UserError(f"model.head_width is {self.head_width}", hint="rotary positions need an even head width")
