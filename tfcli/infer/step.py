"""The decode step in C++: one new token for each of a few rows, all layers, one call.

Decoding one token at a time is bound by reading the weights; PyTorch's overhead (a few microseconds for each of some
three hundred operators) is half of the time of a small model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tfcli.model.cache import KVCache
from tfcli.model.layers import rope_frequencies
from tfcli.model.lora import adapters
from tfcli.model.transformer import Transformer
from tfcli.native import ops
from tfcli.native.ops import MatrixStruct, address


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attention", "attention_post", "ffn", "ffn_post", "q_norm", "k_norm")


class _Layer(ctypes.Structure):
    _fields_ = [(name, MatrixStruct) for name in MATRICES] + [(name, _Norm) for name in NORMS] + [
        ("local", ctypes.c_int32), ("pad", ctypes.c_int32),
    ]  # fmt: skip


INTEGERS = (
    "depth", "width", "heads", "kv_heads", "head_width", "ffn_width", "vocab", "activation",
    "layer_norm", "window", "rope", "exact",
)  # fmt: skip
FLOATS = ("eps", "embed_scale", "attention_scale", "rope_factor")


class _Model(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int32) for name in INTEGERS]
        + [(name, ctypes.c_float) for name in FLOATS]
        + [("frequencies", ctypes.c_void_p), ("local_frequencies", ctypes.c_void_p)]
        + [("embed", MatrixStruct), ("positions", MatrixStruct), ("head", MatrixStruct), ("norm", _Norm)]
        + [("layers", ctypes.POINTER(_Layer))]
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int32) for name in ("bf16", "pad")]
        + [(name, ctypes.c_int64) for name in ("row_stride", "head_stride")]
        + [(name, ctypes.POINTER(ctypes.c_void_p)) for name in ("keys", "values")]
    )


def supports(model: Transformer) -> bool:
    """Return whether ``Stepper`` can run a model: a decoder on the CPU in fp32 or bf16, with norms before its parts."""
    arch = model.config.architecture
    return (
        model.device.type == "cpu"
        and arch.causal
        and arch.norms.place != "post"
        and not arch.embedding.token_types
        and not arch.embedding.norm
        and not model.config.encoder_depth
        and not adapters(model)
        and ops.ready()
        and all(
            ops.library()[0].tfcli_sizes(index) == ctypes.sizeof(structure)
            for index, structure in enumerate((MatrixStruct, _Layer, _Model, _Cache))
        )
    )


class Stepper:
    """A model prepared for ``tfcli_step``: the addresses of its weights, and copies of norms and biases in fp32.

    ``exact`` keeps activations in fp32; without it they are rounded to bf16 before products with bf16 and quantized
    weights, where the processor multiplies bf16. The model's weights must not change while a stepper is used.
    """

    def __init__(self, model: Transformer, *, exact: bool) -> None:
        self._keep: list[Any] = [model]
        config, arch = model.config, model.config.architecture
        self._vocab = config.vocab_size
        layers = (_Layer * config.depth)()
        for index, block in enumerate(model.blocks):
            self._fill(layers[index], block, config.is_local(index))
        self._layers = layers
        scale = config.head_width**-0.5 if arch.attention.scale is None else arch.attention.scale
        scaling = arch.attention.rope_scaling
        self._model = _Model(
            depth=config.depth, width=config.width, heads=config.heads, kv_heads=config.kv_heads,
            head_width=config.head_width, ffn_width=config.ffn_width, vocab=config.vocab_size,
            activation=ops.ACTIVATIONS[arch.feed_forward.activation], layer_norm=arch.norms.kind == "layer",
            window=arch.windows.size, rope=arch.embedding.positions == "rope", exact=exact, eps=config.norm_eps,
            embed_scale=arch.embedding.scale, attention_scale=scale,
            rope_factor=scaling.attention_factor if scaling.kind == "yarn" else 1.0,
            frequencies=self._floats(rope_frequencies(config.head_width, config.rope_theta, scaling)),
            local_frequencies=self._floats(rope_frequencies(config.head_width, arch.windows.theta)),
            embed=self._matrix(model.embed), head=self._matrix(model.head), norm=self._norm(model.norm), layers=layers,
        )  # fmt: skip
        if arch.embedding.positions == "learned":
            self._model.positions = self._matrix(model.positions)

    def _fill(self, layer: _Layer, block: Any, local: bool) -> None:
        parts = (block, block.attention, block.ffn)
        modules = {name: module for part in parts for name, module in part.named_children()}
        for name in MATRICES:
            if name in modules:  # a feed-forward layer may have no gate
                setattr(layer, name, self._matrix(modules[name]))
        for name in NORMS:
            if (module := f"{name.removesuffix('_norm')}_norm") in modules:
                setattr(layer, name, self._norm(modules[module]))
        layer.local = local

    def _matrix(self, layer: Any) -> MatrixStruct:
        plain = isinstance(layer, nn.Embedding)
        struct: MatrixStruct = MatrixStruct.plain(layer.weight) if plain else layer.describe()
        self._keep.append(struct)
        return struct

    def _floats(self, tensor: Tensor | None) -> int | None:
        self._keep.append(None if tensor is None else tensor.detach().float().contiguous())
        return address(self._keep[-1])

    def _norm(self, norm: nn.Module) -> _Norm:
        return _Norm(weight=self._floats(norm.weight), bias=self._floats(getattr(norm, "bias", None)))  # type: ignore[arg-type]

    def step(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """Append one token to each row of the cache and advance it; return the logits (B, V) in fp32."""
        lengths = cache.lengths
        if any(not 0 <= id < self._vocab for id in tokens):
            raise IndexError("a token is not in the vocabulary")
        cache.reserve(max(lengths) + 1)
        depth, B = self._model.depth, len(tokens)
        keys, values = [cache.keys(i) for i in range(depth)], [cache.values(i) for i in range(depth)]
        Pointers, (row_stride, head_stride, _, _) = ctypes.c_void_p * depth, keys[0].stride()
        where = _Cache(
            bf16=int(keys[0].dtype == torch.bfloat16), row_stride=row_stride, head_stride=head_stride,
            keys=Pointers(*map(address, keys)), values=Pointers(*map(address, values)),
        )  # fmt: skip
        logits = torch.empty(B, self._vocab)
        Integers = ctypes.c_int32 * B
        ops.library()[0].tfcli_step(
            ctypes.byref(self._model), ctypes.byref(where), B, Integers(*tokens), Integers(*lengths), address(logits),
            torch.get_num_threads(),
        )  # fmt: skip
        cache.advance(1)
        return logits
