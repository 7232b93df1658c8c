"""The decode step in C++ (``native.cpp``): compiled for this machine once, in seconds, and called as one function.

Decoding one token at a time is bound by reading the weights; what PyTorch adds (a few microseconds for each of some
three hundred operators) is half of the time of a small model. One call does the whole step instead. Where there is no
C++ compiler, ``ready`` is False, ``unavailable`` says why, and everything runs as PyTorch operators.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tfcli.model.layers import rope_frequencies

if TYPE_CHECKING:
    from tfcli.model.cache import KVCache
    from tfcli.model.transformer import Transformer

PAGE = 2 << 20
"""Bytes of a large page."""
SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
KINDS = {torch.float32: 1, torch.bfloat16: 2}
QUANTIZED = {4: 3, 8: 4}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


class Quantized(Protocol):
    """What this file needs to know of ``tfcli.model.quant.QuantMatrix``."""

    bits: Literal[4, 8]
    rows: int
    columns: int
    codes: Tensor
    scale: Tensor
    low: Tensor | None
    bias: Tensor | None


class _Matrix(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int32) for name in ("kind", "rows", "cols", "groups")]
        + [(name, ctypes.c_void_p) for name in ("data", "scale", "low", "bias")]
    )  # fmt: skip


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attention", "attention_post", "ffn", "ffn_post", "q_norm", "k_norm")


class _Layer(ctypes.Structure):
    _fields_ = (
        [(name, _Matrix) for name in MATRICES]
        + [(name, _Norm) for name in NORMS]
        + [("local", ctypes.c_int32), ("pad", ctypes.c_int32)]
    )


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
        + [("embed", _Matrix), ("positions", _Matrix), ("head", _Matrix), ("norm", _Norm)]
        + [("layers", ctypes.POINTER(_Layer))]
    )


class _Cache(ctypes.Structure):
    _fields_ = [
        ("bf16", ctypes.c_int32),
        ("pad", ctypes.c_int32),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
    ]


def ready() -> bool:
    """Whether the compiled step is there, compiling it where that was never done on this machine."""
    return _library()[0] is not None


def unavailable() -> str | None:
    """Why the compiled step is not there, in words; None where it is."""
    return _library()[1]


def fast(dtype: torch.dtype) -> bool:
    """Whether products of any number of rows are as fast here as PyTorch's: bf16 where the processor multiplies it."""
    return dtype == torch.bfloat16 and ready() and bool(_library()[0].tfcli_bf16_products())


def supports(model: Transformer) -> bool:
    """Whether ``Stepper`` can run this model: a decoder on the CPU in fp32 or bf16, with norms before its parts."""
    wiring = model.config.wiring
    return (
        model.device.type == "cpu"
        and wiring.causal
        and wiring.norm_place != "post"
        and not wiring.token_types
        and not wiring.embed_norm
        and ready()
    )


def linear(matrix: Quantized, x: Tensor) -> Tensor:
    """``x W^T + bias`` for rows (..., columns) on the CPU, in the dtype of ``x``."""
    library, _ = _library()
    keep: list[Any] = []
    flat = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = torch.empty(len(flat), matrix.rows)
    exact = int(x.dtype == torch.float32)
    library.tfcli_linear(
        ctypes.byref(_matrix(matrix, keep)), len(flat), _at(flat), _at(y), exact, torch.get_num_threads()
    )
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def widened(matrix: Quantized, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    """All rows of a quantized matrix, or those of ``index`` (N,), as fp32 or bf16."""
    library, _ = _library()
    keep: list[Any] = []
    if index is not None:
        index = index.to(torch.int64).contiguous()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < matrix.rows:
            raise IndexError(f"row {int(index.max())} of {matrix.rows}")
    count = matrix.rows if index is None else len(index)
    out = torch.empty(count, matrix.columns, dtype=dtype)
    rows = None if index is None else _at(index)
    library.tfcli_unpack(
        ctypes.byref(_matrix(matrix, keep)),
        count,
        rows,
        _at(out),
        int(dtype == torch.bfloat16),
        torch.get_num_threads(),
    )
    return out


def pick(logits_BV: Tensor, ids: Sequence[int] | None = None) -> tuple[list[int], list[float]]:
    """The likeliest token of each row of fp32 logits on the CPU, the first of equals, and its log-probability.

    With ``ids`` the log-probability of these. A row with a number that is not finite has the id -1.
    """
    library, _ = _library()
    B, V = logits_BV.shape
    chosen = (ctypes.c_int32 * B)(*(ids or ()))
    logprobs = (ctypes.c_float * B)()
    library.tfcli_pick(_at(logits_BV), B, V, chosen, logprobs, int(ids is not None))
    return list(chosen), list(logprobs)


def settle(model: nn.Module) -> None:
    """Move a model's weights to one stretch of memory in large pages, each tensor where the one before it ends.

    Reading all weights for every token is what decoding is; with pages of 4 kB that took up to three times as long
    here. Parameters and buffers stay the same objects. Nothing happens where the system has no such pages, or where
    the weights are small.
    """
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"}
    total = sum(_stretch(t) for t in tensors.values())
    if total < 4 * PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    memory = mmap.mmap(-1, total + PAGE)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return
    room = torch.frombuffer(memory, dtype=torch.uint8)
    at, moved = -room.data_ptr() % PAGE, 0
    by_place: dict[int, list[Tensor]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        by_place.setdefault(tensor.data_ptr(), []).append(tensor)
    for place, old in tensors.items():
        new = room[at : at + old.numel() * old.element_size()].view(old.dtype).view(old.shape)
        new.copy_(old.detach())
        at, moved = at + _stretch(old), moved + _stretch(old)
        for tensor in by_place[place]:
            tensor.data = new
        if moved > 16 * PAGE:
            _give_back()
            moved = 0
    _give_back()


def _stretch(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // 64) * 64


def _give_back() -> None:
    """Hand freed memory back to the system (glibc), so that what was moved is not held twice."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Stepper:
    """A model ready for ``tfcli_step``: where its weights lie, and nothing of its own but norms and biases in fp32.

    ``exact`` keeps activations in fp32; without it they are rounded to bf16 before products with bf16 and quantized
    weights, where the processor multiplies bf16. The model's weights must stay as they are while a stepper is used.
    """

    def __init__(self, model: Transformer, *, exact: bool) -> None:
        self._keep: list[Any] = [model]
        config, wiring = model.config, model.config.wiring
        self._vocab = config.vocab_size
        layers = (_Layer * config.depth)()
        for index, block in enumerate(model.blocks):
            self._fill(layers[index], block, config.is_local(index))
        self._layers = layers
        scale = config.head_width**-0.5 if wiring.attention_scale is None else wiring.attention_scale
        scaling = wiring.rope_scaling
        frequencies = rope_frequencies(config.head_width, config.rope_theta, scaling)
        local = rope_frequencies(config.head_width, wiring.local_theta)
        self._model = _Model(
            depth=config.depth,
            width=config.width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            ffn_width=config.ffn_width,
            vocab=config.vocab_size,
            activation=ACTIVATIONS[wiring.activation],
            layer_norm=wiring.norm == "layer",
            window=wiring.local_window,
            rope=wiring.positions == "rope",
            exact=exact,
            eps=config.norm_eps,
            embed_scale=wiring.embed_scale,
            attention_scale=scale,
            rope_factor=scaling.attention_factor if scaling.kind == "yarn" else 1.0,
            frequencies=self._floats(frequencies),
            local_frequencies=self._floats(local),
            embed=_matrix(model.embed, self._keep),
            head=_matrix(model.head, self._keep),
            norm=self._norm(model.norm),
            layers=layers,
        )
        if wiring.positions == "learned":
            self._model.positions = _matrix(model.positions, self._keep)

    def _fill(self, layer: _Layer, block: Any, local: bool) -> None:
        attention, ffn = block.attention, block.ffn
        for name in ("q", "k", "v", "o"):
            setattr(layer, name, _matrix(getattr(attention, name), self._keep))
        for name in ("gate", "up", "down"):
            if hasattr(ffn, name):
                setattr(layer, name, _matrix(getattr(ffn, name), self._keep))
        layer.attention, layer.ffn = self._norm(block.attention_norm), self._norm(block.ffn_norm)
        for name in ("attention_post", "ffn_post"):
            if hasattr(block, name + "_norm"):
                setattr(layer, name, self._norm(getattr(block, name + "_norm")))
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                setattr(layer, name, self._norm(getattr(attention, name)))
        layer.local = local

    def _floats(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._keep.append(tensor.detach().float().contiguous())
        return _at(self._keep[-1])

    def _norm(self, norm: nn.Module) -> _Norm:
        return _Norm(weight=self._floats(norm.weight), bias=self._floats(getattr(norm, "bias", None)))  # type: ignore[arg-type]

    def step(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """Append one token to each row of the cache: its logits (B, V) in fp32; the cache is advanced by one."""
        lengths = cache.lengths
        if any(not 0 <= id < self._vocab for id in tokens):
            raise IndexError("a token is not in the vocabulary")
        cache.reserve(max(lengths) + 1)
        depth, B = self._model.depth, len(tokens)
        keys, values = [cache.keys(i) for i in range(depth)], [cache.values(i) for i in range(depth)]
        Pointers = ctypes.c_void_p * depth
        where = _Cache(
            bf16=int(keys[0].dtype == torch.bfloat16),
            row_stride=keys[0].stride(0),
            head_stride=keys[0].stride(1),
            keys=Pointers(*map(_at, keys)),
            values=Pointers(*map(_at, values)),
        )
        logits = torch.empty(B, self._vocab)
        Integers = ctypes.c_int32 * B
        _library()[0].tfcli_step(
            ctypes.byref(self._model), ctypes.byref(where), B, Integers(*tokens), Integers(*lengths), _at(logits),
            torch.get_num_threads(),
        )  # fmt: skip
        cache.advance(1)
        return logits


def _at(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _matrix(layer: Any, keep: list[Any]) -> _Matrix:
    """Where a layer's matrix lies; what had to be made for it goes to ``keep``."""
    layer = getattr(layer, "matrix", layer)  # what a quantized embedding looks its rows up in
    if hasattr(layer, "codes"):
        matrix = _Matrix(
            kind=QUANTIZED[layer.bits], rows=layer.rows, cols=layer.columns, groups=layer.scale.shape[1],
            data=_at(layer.codes), scale=_at(layer.scale), low=None if layer.low is None else _at(layer.low),
        )  # fmt: skip
    else:
        weight = layer.weight.detach()
        if not weight.is_contiguous():
            weight = weight.contiguous()
        keep.append(weight)
        matrix = _Matrix(kind=KINDS[weight.dtype], rows=weight.shape[0], cols=weight.shape[1], data=_at(weight))
    bias = getattr(layer, "bias", None)
    if bias is not None:
        keep.append(bias.detach().float().contiguous())
        matrix.bias = _at(keep[-1])
    return matrix


@functools.cache
def _library() -> tuple[Any, str | None]:
    """(the loaded library, None), or (None, why not)."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return None, "there is no C++ compiler on this machine"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        return None, f"{compiler} failed: {said[0] if said else 'without a word'}"
    except OSError as error:
        return None, str(error)
    if [library.tfcli_sizes(i) for i in range(4)] != [ctypes.sizeof(s) for s in (_Matrix, _Layer, _Model, _Cache)]:
        return None, f"{compiler} lays out structures in another way"
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    library.tfcli_step.argtypes = [pointer, pointer, integer, pointer, pointer, pointer, integer]
    library.tfcli_linear.argtypes = [pointer, integer, pointer, pointer, integer, integer]
    library.tfcli_unpack.argtypes = [pointer, integer, pointer, pointer, integer, integer]
    library.tfcli_pick.argtypes = [pointer, integer, integer, pointer, pointer, integer]
    for name in ("tfcli_step", "tfcli_linear", "tfcli_unpack", "tfcli_pick"):
        getattr(library, name).restype = None
    return library, None


def _compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor, from the user's cache or made now."""
    folder = _cache_folder()
    path = folder / f"native-{_fingerprint(compiler)}.so"
    if not path.is_file():
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", name], check=True, capture_output=True, text=True)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    return path


def _cache_folder() -> Path:
    """The user's own cache, which nobody else can write to; a code file is loaded from nowhere else."""
    base = os.environ.get("XDG_CACHE_HOME") or (
        Path.home() / "Library" / "Caches" if sys.platform == "darwin" else Path.home() / ".cache"
    )
    folder = Path(base) / "tfcli"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written to by others; it should be yours alone")
    return folder


def _fingerprint(compiler: str) -> str:
    about = Path(compiler).resolve().stat()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            processor = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = ""
    parts = (
        SOURCE.read_text(encoding="utf-8"),
        *FLAGS,
        f"{compiler} {about.st_size} {about.st_mtime}",
        sys.platform,
        processor,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
