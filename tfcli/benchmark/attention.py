"""The PyTorch attention kernels that a piece of work runs."""

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
"""Operators that belong to one backend only."""


def watched(work: Callable[[], T]) -> tuple[T, list[str]]:
    """Run ``work``; return its result and the ``scaled_dot_product_attention`` backends it used, by torch's names.

    Calls inside compiled graphs are not seen, nor is "math" outside of inference mode.
    """
    mode = _Watch()
    with mode:
        result = work()
    return result, sorted(mode.seen)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if name == "scaled_dot_product_attention":
            # Without autograd the operator arrives whole; it chooses its backend by this call.
            choice = torch._fused_sdp_choice(*args, **kwargs)
            self.seen.add(SDPBackend(choice).name.lower())
        elif name in FUSED:
            self.seen.add(FUSED[name])
        return func(*args, **kwargs)
