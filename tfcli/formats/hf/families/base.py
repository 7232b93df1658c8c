"""What a family of models is: the names of its tensors and heads, its settings, and what families share of them.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
)
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
CLASSIC = Architecture(
    norms=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    embedding=EmbeddingConfig(positions="learned"),
    feed_forward=FeedForwardConfig(gated=False, bias=True),
)
"""What GPT-2, BERT and BART have in common (Vaswani et al. 2017, with learned positions)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a part's numbers lie in a file, and how they become the core's."""

    name: str
    transposed: bool = False
    """The weight is stored as (fan_in, fan_out)."""
    part: int = 0
    """Which of ``parts`` equal parts of what is stored: of the rows of the core's matrix."""
    parts: int = 1
    skip: int = 0
    """Rows that are stored before the core's and hold nothing: BART's tables of positions begin with two."""
    plus: float = 0.0
    """Added to what is stored: Gemma stores a norm's weight less one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """The names of a family's tensors, beside the core's.

    A table maps a part of ``tfcli.model.transformer.Transformer`` to the part of the file that holds its ``weight`` and
    ``bias``; ``{}`` is the layer. It lists what any member of the family has: a model takes from it what it has itself.
    """

    outer: Mapping[str, str | Place]
    layer: Mapping[str, str | Place]
    head: str = "lm_head"
    prefixes: tuple[str, ...] = ("",)
    """Before all names but the head's, by the class that was saved; the first is written."""
    copies: tuple[str, ...] = ()
    """Ends of names of tensors that repeat the token embedding, in old files."""
    zeros: tuple[str, ...] = ()
    """Names of tensors that the core has not; they may be there as long as every number is zero."""
    aliases: Mapping[str, str] | None = None
    """Last parts of names in old files: what they are called today."""
    buffers: tuple[str, ...] = ()
    """Ends of names of tensors that hold nothing learned."""
    others: tuple[str, ...] = ()
    """Beginnings of names of parts that the core does not have, such as a classifier; they are reported, not read."""

    def places(self, tensors: Iterable[str], prefix: str) -> dict[str, Place]:
        """{the core's name: its place} for the core's ``tensors``, with whole names of tensors."""
        found = {}
        for ours in tensors:
            part, _, kind = ours.rpartition(".")
            if part == "head":
                found[ours] = Place(name=f"{self.head}.{kind}")
                continue
            if "blocks." in part:
                stack, _, rest = part.rpartition("blocks.")
                layer, inner = rest.split(".", 1)
                entry = self.layer[stack + inner]
            else:
                layer, entry = "", self.outer[part]
            place = entry if isinstance(entry, Place) else Place(name=entry)
            name = f"{prefix}{place.name.format(layer)}.{kind}"
            found[ours] = replace(place, name=name, transposed=place.transposed and kind == "weight")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNames:
    """A head of a family: the class that has it, before what the names of the trunk begin, and its parts' names."""

    architecture: str
    prefix: str
    parts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family of transformers: its names, and its settings as the core's."""

    model_type: str
    architecture: str
    """The class that is written."""
    names: Names
    heads: Mapping[str, HeadNames] = field(default_factory=dict)
    """{kind of head: its names} of the heads that transformers has for the family."""
    head_defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a config.json leaves out of a head's settings, of a family that writes some there."""
    poolers: tuple[str, ...] = ()
    """Where a model without a head has the layer that its sequence head begins with."""
    sizes: Mapping[str, str]
    """Settings that are a field of ModelConfig under another name."""
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    """Settings that the core has one value for."""
    read: Callable[[Settings], dict[str, Any]]
    """The other fields of ModelConfig."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """The other settings; of a model that the family has not, settings of another."""


def classifier(architecture: str, *, prefix: str = "model.") -> Mapping[str, HeadNames]:
    """The one head that transformers has for most decoders: a matrix called "score", over the last token."""
    return {"sequence": HeadNames(architecture=architecture, prefix=prefix, parts={"classifier": "score"})}


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
