"""What the families of models share: what one is, the names of its settings and of activations.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tfcli.config.model import ModelConfig, Wiring
from tfcli.formats.hf.families import names
from tfcli.formats.hf.settings import Settings

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

SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "num_hidden_layers": "depth",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn_width",
}
FIXED: dict[str, Any] = {"quantization_config": None}
CLASSIC = Wiring(
    norm="layer",
    norm_bias=True,
    qk_norm=False,
    positions="learned",
    gated=False,
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
)
"""What GPT-2, BERT and BART have in common (Vaswani et al. 2017, with learned positions)."""


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


def head_width(settings: Settings, heads: str, width: str) -> int:
    """What ``width`` is divided into by ``heads``, both names of settings; UserError where it cannot be."""
    count, whole = settings.whole(heads), settings.whole(width)
    if whole % count:
        raise settings.error(heads, f"it does not divide {width}, {whole}")
    return whole // count


def heads(settings: Settings) -> dict[str, int]:
    """Key/value heads and head width, which follow from others where they are not given."""
    given = settings.data.get
    kv_heads = "num_attention_heads" if given("num_key_value_heads") is None else "num_key_value_heads"
    return {
        "kv_heads": settings.whole(kv_heads),
        "head_width": head_width(settings, "num_attention_heads", "hidden_size")
        if given("head_dim") is None
        else settings.whole("head_dim"),
    }


def layer_types(settings: Settings, depth: int) -> list[str] | None:
    """ "layer_types", each LOCAL or GLOBAL, where they are given."""
    kinds = settings.data.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != depth or any(kind not in (LOCAL, GLOBAL) for kind in kinds):
        raise settings.error("layer_types", f"expected {depth} of {LOCAL} and {GLOBAL}")
    return kinds
