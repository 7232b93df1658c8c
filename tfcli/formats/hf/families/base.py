"""Families of models: the names of its tensors and heads, its settings, and what families share of them.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    RopeScaling,
)
from tfcli.formats.hf.settings import Settings, read_rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
"""{name in config.json: tfcli's}."""
WRITTEN: Mapping[Activation, str] = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
LOCAL, GLOBAL = "sliding_attention", "full_attention"

SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "num_hidden_layers": "depth",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn_width",
}
CLASSIC = Architecture(
    norms=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    embedding=EmbeddingConfig(positions="learned"),
    feed_forward=FeedForwardConfig(gated=False, bias=True),
)
"""The settings that GPT-2, BERT and BART share (Vaswani et al. 2017, with learned positions)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The place of a part's numbers in a file, and their conversion to tfcli's."""

    name: str
    transposed: bool = False
    """The weight is stored as (fan_in, fan_out)."""
    part: int = 0
    """Index of this part among the ``parts`` equal ones (rows of tfcli's matrix) that are stored as one tensor."""
    parts: int = 1
    skip: int = 0
    """Unused rows stored before tfcli's: BART's position tables begin with two."""
    plus: float = 0.0
    """Added to what is stored: Gemma stores the weight of a norm minus one."""

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the file of a part of this shape."""
        stored = (shape[0] * self.parts + self.skip, *shape[1:])
        return stored[::-1] if self.transposed else stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """The names of a family's tensors, by tfcli's.

    A table maps a part of ``tfcli.model.transformer.Transformer`` to the part of the file that holds its ``weight`` and
    ``bias``; ``{}`` is the layer. It lists every part that any member of the family has.
    """

    outer: Mapping[str, str | Place]
    layer: Mapping[str, str | Place]
    head: str = "lm_head"
    prefixes: tuple[str, ...] = ("",)
    """Prefixes of all names but the head's, by the class that was saved; the first is written."""
    copies: tuple[str, ...] = ()
    """Suffixes of tensors that repeat the token embedding, in old files."""
    zeros: tuple[str, ...] = ()
    """Tensors that tfcli does not have; they are accepted as long as every number is zero."""
    aliases: Mapping[str, str] | None = None
    """{last part of a name in old files: its name today}."""
    buffers: tuple[str, ...] = ()
    """Suffixes of tensors that hold nothing learned."""
    others: tuple[str, ...] = ()
    """Prefixes of parts that tfcli does not have, such as a classifier; they are reported, not read."""

    def places(self, tensors: Iterable[str], prefix: str) -> dict[str, Place]:
        """Return {tfcli's name: its place} of ``tensors``, with full tensor names."""
        places = {}
        for ours in tensors:
            part, _, kind = ours.rpartition(".")
            if part == "head":
                places[ours] = Place(name=f"{self.head}.{kind}")
                continue
            if "blocks." in part:
                stack, _, rest = part.rpartition("blocks.")
                layer, inner = rest.split(".", 1)
                entry = self.layer[stack + inner]
            else:
                layer, entry = "", self.outer[part]
            place = entry if isinstance(entry, Place) else Place(name=entry)
            name = f"{prefix}{place.name.format(layer)}.{kind}"
            places[ours] = replace(place, name=name, transposed=place.transposed and kind == "weight")
        return places


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNames:
    """A head of a family: the class that has it, the prefix of the trunk's names, and the names of its parts."""

    architecture: str
    prefix: str
    parts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family of transformers: its names, and its settings as tfcli's."""

    model_type: str
    architecture: str
    """The class that is written."""
    names: Names
    heads: Mapping[str, HeadNames] = field(default_factory=dict)
    """{kind of head: its names} of the heads that transformers has for the family."""
    head_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of a head's settings in config.json, for a family that writes some there."""
    poolers: tuple[str, ...] = ()
    """Names, in a model without a head, of the layer that its sequence head begins with."""
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)
    """Settings that are a field of ModelConfig under another name."""
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings for which tfcli supports one value, in addition to ``registry.FIXED``."""
    read: Callable[[Settings], dict[str, Any]]
    """Return the other fields of ModelConfig."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Return the other settings; for a model outside the family, those of another model."""


def classifier(architecture: str, *, prefix: str = "model.") -> Mapping[str, HeadNames]:
    """Return the one head that transformers has for most decoders: a matrix named "score", over the last token."""
    return {"sequence": HeadNames(architecture=architecture, prefix=prefix, parts={"classifier": "score"})}


def head_width(settings: Settings, heads: str, width: str) -> int:
    """Return setting ``width`` divided by setting ``heads``. Raises UserError where it is not a multiple."""
    count, whole = settings.whole(heads), settings.whole(width)
    if whole % count:
        raise settings.error(heads, f"it does not divide {width}, {whole}")
    return whole // count


def heads(settings: Settings) -> dict[str, int]:
    """Return key/value heads and head width, which follow from others where they are not given."""
    given = settings.data.get
    kv_heads = "num_attention_heads" if given("num_key_value_heads") is None else "num_key_value_heads"
    divided = given("head_dim") is None
    width = head_width(settings, "num_attention_heads", "hidden_size") if divided else settings.whole("head_dim")
    return {"kv_heads": settings.whole(kv_heads), "head_width": width}


def layer_types(settings: Settings, depth: int) -> list[str] | None:
    """Return "layer_types", each LOCAL or GLOBAL, None where they are not given."""
    kinds = settings.data.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != depth or any(kind not in (LOCAL, GLOBAL) for kind in kinds):
        raise settings.error("layer_types", f"expected {depth} of {LOCAL} and {GLOBAL}")
    return kinds


def written_types(config: ModelConfig) -> list[str]:
    """Return "layer_types" of a model."""
    return [LOCAL if config.is_local(layer) else GLOBAL for layer in range(config.depth)]


def read_ropes(settings: Settings, ropes: Sequence[Any], theta: float) -> tuple[float, RopeScaling, float]:
    """Return theta (default: ``theta``) and scaling of global layers, and theta of local ones, from their settings."""
    global_theta, scaling = read_rope(settings, ropes[0], theta)
    local_theta, local_scaling = read_rope(settings, ropes[1], 10_000.0)
    if local_scaling.kind != "none":
        raise settings.error("rope_parameters", f"tfcli does not scale those of {LOCAL}")
    return global_theta, scaling, local_theta
