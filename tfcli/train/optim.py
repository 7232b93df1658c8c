"""Muon for the blocks' matrices, AdamW for the rest, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tfcli.config.options import OptimOptions
from tfcli.tasks.common.options import FinetuneOptim

# The two owners of parameters, as `rule` names them.
MUON, ADAMW = "muon", "adamw"


class Muon:
    """Momentum orthogonalized by Newton-Schulz (Jordan et al. 2024), matrices of one shape together.

    The update is that of ``torch.optim.Muon``, against which it is tested. A small model has dozens of small matrices,
    each of which takes torch's own fifteen products; here all of a shape share batched products. (Neither optimizer is
    a ``torch.optim.Optimizer``, because making one imports torch's compiler, which takes over a second.)
    """

    def __init__(self, params: Iterable[nn.Parameter], *, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._shapes: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for p in params:
            self._shapes[tuple(sorted(p.shape))].append(p)  # tall matrices are transposed

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients; a parameter without one is left alone."""
        for group in self._shapes.values():
            params: list[Tensor] = [p for p in group if p.grad is not None]
            if not params:
                continue
            for p in params:
                if p not in self.state:
                    self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            grads = torch.stack([_wide(p.grad) for p in params if p.grad is not None])
            buffers = [_wide(self.state[p]["momentum_buffer"]) for p in params]
            momentum = torch.stack(buffers).lerp_(grads, 1 - self.momentum)
            torch._foreach_copy_(buffers, momentum.unbind())
            updates = orthogonalize(grads.lerp_(momentum, self.momentum)).to(params[0].dtype).unbind()
            torch._foreach_mul_(params, 1 - lr * self.weight_decay)
            for p, update in zip(params, updates, strict=True):
                _wide(p).add_(update, alpha=-lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, transposed if it has more rows than columns."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


class AdamW:
    """torch's functional AdamW (Loshchilov and Hutter 2019); in pretraining for embeddings, head and norms."""

    def __init__(
        self, params: Iterable[nn.Parameter], *, beta1: float, beta2: float, eps: float, weight_decay: float = 0.0
    ) -> None:
        self.params = list(params)
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients; a parameter without one is left alone."""
        params = [p for p in self.params if p.grad is not None]
        if not params:
            return
        for p in params:
            if p not in self.state:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p] = {**moments, "step": torch.zeros((), device=p.device)}
        states = [self.state[p] for p in params]
        adamw(
            list[Tensor](params),
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix (N, rows, columns) towards 1 by Newton-Schulz in bf16.

    X <- a X + (b A + c A^2) X with A = X X^T, coefficients of Jordan et al. 2024; values end in about 0.5 to 1.5.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return x.mT if tall else x


def rule(name: str, parameter: nn.Parameter) -> str:
    """The optimizer of a parameter: Muon for matrices inside blocks and between hidden states of a head."""
    inner = name.startswith(("blocks.", "encoder.blocks.", "task_head.transform."))
    return MUON if inner and parameter.ndim == 2 else ADAMW


class Optimizers:
    """The optimizers of a model, stepped together, with one schedule factor on their peak rates.

    With ``plain`` AdamW updates everything, with ``options.weight_decay`` on matrices only. Frozen parameters have no
    optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        options: OptimOptions | FinetuneOptim,
        *,
        muon_lr: float,
        lr: float,
        plain: bool = False,
        eps: float = 1e-10,
    ) -> None:
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.lr = lr
        self.muon_lr = muon_lr
        self.shown_lr = lr if plain else muon_lr
        """Peak rate for the metrics."""
        matrices = [p for name, p in self.named.items() if not plain and rule(name, p) == MUON]
        decayed = [p for p in self.named.values() if plain and p.ndim > 1]
        taken = {id(p) for p in (*matrices, *decayed)}
        rest = [p for p in self.named.values() if id(p) not in taken]
        self._muon = Muon(matrices, momentum=options.momentum, weight_decay=options.weight_decay)
        betas = {"beta1": options.beta1, "beta2": options.beta2, "eps": eps}
        self._adamw = [AdamW(rest, **betas), AdamW(decayed, **betas, weight_decay=options.weight_decay)]
        self._owners: dict[int, Muon | AdamW] = {id(p): self._muon for p in matrices}
        self._owners |= {id(p): owner for owner in self._adamw for p in owner.params}

    def step(self, factor: float) -> None:
        """Update every parameter at ``factor`` times its peak rate and clear the gradients."""
        self._muon.step(self.muon_lr * factor)
        for owner in self._adamw:
            owner.step(self.lr * factor)
        for p in self.named.values():
            p.grad = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every state tensor as ("parameter.state", tensor), in the order of the parameters."""
        for name, p in self.named.items():
            for key, value in self._owners[id(p)].state.get(p, {}).items():
                yield f"{name}.{key}", value

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state that ``tensors`` gave."""
        for key, value in tensors.items():
            name, _, state = key.rpartition(".")
            p = self.named[name]
            self._owners[id(p)].state.setdefault(p, {})[state] = value.to(p.device)


def schedule(step: int, steps: int, *, warmup: int, decay: float) -> float:
    """The factor on the peak rates at ``step`` (from 0): linear warm-up, constant, then linear to zero over ``decay``.

    Warmup-stable-decay (Hu et al. 2024, MiniCPM, 4.1): the length may be fixed while the rate is still constant.
    """
    warm = (step + 1) / (min(warmup, steps) + 1)
    left = (steps - step) / max(1.0, steps * decay)
    return max(0.0, min(1.0, warm, left))


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most ``limit``; return the norm before, as a tensor."""
    return torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
