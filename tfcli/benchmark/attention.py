"""Which of PyTorch's attention kernels some work runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
FUSED = {
    "_scaled_dot_product_flash_attention_for_cpu": "flash_attention",
    "_scaled_dot_product_flash_attention": "flash_attention",
    "_scaled_dot_product_efficient_attention": "efficient_attention",
    "_scaled_dot_product_cudnn_attention": "cudnn_attention",
}
"""Operators that only one backend has."""


def watched(work: Callable[[], T]) -> tuple[T, list[str]]:
    """What ``work`` returns, and the backends of ``scaled_dot_product_attention`` that it used, as torch names them.

    What a compiled graph runs is not seen, nor "math" outside of inference mode.
    """
    mode = _Watch()
    with mode:
        done = work()
    return done, sorted(mode.seen)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if name == "scaled_dot_product_attention":
            # Without autograd the operator arrives whole; this is the question that it asks itself.
            choice = torch._fused_sdp_choice(*args, **kwargs)
            self.seen.add(SDPBackend(choice).name.lower())
        elif name in FUSED:
            self.seen.add(FUSED[name])
        return func(*args, **kwargs)
