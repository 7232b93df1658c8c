"""The first place where numbers are not finite, when training diverges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def weights(model: nn.Module) -> str | None:
    """The first parameter that is not finite, in words; None where all are."""
    names = (f"the weights of {name}" for name, parameter in model.named_parameters() if not _finite(parameter))
    return next(names, None)


def find(model: nn.Module, gradients: Callable[[], object]) -> str:
    """The first parameter, output of a module (in the order of the forward pass) or gradient that is not finite.

    ``gradients`` repeats the step, forward and backward, without clipping, which spreads one bad gradient over all.
    """
    if (bad := weights(model)) is not None:
        return bad
    outputs: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def check(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                outputs.append(name)

        return check

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    model.zero_grad(set_to_none=True)
    try:
        gradients()
    finally:
        for handle in handles:
            handle.remove()
    if outputs:
        return f"the output of {outputs[0]}"
    # The backward pass goes from the last parameter to the first.
    gradient = {name: p.grad for name, p in reversed(list(model.named_parameters())) if p.grad is not None}
    for name, values in gradient.items():
        if not _finite(values):
            return f"the gradient of {name}"
    if not gradient:
        return "the loss"
    largest = max(gradient, key=lambda name: float(gradient[name].abs().max()))
    return f"the gradient of {largest}"  # each is finite, their norm is not


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values.detach()).all())
