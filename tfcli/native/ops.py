"""The functions of ``native.cpp`` on tensors: what PyTorch's CPU build does slowly or not at all, for inference.

Products with quantized weights as they are stored, norms, rotations and activations in one pass over memory. The
library is compiled for this machine at first use (``tfcli.native.library``). Without a C++ compiler ``ready`` is False,
``unavailable`` says why, and everything runs as PyTorch operators.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tfcli.native import library as native_library

KINDS = {torch.float32: 1, torch.bfloat16: 2}
QUANTIZED = {4: 3, 8: 4}
TILED = 5
LONG = 256
"""Causal queries from which on PyTorch's attention wins where the processor has AMX; below it is slower in batches."""
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


class MatrixStruct(ctypes.Structure):
    """``Matrix`` of native.cpp. It points into tensors, which ``tensors`` keeps alive."""

    tensors: tuple[Tensor | None, ...]
    _fields_ = [(name, ctypes.c_int32) for name in ("kind", "rows", "cols", "groups")] + [
        (name, ctypes.c_void_p) for name in ("data", "scale", "low", "bias")
    ]

    @classmethod
    def over(
        cls, kind: int, rows: int, columns: int, data: Tensor, groups: int = 0, scale: Tensor | None = None,
        low: Tensor | None = None, bias: Tensor | None = None,
    ) -> MatrixStruct:  # fmt: skip
        """Describe a matrix (rows, columns) in the layout of ``kind``, with its bias in fp32."""
        bias = None if bias is None else bias.detach().float().contiguous()
        addresses = [address(tensor) for tensor in (data, scale, low, bias)]
        struct = cls(kind, rows, columns, groups, *addresses)
        struct.tensors = (data, scale, low, bias)
        return struct

    @classmethod
    def plain(cls, weight: Tensor, bias: Tensor | None = None) -> MatrixStruct:
        """Describe a weight (rows, columns) that lies row by row, in fp32 or bf16."""
        weight = weight.detach().contiguous()
        rows, columns = weight.shape
        return cls.over(KINDS[weight.dtype], rows, columns, weight, bias=bias)


class Matrix(Protocol):
    """A matrix that the functions here multiply by: a ``QuantMatrix`` or ``PackedMatrix``."""

    rows: int
    columns: int

    def describe(self) -> MatrixStruct:
        """Return where the matrix lies and how."""


def ready() -> bool:
    """Return whether the compiled library is available, compiling it at first use on this machine."""
    return library()[0] is not None


def unavailable() -> str | None:
    """Return why the compiled library is not available; None where it is."""
    return library()[1]


def fast(dtype: torch.dtype) -> bool:
    """Return whether products of any number of rows are as fast as PyTorch's: bf16, on processors that multiply it."""
    return dtype == torch.bfloat16 and ready() and bool(library()[0].tfcli_bf16_products())


def int8(dtype: torch.dtype) -> bool:
    """Return whether ``linear_int8`` takes inputs of ``dtype``: bf16, on processors that multiply 8 by 8 bits."""
    return fast(dtype) and bool(library()[0].tfcli_int8_products())


def linear_int8(matrix: Matrix, x: Tensor) -> Tensor:
    """Return ``x W^T + bias`` for bf16 rows (..., columns), quantized to 8 bits, and a centered 8-bit matrix.

    Each 32 columns of a row share a scale, its greatest magnitude over 127. ``columns`` is a multiple of 32.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(len(flat), matrix.rows, dtype=x.dtype)
    _call("tfcli_linear_int8", ctypes.byref(matrix.describe()), len(flat), address(flat), address(y))
    return y.view(*x.shape[:-1], matrix.rows)


def linear(matrix: Matrix, x: Tensor) -> Tensor:
    """Return ``x W^T + bias`` for rows (..., columns) on the CPU, in the dtype of ``x``."""
    flat = x.reshape(-1, x.shape[-1])
    described = ctypes.byref(matrix.describe())
    if len(flat) > 1 and not x.shape[-1] % 32 and fast(x.dtype):
        flat = flat.contiguous()
        y = torch.empty(len(flat), matrix.rows, dtype=x.dtype)
        _call("tfcli_linear_bf16", described, len(flat), address(flat), address(y))
    else:
        flat = flat.float().contiguous()
        y = torch.empty(len(flat), matrix.rows)
        _call("tfcli_linear", described, len(flat), address(flat), address(y), int(x.dtype == torch.float32))
    return y.view(*x.shape[:-1], matrix.rows).to(x.dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of ``x``, bf16 or fp32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    weight, width = weight.float(), x.shape[-1]
    _call("tfcli_norm", address(x), address(y), x.numel() // width, width, address(weight), eps, _is_bf16(x))
    return y


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, weight_K: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """QK-norm where there is a weight, then rotary positions; ``cos`` and ``sin`` are (B or none, T, 1, K/2)."""
    x = x_BTHK.contiguous()
    y = torch.empty_like(x)
    B, T, H, K = x.shape
    weight_K = None if weight_K is None else weight_K.float()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    _call(
        "tfcli_rotate", address(x), address(y), B * T, H, K, address(weight_K), eps, address(cos), address(sin),
        cos.numel() // (K // 2), _is_bf16(x),
    )  # fmt: skip
    return y


def activate(gate: Tensor | None, up: Tensor, activation: str) -> Tensor:
    """Return ``act(gate) * up``, or ``act(up)`` without a gate."""
    up = up.contiguous()
    gate = None if gate is None else gate.contiguous()
    y = torch.empty_like(up)
    kind = ACTIVATIONS[activation]
    _call("tfcli_activate", address(gate), address(up), address(y), up.numel(), kind, _is_bf16(up))
    return y


def attends(q_BHTK: Tensor, k_BGSK: Tensor, mask: Tensor | None, *, causal: bool) -> bool:
    """Return whether ``attend`` takes these: as ``attends_from`` says, with at most a mask (B, 1, 1, S) to add."""
    if mask is not None and (mask.dtype == torch.bool or mask.shape[:3] != (len(q_BHTK), 1, 1)):
        return False
    if k_BGSK.dtype != q_BHTK.dtype or any(t.stride(3) != 1 for t in (q_BHTK, k_BGSK)):
        return False
    return attends_from(q_BHTK, q_BHTK.shape[3], queries=q_BHTK.shape[2], causal=causal)


def attends_from(x: Tensor, head_width: int, *, queries: int, causal: bool) -> bool:
    """Return whether ``attend`` takes queries and keys made of ``x``: bf16 in inference mode, heads of 32, 64, ... 256.

    Long causal ones only on processors without AMX: with it PyTorch's kernel takes a third to two thirds of the time.
    """
    if head_width % 32 or head_width > 256 or not (serves(x) and fast(x.dtype)):
        return False
    return not (causal and queries >= LONG and library()[0].tfcli_bf16_tiles())


def attend(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, scale: float, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """Return ``softmax(q k^T scale + mask) v`` (B, H, T, K); causal queries see the keys up to S - T + t.

    ``mask`` (B, 1, 1, S) is the same for all queries of a row.
    """
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1:3]
    out_BTHK = torch.empty(B, T, H, K, dtype=q_BHTK.dtype)
    out = out_BTHK.transpose(1, 2)
    strides = [stride for t in (q_BHTK, k_BGSK, v_BGSK, out) for stride in t.stride()[:3]]
    bias = None if mask is None else mask.reshape(B, S).float().contiguous()
    _call(
        "tfcli_attend", address(q_BHTK), address(k_BGSK), address(v_BGSK), address(out), B, H, G, T, S, K,
        (ctypes.c_int64 * 12)(*strides), scale, address(bias), int(causal), S - T,
    )  # fmt: skip
    return out


def serves(x: Tensor) -> bool:
    """Return whether the functions here take ``x``: on the CPU in inference mode, bf16 or fp32, with the library."""
    return (
        torch.is_inference_mode_enabled()
        and x.device.type == "cpu"
        and x.dtype in KINDS
        and not torch.compiler.is_compiling()
        and ready()
    )


def dequantized(matrix: Matrix, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    """Return all rows of a matrix in tiles, or those of ``index`` (N,), as fp32 or bf16."""
    if index is not None:
        index = index.to(torch.int64).contiguous()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < matrix.rows:
            raise IndexError(f"row {int(index.max())} of {matrix.rows}")
    count = matrix.rows if index is None else len(index)
    out = torch.empty(count, matrix.columns, dtype=dtype)
    _call("tfcli_unpack", ctypes.byref(matrix.describe()), count, address(index), address(out), _is_bf16(out))
    return out


def pick(logits_BV: Tensor, ids: Sequence[int] | None = None) -> tuple[list[int], list[float]]:
    """Return the likeliest token of each row of fp32 logits on the CPU, the first of equals, and its log-probability.

    With ``ids`` the log-probability of these. A row with a logit that is not finite has the id -1.
    """
    B, V = logits_BV.shape
    chosen, logprobs = (ctypes.c_int32 * B)(*(ids or ())), (ctypes.c_float * B)()
    _call("tfcli_pick", address(logits_BV), B, V, chosen, logprobs, int(ids is not None))
    return list(chosen), list(logprobs)


def tile(weight: Tensor, tiles: Tensor) -> None:
    """Copy a bf16 matrix (rows, columns) into the ``tiles`` of a ``tfcli.model.quant.matrix.PackedMatrix``."""
    _call("tfcli_tile", ctypes.byref(MatrixStruct.plain(weight)), address(tiles))


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's numbers begin; None without one."""
    return None if tensor is None else tensor.data_ptr()


def _is_bf16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def _call(name: str, *arguments: object) -> None:
    """Call a function of the library, whose last argument is the number of threads."""
    getattr(library()[0], name)(*arguments, torch.get_num_threads())


@functools.cache
def library() -> tuple[Any, str | None]:
    """Return (the loaded library, None), or (None, why there is none)."""
    try:
        lib = native_library.load()
    except native_library.NoLibraryError as error:
        return None, str(error)
    if lib.tfcli_sizes(0) != ctypes.sizeof(MatrixStruct):
        return None, "this compiler lays out structures in another way"
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}
    signatures = {
        "step": "ppipppi", "linear": "pippii", "linear_bf16": "pippi", "norm": "ppiipfii", "rotate": "ppiiipfppiii",
        "activate": "pppliii", "unpack": "pippii", "tile": "ppi", "pick": "piippii",
    }  # fmt: skip
    if lib.tfcli_bf16_products():
        signatures["attend"] = "ppppiiiiiipfpiii"
    if lib.tfcli_int8_products():
        signatures["linear_int8"] = "pippi"
    for name, signature in signatures.items():
        function = getattr(lib, f"tfcli_{name}")
        function.argtypes, function.restype = [types[letter] for letter in signature], ctypes.c_int32
        function.errcheck = _checked
    if hasattr(os, "register_at_fork"):
        # A child has none of torch's threads: its first parallel operator would wait for them forever.
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    return lib, None


def _checked(status: int, function: Any, arguments: object) -> None:
    """Raise the exception that a ``Status`` of native.cpp stands for."""
    if status == 1:
        raise MemoryError(f"{function.__name__}: out of memory")
    if status:
        raise RuntimeError(f"{function.__name__} failed")
