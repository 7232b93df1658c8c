"""Low-rank adapters (Hu et al. 2021): beside a frozen matrix W a product B A of few numbers that learns its change.

The layer computes ``W x + (alpha / R) B A x`` with A (R, columns) random and B (rows, R) zero, so that an adapter
that was just attached changes nothing. W may be a ``QuantMatrix``, which is dequantized for the time of each product
(Dettmers et al. 2023, QLoRA).
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
    """``y = base(x) + (alpha / R) B A x``; the base learns nothing."""

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
        """alpha / R: the change keeps its size when the rank is changed (Hu et al. 2021, 4.1)."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows) in the dtype of ``x``."""
        x_R = F.linear(x, self.a.to(x.dtype))
        y: Tensor = self.base(x)
        return y + F.linear(x_R, (self.b * self.scale).to(x.dtype))

    @torch.no_grad()
    def merged(self) -> Linear:
        """A plain layer of ``W + (alpha / R) B A``, in the dtype of W, or of the adapter where W is quantized."""
        base = self.base
        weight = base.dequantized(torch.float32) if isinstance(base, QuantMatrix) else base.weight.float()
        dtype = self.a.dtype if isinstance(base, QuantMatrix) else base.weight.dtype
        with torch.device("meta"):
            made = Linear(weight.shape[1], weight.shape[0], base.bias is not None)
        change = self.b.float() @ self.a.float()
        made.weight = nn.Parameter(weight.add(change, alpha=self.scale).to(dtype))
        made.bias = None if base.bias is None else nn.Parameter(base.bias.detach().to(dtype))
        return made


def shape(base: Base) -> tuple[int, int]:
    """(rows, columns) of a layer's matrix."""
    if isinstance(base, QuantMatrix):
        return base.rows, base.columns
    rows, columns = base.weight.shape
    return rows, columns


def layers(model: nn.Module) -> dict[str, Base]:
    """{path: layer} of the linear layers of the blocks, with the layer below where one has an adapter."""
    stacks = [f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found: dict[str, Base] = {}
    for path, module in model.named_modules():
        if not path.startswith(tuple(stacks)) or path.endswith(".base"):
            continue
        if isinstance(module, LoraLinear):
            found[path] = module.base
        elif isinstance(module, Linear | QuantMatrix):
            found[path] = module
    return found


def chosen(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The paths of the layers that ``targets`` name by the end of their path, as "q" or "ffn.up"; all for none.

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
    """Put an adapter on each chosen layer, in place, and freeze everything else; A is drawn from ``seed``.

    Returns {path: layer}. Raises UserError for unknown targets, a rank below 1 and a model that has adapters.
    """
    if options.rank < 1:
        raise UserError(f"lora.rank is {options.rank}", hint="it must be at least 1")
    if adapters(model):
        raise UserError("the model has adapters already", hint="merge them first: tfcli convert --merge")
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, LoraLinear] = {}
    bases = layers(model)
    for path in chosen(model, options.targets):
        layer = LoraLinear(bases[path], rank=options.rank, alpha=options.alpha)
        bound = shape(bases[path])[1] ** -0.5
        with torch.no_grad():
            layer.a.copy_(torch.empty(layer.a.shape).uniform_(-bound, bound, generator=generator))
        made[path] = layer
    put(model, made)
    freeze(model)
    return made


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """{path: layer} of the layers that have one."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def freeze(model: nn.Module) -> None:
    """Nothing but the adapters learns."""
    model.requires_grad_(False)
    for layer in adapters(model).values():
        layer.a.requires_grad_(True)
        layer.b.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of what learns: with adapters, they alone, and heads that were thawed after them."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def put(model: nn.Module, made: Mapping[str, nn.Module]) -> None:
    """Put layers in the places that their paths name."""
    for path, layer in made.items():
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)


def merge(model: nn.Module) -> dict[str, LoraLinear]:
    """Replace every layer with an adapter by the plain layer that it amounts to, in place.

    Returns what was replaced: ``put`` of it takes the merging back exactly.
    """
    taken = adapters(model)
    for path, layer in taken.items():
        put(model, {path: layer.merged()})
    return taken


def unmerge(model: nn.Module, taken: Mapping[str, LoraLinear]) -> None:
    """Take back ``merge``, which returned ``taken``: exactly, as the base was not touched."""
    put(model, taken)
