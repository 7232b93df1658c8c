"""The functions of ``native.cpp`` on tensors: what PyTorch's CPU build does slowly or not at all, for inference.

Products by codes as they are stored, norms, rotations and activations in one pass over memory. The library is compiled
for this machine at first use (``native_build``). Where there is no C++ compiler, ``ready`` is False, ``unavailable``
says why, and everything runs as PyTorch operators.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tfcli.native import library as native_build

KINDS = {torch.float32: 1, torch.bfloat16: 2}
QUANTIZED = {4: 3, 8: 4}
TILED = 5
LONG = 256
"""Causal queries from which on PyTorch's attention wins where the processor has AMX; below it is slower in batches."""
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


class InTiles(Protocol):
    """What this file needs to know of ``QuantMatrix`` and ``PackedMatrix`` of ``tfcli.model.quant.matrix``."""

    rows: int
    columns: int


class Matrix(ctypes.Structure):
    """``Matrix`` of native.cpp."""

    _fields_ = (
        [(name, ctypes.c_int32) for name in ("kind", "rows", "cols", "groups")]
        + [(name, ctypes.c_void_p) for name in ("data", "scale", "low", "bias")]
    )  # fmt: skip


def ready() -> bool:
    """Whether the compiled step is there, compiling it where that was never done on this machine."""
    return library()[0] is not None


def unavailable() -> str | None:
    """Why the compiled step is not there, in words; None where it is."""
    return library()[1]


def fast(dtype: torch.dtype) -> bool:
    """Whether products of any number of rows are as fast here as PyTorch's: bf16 where the processor multiplies it."""
    return dtype == torch.bfloat16 and ready() and bool(library()[0].tfcli_bf16_products())


def int8(dtype: torch.dtype) -> bool:
    """Whether ``linear_int8`` is there for inputs of ``dtype``: bf16 where the processor multiplies 8 by 8 bits."""
    return fast(dtype) and bool(library()[0].tfcli_int8_products())


def linear_int8(matrix: InTiles, x: Tensor) -> Tensor:
    """``x W^T + bias`` for rows (..., columns) of bf16 that are rounded to 8 bits, by a centred 8-bit matrix.

    Each 32 columns of a row share a scale, its greatest magnitude over 127. ``columns`` is a multiple of 32.
    """
    lib, _ = library()
    keep: list[Any] = []
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(len(flat), matrix.rows, dtype=x.dtype)
    described = ctypes.byref(matrix_of(matrix, keep))
    lib.tfcli_linear_int8(described, len(flat), address(flat), address(y), torch.get_num_threads())
    return y.view(*x.shape[:-1], matrix.rows)


def linear(matrix: InTiles, x: Tensor) -> Tensor:
    """``x W^T + bias`` for rows (..., columns) on the CPU, in the dtype of ``x``."""
    lib, _ = library()
    keep: list[Any] = []
    flat = x.reshape(-1, x.shape[-1])
    described = ctypes.byref(matrix_of(matrix, keep))
    if len(flat) > 1 and not x.shape[-1] % 32 and fast(x.dtype):
        flat = flat.contiguous()
        y = torch.empty(len(flat), matrix.rows, dtype=x.dtype)
        lib.tfcli_linear_bf16(described, len(flat), address(flat), address(y), torch.get_num_threads())
    else:
        flat = flat.float().contiguous()
        y = torch.empty(len(flat), matrix.rows)
        exact = int(x.dtype == torch.float32)
        lib.tfcli_linear(described, len(flat), address(flat), address(y), exact, torch.get_num_threads())
    return y.view(*x.shape[:-1], matrix.rows).to(x.dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of ``x``, bf16 or fp32."""
    lib, _ = library()
    x = x.contiguous()
    y = torch.empty_like(x)
    wide = weight.float()
    lib.tfcli_norm(
        address(x), address(y), x.numel() // x.shape[-1], x.shape[-1], address(wide), eps,
        int(x.dtype == torch.bfloat16), torch.get_num_threads(),
    )  # fmt: skip
    return y


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, weight_K: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """QK-norm where there is a weight, then rotary positions; ``cos`` and ``sin`` are (B or none, T, 1, K/2)."""
    lib, _ = library()
    x = x_BTHK.contiguous()
    y = torch.empty_like(x)
    B, T, H, K = x.shape
    wide = None if weight_K is None else weight_K.float()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    lib.tfcli_rotate(
        address(x), address(y), B * T, H, K, None if wide is None else address(wide), eps, address(cos), address(sin),
        cos.numel() // (K // 2), int(x.dtype == torch.bfloat16), torch.get_num_threads(),
    )  # fmt: skip
    return y


def activate(gate: Tensor | None, up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up``, or ``act(up)`` without a gate."""
    lib, _ = library()
    up = up.contiguous()
    gate = None if gate is None else gate.contiguous()
    y = torch.empty_like(up)
    lib.tfcli_activate(
        None if gate is None else address(gate), address(up), address(y), up.numel(), ACTIVATIONS[activation],
        int(up.dtype == torch.bfloat16), torch.get_num_threads(),
    )  # fmt: skip
    return y


def attends(q_BHTK: Tensor, k_BGSK: Tensor, mask: Tensor | None, *, causal: bool) -> bool:
    """Whether ``attend`` takes these: many queries as ``attends_from`` has them, without a mask for each of them."""
    if mask is not None and (mask.dtype == torch.bool or mask.shape[:3] != (len(q_BHTK), 1, 1)):
        return False
    if k_BGSK.dtype != q_BHTK.dtype or any(t.stride(3) != 1 for t in (q_BHTK, k_BGSK)):
        return False
    return attends_from(q_BHTK, q_BHTK.shape[3], queries=q_BHTK.shape[2], causal=causal)


def attends_from(x: Tensor, head_width: int, *, queries: int, causal: bool) -> bool:
    """Whether ``attend`` takes queries and keys made of ``x``: bf16 in inference mode, heads of 32, 64, ... 256.

    Long causal ones not where the processor has AMX: PyTorch's kernel takes a third to two thirds of the time there.
    """
    if head_width % 32 or head_width > 256 or not (serves(x) and fast(x.dtype)):
        return False
    return not (causal and queries >= LONG and library()[0].tfcli_bf16_tiles())


def attend(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, scale: float, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """``softmax(q k^T scale + mask) v`` -> (B, H, T, K); causal queries see the keys up to S - T + t.

    ``mask`` (B, 1, 1, S), for all queries of a row alike.
    """
    lib, _ = library()
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1:3]
    out_BTHK = torch.empty(B, T, H, K, dtype=q_BHTK.dtype)
    out = out_BTHK.transpose(1, 2)
    strides = [stride for t in (q_BHTK, k_BGSK, v_BGSK, out) for stride in t.stride()[:3]]
    bias = None if mask is None else mask.reshape(B, S).float().contiguous()
    lib.tfcli_attend(
        address(q_BHTK), address(k_BGSK), address(v_BGSK), address(out), B, H, G, T, S, K,
        (ctypes.c_int64 * 12)(*strides), scale, None if bias is None else address(bias), int(causal), S - T,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def serves(x: Tensor) -> bool:
    """Whether the functions here take ``x``: in inference mode, on the CPU, in bf16 or fp32, where they are ready."""
    return (
        torch.is_inference_mode_enabled()
        and x.device.type == "cpu"
        and x.dtype in KINDS
        and not torch.compiler.is_compiling()
        and ready()
    )


def dequantized(matrix: InTiles, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    """All rows of a matrix in tiles, or those of ``index`` (N,), as fp32 or bf16."""
    lib, _ = library()
    keep: list[Any] = []
    if index is not None:
        index = index.to(torch.int64).contiguous()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < matrix.rows:
            raise IndexError(f"row {int(index.max())} of {matrix.rows}")
    count = matrix.rows if index is None else len(index)
    out = torch.empty(count, matrix.columns, dtype=dtype)
    rows = None if index is None else address(index)
    lib.tfcli_unpack(
        ctypes.byref(matrix_of(matrix, keep)),
        count,
        rows,
        address(out),
        int(dtype == torch.bfloat16),
        torch.get_num_threads(),
    )
    return out


def pick(logits_BV: Tensor, ids: Sequence[int] | None = None) -> tuple[list[int], list[float]]:
    """The likeliest token of each row of fp32 logits on the CPU, the first of equals, and its log-probability.

    With ``ids`` the log-probability of these. A row with a number that is not finite has the id -1.
    """
    lib, _ = library()
    B, V = logits_BV.shape
    chosen = (ctypes.c_int32 * B)(*(ids or ()))
    logprobs = (ctypes.c_float * B)()
    lib.tfcli_pick(address(logits_BV), B, V, chosen, logprobs, int(ids is not None), torch.get_num_threads())
    return list(chosen), list(logprobs)


def tile(weight: Tensor, tiles: Tensor) -> None:
    """A bf16 matrix (rows, columns) into the ``tiles`` of a ``tfcli.model.quant.matrix.PackedMatrix``."""
    lib, _ = library()
    weight = weight.contiguous()
    plain = Matrix(kind=KINDS[weight.dtype], rows=weight.shape[0], cols=weight.shape[1], data=address(weight))
    lib.tfcli_tile(ctypes.byref(plain), address(tiles), torch.get_num_threads())


def address(tensor: Tensor) -> int:
    """Where a tensor's numbers begin."""
    return tensor.data_ptr()


def matrix_of(layer: Any, keep: list[Any]) -> Matrix:
    """Where a layer's matrix lies; what had to be made for it goes to ``keep``."""
    layer = getattr(layer, "matrix", layer)  # what a quantized embedding looks its rows up in
    if hasattr(layer, "tiles"):
        matrix = Matrix(
            kind=TILED, rows=layer.rows, cols=layer.columns, groups=layer.tiles.shape[1] // 16,
            data=address(layer.tiles),
        )  # fmt: skip
    elif hasattr(layer, "codes"):
        matrix = Matrix(
            kind=QUANTIZED[layer.bits], rows=layer.rows, cols=layer.columns, groups=layer.scale.shape[1],
            data=address(layer.codes), scale=address(layer.scale),
            low=None if layer.low is None else address(layer.low),
        )  # fmt: skip
    else:
        weight = layer.weight.detach()
        if not weight.is_contiguous():
            weight = weight.contiguous()
        keep.append(weight)
        matrix = Matrix(kind=KINDS[weight.dtype], rows=weight.shape[0], cols=weight.shape[1], data=address(weight))
    bias = getattr(layer, "bias", None)
    if bias is not None:
        keep.append(bias.detach().float().contiguous())
        matrix.bias = address(keep[-1])
    return matrix


@functools.cache
def library() -> tuple[Any, str | None]:
    """(the loaded library, None), or (None, why not)."""
    try:
        lib = native_build.load()
    except native_build.NoLibraryError as error:
        return None, str(error)
    if lib.tfcli_sizes(0) != ctypes.sizeof(Matrix):
        return None, "this compiler lays out structures in another way"
    p, i, f = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
    arguments: dict[str, list[Any]] = {
        "tfcli_step": [p, p, i, p, p, p, i],
        "tfcli_linear": [p, i, p, p, i, i],
        "tfcli_linear_bf16": [p, i, p, p, i],
        "tfcli_norm": [p, p, i, i, p, f, i, i],
        "tfcli_rotate": [p, p, i, i, i, p, f, p, p, i, i, i],
        "tfcli_activate": [p, p, p, ctypes.c_int64, i, i, i],
        "tfcli_unpack": [p, i, p, p, i, i],
        "tfcli_tile": [p, p, i],
        "tfcli_pick": [p, i, i, p, p, i, i],
    }
    if lib.tfcli_bf16_products():
        arguments["tfcli_attend"] = [p, p, p, p, i, i, i, i, i, i, p, f, p, i, i, i]
    if lib.tfcli_int8_products():
        arguments["tfcli_linear_int8"] = [p, i, p, p, i]
    for name, types in arguments.items():
        function = getattr(lib, name)
        function.argtypes, function.restype, function.errcheck = types, i, _checked
    if hasattr(os, "register_at_fork"):
        # Of torch's threads none is there in a child: its first parallel operator would wait for them for ever.
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    return lib, None


def _checked(status: int, function: Any, arguments: object) -> None:
    """Raise what a ``Status`` of native.cpp stands for."""
    if status == 1:
        raise MemoryError(f"{function.__name__}: out of memory")
    if status:
        raise RuntimeError(f"{function.__name__} failed")
