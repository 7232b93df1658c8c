"""The families of GGUF files as the core's wirings, and back: settings, names and the order of rows. No weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tfcli.config.model import ModelConfig, RopeScaling, Wiring
from tfcli.errors import UserError
from tfcli.formats.gguf import families as gguf_settings
from tfcli.formats.gguf.families import FAMILIES, GgufConfig, rotary_halves, rotary_pairs

OUTER = {"token_embd": "embed", "output_norm": "norm", "output": "head"}
"""The file's name of a part -> the core's."""
LAYER = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.o",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn.gate",
    "ffn_up": "ffn.up",
    "ffn_down": "ffn.down",
    "post_ffw_norm": "ffn_post_norm",
}
CLOSE = 1e-5
"""Relative difference up to which two numbers are taken for one that was written in other ways."""
SEEN = 1e-6
"""A share of a frequency that is more than rounding to fp32."""


def core_names(config: GgufConfig) -> dict[str, str]:
    """{name in the file: the core's} of every weight of such a model."""
    return {name: core_name(name) for name in gguf_settings.tensor_names(config)}


def core_name(name: str) -> str:
    """The core's name of a tensor: ``blk.3.attn_q.weight`` is ``blocks.3.attention.q.weight``."""
    *block, part, kind = name.split(".")
    if block:
        return f"blocks.{block[1]}.{LAYER[part]}.{kind}"
    return f"{OUTER[part]}.{kind}"


def rows_read(config: GgufConfig, name: str) -> NDArray[np.intp] | None:
    """Which of the file's rows are the core's rows 0, 1, ... of a tensor; None: they stand in order."""
    heads = _rotary_heads(config, name)
    return rotary_halves(heads, config.head_width) if heads else None


def rows_written(config: GgufConfig, name: str) -> NDArray[np.intp] | None:
    """Which of the core's rows are the file's rows 0, 1, ...; None: they stand in order."""
    heads = _rotary_heads(config, name)
    return rotary_pairs(heads, config.head_width) if heads else None


def _rotary_heads(config: GgufConfig, name: str) -> int:
    part = name.split(".")[-2]
    return {"attn_q": config.heads, "attn_k": config.kv_heads}.get(part, 0) if config.family.rotary_pairs else 0


def from_gguf(config: GgufConfig, *, name: str = "the model") -> ModelConfig:
    """The core's configuration of a model in a GGUF file; ``name`` is the file, for messages.

    Raises UserError for capped logits, an irregular pattern of windows, and rotary factors that Llama 3's rule does not
    give.
    """
    if config.logit_softcap is not None:
        raise UserError(f"{name} caps its logits at {config.logit_softcap}", hint="tfcli has no such cap")
    local = config.sliding_window is not None and any(config.sliding_layers)
    gemma, K = config.family.gemma, config.head_width
    wiring = Wiring(
        norm_place="sandwich" if gemma else "pre",
        qk_norm=config.family.qk_norm,
        activation="gelu_tanh" if gemma else "silu",
        qkv_bias=config.qkv_bias,
        out_bias=config.output_bias,
        ffn_bias=config.ffn_bias,
        embed_scale=config.width**0.5 if gemma else 1.0,
        attention_scale=None if config.attention_scale == K**-0.5 else config.attention_scale,
        local_window=config.sliding_window or 0 if local else 0,
        local_every=_every(config.sliding_layers, name) if local else 0,
        local_theta=config.sliding_theta if local else Wiring().local_theta,
        rope_scaling=_scaling(config, name),
    )
    shape = {field: getattr(config, field) for field in _SHAPE}
    return ModelConfig(**shape, rope_theta=config.rope_theta, norm_eps=config.norm_eps, tied=config.tied, wiring=wiring)


_SHAPE = ("vocab_size", "context", "depth", "width", "heads", "kv_heads", "head_width", "ffn_width")


def _every(sliding: tuple[bool, ...], name: str) -> int:
    """``Wiring.local_every`` of layers of which at least one slides."""
    every = sliding.index(False) + 1 if False in sliding else 0
    if any(slides != (every == 0 or (layer + 1) % every != 0) for layer, slides in enumerate(sliding)):
        raise UserError(
            f"{name} has sliding windows in an irregular order of layers",
            hint="tfcli has models whose every n-th layer sees all, and no other order",
        )
    return every


def _scaling(config: GgufConfig, name: str) -> RopeScaling:
    given = config.rope_scaling
    if config.rope_freqs is None:
        if given is None:
            return RopeScaling()
        if given.type == "linear":
            return RopeScaling(kind="linear", factor=given.factor)
        return RopeScaling(
            kind="yarn",
            factor=given.factor,
            original_context=given.original_context,
            beta_fast=given.beta_fast,
            beta_slow=given.beta_slow,
            attention_factor=given.attention_factor,
        )
    scaling = None if given is not None else llama3_scaling(config.rope_freqs, config.head_width, config.rope_theta)
    if scaling is None:
        raise UserError(
            f"{name} stretches its rotary positions in a way that tfcli does not have",
            hint=f"it has Llama 3's rule; {gguf_settings.ROPE_FREQS} holds other numbers",
        )
    return scaling


def frequencies(head_width: int, theta: float) -> NDArray[np.float64]:
    """The K/2 rotary frequencies before any scaling, radians per position."""
    return theta ** -(np.arange(0, head_width, 2) / head_width)


def llama3_factors(scaling: RopeScaling, head_width: int, theta: float) -> NDArray[np.float64]:
    """What Llama 3's rule divides each of the K/2 frequencies by."""
    turns = scaling.original_context * frequencies(head_width, theta) / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (share + (1 - share) / scaling.factor)


def llama3_scaling(factors: tuple[float, ...], head_width: int, theta: float) -> RopeScaling | None:
    """Llama 3's rule with parameters that give these factors (head_width / 2 of them), or None where none do.

    Only ratios of the three lengths count: ``low_freq_factor`` is taken to be 1, as it is in every published model.
    """
    divided = np.asarray(factors, np.float64)
    if np.allclose(divided, divided[0], rtol=CLOSE):
        one = abs(divided[0] - 1) < CLOSE
        return RopeScaling() if one else RopeScaling(kind="linear", factor=float(np.float32(divided[0])))
    factor, kept = float(np.float32(divided.max())), frequencies(head_width, theta)
    share = (1 / divided - 1 / factor) / (1 - 1 / factor)  # of the frequency as it was
    for low, high in _ends(kept, share):
        context = max(1, round(2 * math.pi / low))
        turns = [context * end / (2 * math.pi) for end in (low, high)]
        for digits in (5, 15):  # 1.0, not 1.0000001: the decimals that were meant
            found = RopeScaling(
                kind="llama3",
                factor=factor,
                original_context=context,
                low_freq_factor=round(turns[0], digits),
                high_freq_factor=round(turns[1], digits),
            )
            if np.allclose(llama3_factors(found, head_width, theta), divided, rtol=CLOSE):
                return found
    return None


def _ends(kept: NDArray[np.float64], share: NDArray[np.float64]) -> Iterator[tuple[float, float]]:
    """Frequencies from which on a share of 0 and of 1 is kept; between them it is a line over the frequencies."""
    between = np.flatnonzero((share > SEEN) & (share < 1 - SEEN))
    last, first = kept[share <= SEEN].max(initial=0.0), kept[share >= 1 - SEEN].min(initial=math.inf)
    ends = []
    if len(between) > 1:
        slope, at_zero = np.polyfit(kept[between], share[between], 1)
        ends.append((-at_zero / slope, (1 - at_zero) / slope))
    elif len(between) == 1:
        at, part = kept[between[0]], share[between[0]]
        ends.append((at / (1 + 3 * part), 4 * at / (1 + 3 * part)))  # as published
        width = min((at - last) / part, (first - at) / (1 - part))
        ends.append((at - part * width, at + (1 - part) * width))
    else:
        ends.append((last, first))
    return ((float(low), float(high)) for low, high in ends if 0 < low < high < math.inf)


def to_gguf(config: ModelConfig, *, name: str = "the model") -> GgufConfig:
    """The same model as a family of GGUF files has it: ``from_gguf`` of the result is ``config``, up to spelling.

    Raises UserError for a model that none of them has.
    """
    wiring = config.wiring
    if not wiring.causal or config.encoder_depth:
        raise UserError(
            f"{name} is an encoder{'-decoder' if config.encoder_depth else ''}, for which tfcli writes no GGUF file",
            hint="GGUF files are written of decoders; others can be quantized as they are read: --quantize int8",
        )
    if wiring.norm_place == "sandwich":
        architecture = "gemma3"
    elif wiring.qk_norm:
        architecture = "qwen3"
    else:
        architecture = "qwen2" if wiring.qkv_bias and not (wiring.out_bias or wiring.ffn_bias) else "llama"
    made = _as(architecture, config)
    differences = _differences(config, from_gguf(made, name=name))
    if made.rope_freqs is not None and not FAMILIES[architecture].rotary_pairs:
        differences.append("rope_scaling is 'llama3'")  # llama.cpp reads it in the llama family alone
    if differences:
        raise UserError(
            f"{name} has a wiring that no family of GGUF files has: {', '.join(differences)}",
            hint=f"tfcli writes the families {', '.join(FAMILIES)}",
        )
    return made


def _as(architecture: str, config: ModelConfig) -> GgufConfig:
    wiring, scaling = config.wiring, config.wiring.rope_scaling
    stretched: gguf_settings.RopeScaling | None = None
    if scaling.kind == "linear":
        stretched = gguf_settings.RopeScaling(
            type="linear", factor=scaling.factor, original_context=max(1, round(config.context / scaling.factor))
        )
    elif scaling.kind == "yarn":
        stretched = gguf_settings.RopeScaling(
            type="yarn",
            factor=scaling.factor,
            original_context=scaling.original_context,
            attention_factor=scaling.attention_factor,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
        )
    factors = None
    if scaling.kind == "llama3":
        factors = tuple(llama3_factors(scaling, config.head_width, config.rope_theta).astype(np.float32).tolist())
    local = wiring.local_window > 0 and FAMILIES[architecture].gemma
    return GgufConfig(
        architecture=architecture,
        **{field: getattr(config, field) for field in _SHAPE},
        rope_theta=config.rope_theta,
        norm_eps=config.norm_eps,
        tied=config.tied,
        qkv_bias=wiring.qkv_bias and architecture in ("llama", "qwen2"),  # llama.cpp looks for none in the others
        output_bias=wiring.out_bias and architecture == "llama",
        ffn_bias=wiring.ffn_bias and architecture == "llama",
        rope_scaling=stretched,
        rope_freqs=factors,
        sliding_window=wiring.local_window if local else None,
        sliding_layers=tuple(config.is_local(layer) for layer in range(config.depth)) if local else (),
        sliding_theta=wiring.local_theta,
    )


def _differences(wanted: ModelConfig, made: ModelConfig) -> list[str]:
    """Each setting of a wiring that another lacks, in words. What only writes the same in another way is none."""

    def values(config: ModelConfig) -> dict[str, object]:
        wiring = config.wiring
        scale = config.head_width**-0.5 if wiring.attention_scale is None else wiring.attention_scale
        local = [config.is_local(layer) for layer in range(config.depth)]
        theta = wiring.local_theta if any(local) else None
        scaling: RopeScaling | str = wiring.rope_scaling
        # Factors are compared as numbers: other lengths may give the same.
        if wiring.rope_scaling.kind == "llama3":
            scaling = str(np.round(llama3_factors(wiring.rope_scaling, config.head_width, config.rope_theta), 3))
        own = {"attention_scale": round(scale, 6), "embed_scale": round(wiring.embed_scale, 4), "local_every": local}
        own |= {"local_theta": theta, "rope_scaling": scaling}
        return {**{field.name: getattr(wiring, field.name) for field in dataclasses.fields(wiring)}, **own}

    theirs = values(made)
    return [f"{name} is {value!r}" for name, value in values(wanted).items() if value != theirs[name]]
