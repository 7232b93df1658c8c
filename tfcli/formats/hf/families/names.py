"""Names of tensors in Hugging Face directories, beside the core's: tables, no code paths.

A table maps a part of ``tfcli.model.transformer.Transformer`` to the part of the file that holds its ``weight`` and
``bias``; ``{}`` is the layer. It lists what any member of the family has: a model takes from it what it has itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace


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
    """The table of one family."""

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


_LLAMA_LAYER = {
    "attention_norm": "layers.{}.input_layernorm",
    "attention.q": "layers.{}.self_attn.q_proj",
    "attention.k": "layers.{}.self_attn.k_proj",
    "attention.v": "layers.{}.self_attn.v_proj",
    "attention.o": "layers.{}.self_attn.o_proj",
    "attention.q_norm": "layers.{}.self_attn.q_norm",
    "attention.k_norm": "layers.{}.self_attn.k_norm",
    "ffn_norm": "layers.{}.post_attention_layernorm",
    "ffn.gate": "layers.{}.mlp.gate_proj",
    "ffn.up": "layers.{}.mlp.up_proj",
    "ffn.down": "layers.{}.mlp.down_proj",
}

# Llama, Mistral, Qwen2 and Qwen3.
LLAMA = Names(
    outer={"embed": "embed_tokens", "norm": "norm"},
    layer=_LLAMA_LAYER,
    prefixes=("model.", ""),
    buffers=("rotary_emb.inv_freq",),
    others=("score.",),
)

GEMMA = Names(
    outer={"embed": "embed_tokens", "norm": Place(name="norm", plus=1.0)},
    layer=_LLAMA_LAYER
    | {
        ours: Place(name=f"layers.{{}}.{theirs}", plus=1.0)
        for ours, theirs in {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "attention.q_norm": "self_attn.q_norm",
            "attention.k_norm": "self_attn.k_norm",
            "ffn_norm": "pre_feedforward_layernorm",
            "ffn_post_norm": "post_feedforward_layernorm",
        }.items()
    },
    prefixes=("model.", ""),
    buffers=("rotary_emb.inv_freq",),
    others=("score.",),
)

GPT2 = Names(
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

BERT = Names(
    outer={
        "embed": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
    },
    layer={
        "attention.q": "encoder.layer.{}.attention.self.query",
        "attention.k": "encoder.layer.{}.attention.self.key",
        "attention.v": "encoder.layer.{}.attention.self.value",
        "attention.o": "encoder.layer.{}.attention.output.dense",
        "attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "ffn.up": "encoder.layer.{}.intermediate.dense",
        "ffn.down": "encoder.layer.{}.output.dense",
        "ffn_norm": "encoder.layer.{}.output.LayerNorm",
    },
    prefixes=("", "bert."),
    aliases={"gamma": "weight", "beta": "bias"},
    buffers=("embeddings.position_ids",),
    others=("cls.", "classifier.", "qa_outputs.", "pooler.", "bert.pooler."),
)

MODERNBERT = Names(
    outer={"embed": "embeddings.tok_embeddings", "embed_norm": "embeddings.norm", "norm": "final_norm"},
    layer={
        "attention_norm": "layers.{}.attn_norm",
        "attention.q": Place(name="layers.{}.attn.Wqkv", part=0, parts=3),
        "attention.k": Place(name="layers.{}.attn.Wqkv", part=1, parts=3),
        "attention.v": Place(name="layers.{}.attn.Wqkv", part=2, parts=3),
        "attention.o": "layers.{}.attn.Wo",
        "ffn_norm": "layers.{}.mlp_norm",
        "ffn.gate": Place(name="layers.{}.mlp.Wi", part=0, parts=2),
        "ffn.up": Place(name="layers.{}.mlp.Wi", part=1, parts=2),
        "ffn.down": "layers.{}.mlp.Wo",
    },
    head="decoder",
    prefixes=("", "model."),
    buffers=("rotary_emb.inv_freq",),
    others=("head.", "decoder.bias", "classifier."),
)

_MBART_PARTS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "cross.q": "encoder_attn.q_proj",
    "cross.k": "encoder_attn.k_proj",
    "cross.v": "encoder_attn.v_proj",
    "cross.o": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
    "ffn.up": "fc1",
    "ffn.down": "fc2",
    "ffn_norm": "final_layer_norm",
}

# The decoder's parts, and the encoder's, whose names begin with "encoder." on both sides.
MBART = Names(
    outer={"embed": "shared"}
    | {
        f"{ours}{part}": Place(name=f"{theirs}.{name}", skip=2 if part == "positions" else 0)
        for ours, theirs in {"": "decoder", "encoder.": "encoder"}.items()
        for part, name in {
            "positions": "embed_positions",
            "embed_norm": "layernorm_embedding",
            "norm": "layer_norm",
        }.items()
    },
    layer={
        f"{ours}{part}": f"{theirs}.layers.{{}}.{name}"
        for ours, theirs in {"": "decoder", "encoder.": "encoder"}.items()
        for part, name in _MBART_PARTS.items()
    },
    prefixes=("model.", ""),
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    zeros=("final_logits_bias",),
)
