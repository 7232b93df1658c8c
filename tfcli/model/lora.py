"""Low-rank adapters (Hu et al. 2021): a frozen matrix W and a trained update B A of low rank.

The layer computes ``W x + (alpha / R) B A x`` with A (R, columns) random and B (rows, R) zero, so that a new adapter
changes nothing. W may be a ``QuantMatrix``, which is dequantized for each product (Dettmers et al. 2023, QLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.config.options import LoraOptions
from tfcli.errors import UserError, unknown
from tfcli.model.layers import Linear
from tfcli.model.quant.matrix import QuantMatrix

Base = Linear | QuantMatrix


class LoraLinear(nn.Module):
    """``y = base(x) + (alpha / R) B A x`` with a frozen base."""

    def __init__(self, base: Base, *, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = shape(base)
        device = base.codes.device if isinstance(base, QuantMatrix) else base.weight.device
        self.base = base
        self.rank, self.alpha = rank, alpha
        self.a = nn.Parameter(torch.empty(rank, columns, device=device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=device))

    @property
    def scale(self) -> float:
        """alpha / R: the size of the update does not depend on the rank (Hu et al. 2021, 4.1)."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows) in the dtype of ``x``."""
        x_R = F.linear(x, self.a.to(x.dtype))
        return self.base(x) + F.linear(x_R, (self.b * self.scale).to(x.dtype))

    @torch.no_grad()
    def merged(self) -> Linear:
        """Return a plain layer of ``W + (alpha / R) B A``, in the dtype of W, or the adapter's for a quantized W."""
        base = self.base
        weight = base.dequantized(torch.float32) if isinstance(base, QuantMatrix) else base.weight.float()
        dtype = self.a.dtype if isinstance(base, QuantMatrix) else base.weight.dtype
        weight = weight.add(self.b.float() @ self.a.float(), alpha=self.scale).to(dtype)
        return Linear.of(weight, None if base.bias is None else base.bias.detach().to(dtype))


def shape(base: Base) -> tuple[int, int]:
    """Return (rows, columns) of a layer's matrix."""
    rows, columns = (base.rows, base.columns) if isinstance(base, QuantMatrix) else base.weight.shape
    return rows, columns


def layers(model: nn.Module) -> dict[str, Base]:
    """Return {path: layer} of the linear layers of the blocks; of a layer with an adapter its base."""
    stacks = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return {
        path: module.base if isinstance(module, LoraLinear) else module
        for path, module in model.named_modules()
        if isinstance(module, Base | LoraLinear) and path.startswith(stacks) and not path.endswith(".base")
    }


def chosen(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the paths of the layers that ``targets`` name by the end of their path, as "q" or "ffn.up"; [] is all.

    Raises UserError for a name that no layer has.
    """
    paths = list(layers(model))
    if not targets:
        return paths
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in paths):
            raise unknown("target of LoRA", target, {path.rpartition(".")[2] for path in paths})
    ends = tuple(f".{target}" for target in targets)
    return [path for path in paths if f".{path}".endswith(ends)]


def attach(model: nn.Module, options: LoraOptions, *, seed: int) -> dict[str, LoraLinear]:
    """Add an adapter to each chosen layer in place and freeze everything else; A is drawn from ``seed``.

    Returns {path: layer}. Raises UserError for unknown targets, a rank below 1 and a model that has adapters already.
    """
    if options.rank < 1:
        raise UserError(f"lora.rank is {options.rank}", hint="it must be at least 1")
    if adapters(model):
        raise UserError("the model has adapters already", hint="merge them first: tfcli convert --merge")
    generator = torch.Generator().manual_seed(seed)
    attached: dict[str, LoraLinear] = {}
    bases = layers(model)
    for path in chosen(model, options.targets):
        layer = LoraLinear(bases[path], rank=options.rank, alpha=options.alpha)
        bound = shape(bases[path])[1] ** -0.5
        with torch.no_grad():
            layer.a.copy_(torch.empty(layer.a.shape).uniform_(-bound, bound, generator=generator))
        attached[path] = layer
    put(model, attached)
    freeze(model)
    return attached


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Return {path: layer} of the layers with an adapter."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def freeze(model: nn.Module) -> None:
    """Train nothing but the adapters."""
    model.requires_grad_(False)
    for layer in adapters(model).values():
        layer.a.requires_grad_(True)
        layer.b.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of the parameters that are trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Set the modules at these paths."""
    for path, layer in layers.items():
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)


def merge(model: nn.Module) -> dict[str, LoraLinear]:
    """Replace every layer that has an adapter by an equivalent plain layer, in place.

    Returns the layers replaced: ``put`` of them undoes the merge exactly.
    """
    replaced = adapters(model)
    for path, layer in replaced.items():
        put(model, {path: layer.merged()})
    return replaced
