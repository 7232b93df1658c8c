"""Operations that torch's CPU build runs slowly, in few passes over memory and with gradients by hand.

Each has a twin that states its formula (``..._reference``), which other devices and torch.compile run and against
which the tests check the fast path. Each was measured to win on CPU in bf16 and fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfcli.native import ops


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


def _sum_to(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Sum ``x`` over its leading dimensions, by a product, which is faster."""
    rows = x.reshape(-1, shape.numel())
    return (rows.new_ones(1, rows.shape[0]) @ rows).view(shape).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of ``x`` (..., width); ``weight`` has its last one or two dimensions."""
    if weight.dim() == 1 and ops.serves(x):
        return ops.norm(x, weight, eps)
    if _by_hand(x):
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` in fp32 (Zhang and Sennrich 2019, eq. 4)."""
    x32 = x.float()
    return (x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps)^-1/2; with g = dy w:  dx = r (g - x r mean(g x r)),  dw = sum(dy x r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        d_weight = _sum_to(grad * unit, weight.shape, weight.dtype) if ctx.needs_input_grad[1] else None
        g = grad * weight.to(x.dtype)
        mean = (g * unit).sum(-1, keepdim=True).div_(x.shape[-1])
        return g.addcmul_(unit, mean, value=-1).mul_(scale), d_weight, None


def norm_rope(x_BTHK: Tensor, weight_HK: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """QK-norm, then rotary positions; ``cos`` and ``sin`` broadcast to (B, T, 1, K/2)."""
    if weight_HK.stride(0) == 0 and ops.serves(x_BTHK):  # every head has the same weight
        return ops.rotate(x_BTHK, cos, sin, weight_HK[0], eps)
    if _by_hand(x_BTHK):
        return _NormRope.apply(x_BTHK, weight_HK, cos, sin, eps)  # type: ignore[no-untyped-call]
    return norm_rope_reference(x_BTHK, weight_HK, cos, sin, eps)


def norm_rope_reference(x_BTHK: Tensor, weight_HK: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm per head (Henry et al. 2020), then ``rotate_reference``."""
    return rotate_reference(rms_norm_reference(x_BTHK, weight_HK, eps), cos, sin)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions alone, as in ``norm_rope``, in three passes over memory; autograd derives its gradient."""
    if ops.serves(x_BTHK):
        return ops.rotate(x_BTHK, cos, sin)
    return (x_BTHK * torch.cat([cos, cos], dim=-1)).addcmul_(
        x_BTHK.roll(x_BTHK.shape[-1] // 2, -1), torch.cat([-sin, sin], dim=-1)
    )


def rotate_reference(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) (Su et al. 2021, eq. 34)."""
    a, b = x_BTHK.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _NormRope(torch.autograd.Function):
    """y = u w C + swap(u w) S with u = x r the unit vector, C = [cos cos], S = [-sin sin], swap exchanging halves.

    The transpose of the rotation is h = dy C - swap(dy) S; then dw = sum(h u) and the norm's gradient follows from
    du = h w. Tables are expanded to all heads so that every pass over memory is contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        half = x.shape[-1] // 2
        shape = (*cos.shape[:-2], *x.shape[-2:])
        C = torch.cat([cos, cos], dim=-1).expand(shape).contiguous()
        S = torch.cat([-sin, sin], dim=-1).expand(shape).contiguous()
        w, scale = weight.to(x.dtype), _inverse_rms(x, eps)
        unit = x * scale
        ctx.save_for_backward(unit, scale, w, C, S)
        ctx.weight_dtype = weight.dtype
        return (unit * (C * w)).addcmul_(unit.roll(half, -1), S * w.roll(half, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        unit, scale, w, C, S = ctx.saved_tensors
        h = (grads[0] * C).addcmul_(grads[0].roll(unit.shape[-1] // 2, -1), S, value=-1)
        p = h * unit
        d_weight = _sum_to(p, w.shape, ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        mean = p.mul_(w).sum(-1, keepdim=True).div_(unit.shape[-1])
        return h.mul_(w).addcmul_(unit, mean, value=-1).mul_(scale), d_weight, None, None, None


def swiglu(x: Tensor) -> Tensor:
    """Gate and up projections side by side (..., 2F) -> silu(gate) * up (..., F)."""
    if _by_hand(x) and torch.is_grad_enabled():
        return _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return swiglu_reference(x)


def swiglu_reference(x: Tensor) -> Tensor:
    """``silu(gate) * up`` with silu(a) = a sigmoid(a) (Shazeer 2020, eq. 6)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """y = a s u with s = sigmoid(a):  du = dy a s,  da = dy u s (1 + a (1 - s)).  The sigmoid is computed once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        s = torch.sigmoid(gate)
        ctx.save_for_backward(x, s)
        return (gate * s).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        d_gate, d_up = dx.chunk(2, dim=-1)
        silu = gate * s
        torch.mul(grads[0], silu, out=d_up)
        slope = torch.addcmul(s, silu, 1 - s)  # s + a s (1 - s)
        torch.mul(grads[0], up, out=d_gate).mul_(slope)
        return dx


_GENERATOR: ContextVar[torch.Generator | None] = ContextVar("generator of dropout", default=None)


@contextmanager
def seeded(seed: int, device: torch.device, *, compiled: bool = False) -> Iterator[None]:
    """Seed dropout and leave torch's global generators unchanged.

    On the CPU it draws from a generator of the calling thread. On other devices, and in compiled code, operators draw
    from torch's global generators: these are seeded, and their states restored.
    """
    if device.type == "cpu" and not compiled:
        token = _GENERATOR.set(torch.Generator().manual_seed(seed))
        try:
            yield
        finally:
            _GENERATOR.reset(token)
        return
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    for generator in generators:
        generator.manual_seed(seed)
    if mps_state is not None:
        torch.mps.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


def torch_dropout(x: Tensor, p: float) -> Tensor:
    """Apply ``F.dropout`` with the generator of ``seeded``: bitwise torch's result for that seed."""
    generator = None if torch.compiler.is_compiling() else _GENERATOR.get()
    if p <= 0 or generator is None or x.device.type != "cpu":
        return F.dropout(x, p, training=p > 0)
    return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each number of ``x`` with probability ``p``, divide the others by 1 - p (Srivastava et al. 2014)."""
    if p <= 0:
        return x
    return x * _kept(x, p) if _by_hand(x) else torch_dropout(x, p)


def add_dropout(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Compute ``x + dropout(y)``, of one shape, in one pass over memory."""
    if p <= 0:
        return x + y
    return torch.addcmul(x, y, _kept(y, p)) if _by_hand(y) else x + torch_dropout(y, p)


def _kept(x: Tensor, p: float) -> Tensor:
    """Draw a dropout mask in the dtype of ``x``: 1 / (1 - p) where a number is kept, else 0.

    torch draws a number of its CPU generator for each element; here one serves four, with 15 bits each.
    """
    drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=_GENERATOR.get())
    bits = drawn.view(torch.int16)[: x.numel()].view(x.shape).bitwise_and_(2**15 - 1)
    least = min(max(1, round(p * 2**15)), 2**15 - 1)
    kept = bits.add_(2**15 - least).bitwise_right_shift_(15)  # at 2^15 it wraps around: the sign, as 0 or -1
    if x.element_size() == 2:  # a mask of bits
        return kept.bitwise_and_(int(torch.tensor(1 / (1 - p), dtype=x.dtype).view(torch.int16))).view(x.dtype)
    return kept.to(x.dtype).mul_(-1 / (1 - p))


def short_attention(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, scale: float, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention over short texts by batched products -> (B, H, T, K), differentiable.

    ``mask`` (broadcast to B, 1, T, S) is added to the scores; ``causal`` (T = S, no mask) hides later keys. The
    backward pass of torch's fused CPU kernel is slow: at T = 128 this takes a fifth of its time. It holds the T x S
    weights of every head, so T and S must be small.
    """
    B, H, T, _ = q_BHTK.shape
    S = k_BHSK.shape[2]
    if mask is not None:
        bias = mask.expand(B, H, mask.shape[2], S).reshape(B * H, mask.shape[2], S)
    elif causal:
        bias = q_BHTK.new_full((T, S), float("-inf")).triu_(1)
    else:
        bias = q_BHTK.new_zeros(1)
    return _ShortAttention.apply(q_BHTK, k_BHSK, v_BHSK, bias, scale)  # type: ignore[no-untyped-call]


class _ShortAttention(torch.autograd.Function):
    """P = softmax(c q k^T + b), o = P v: dv = P^T do, dS = P (dP - sum(dP P)), dP = do v^T, dq = c dS k, dk = c dS^T q.

    Vaswani et al. 2017, eq. 1, and its derivative.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor, scale: float) -> Tensor:
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q_BHTK, k_BHSK, v_BHSK))
        p = torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale), dim=-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        ctx.shapes = q_BHTK.shape, k_BHSK.shape
        return torch.bmm(p, v).view(q_BHTK.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, p = ctx.saved_tensors
        of_q, of_k = ctx.shapes
        g = grads[0].reshape(q.shape)
        dv = torch.bmm(p.transpose(1, 2), g)
        ds = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
        dq = torch.bmm(ds, k).mul_(ctx.scale)
        dk = torch.bmm(ds.transpose(1, 2), q).mul_(ctx.scale)
        return dq.view(of_q), dk.view(of_k), dv.view(of_k), None, None


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None = None, *, smoothing: float = 0.0
) -> Tensor:
    """Return the summed cross-entropy (nats, fp32) of ``softmax(hidden weight^T + bias)`` against the targets.

    ``smoothing`` is the part of a target's probability that all V share (Szegedy et al. 2016, 7).
    """
    if _by_hand(hidden_ND):
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, bias_V, smoothing)  # type: ignore[no-untyped-call]
    return linear_cross_entropy_reference(hidden_ND, weight_VD, targets_N, bias_V, smoothing=smoothing)


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None = None, *, smoothing: float = 0.0
) -> Tensor:
    """Compute the logits, then ``-log softmax`` at the target, in fp32."""
    bias = None if bias_V is None else bias_V.to(hidden_ND.dtype)
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype), bias)
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum", label_smoothing=smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    """d logits = softmax - onehot is known in the forward pass, so the probabilities are the only large tensor kept.

    Smoothing by e adds e (mean_v -log p_v - -log p_t) to the loss and e (onehot - 1/V) to the gradient of the logits.
    The mean of the logits is the logit of the mean row, so neither needs a pass over the (N, V) logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None, smoothing: float
    ) -> Tensor:
        weight = weight_VD.to(hidden_ND.dtype)
        bias = None if bias_V is None else bias_V.to(hidden_ND.dtype)
        # Training in bf16 keeps the probabilities in bf16: rounding to nearest changes the mean loss by 1e-5, and the
        # gradient is bf16 anyway. A score without gradient is exact.
        grad = any(ctx.needs_input_grad)
        dtype = hidden_ND.dtype if grad else torch.float32
        p_NV = torch.softmax(F.linear(hidden_ND, weight, bias), dim=-1, dtype=dtype)
        rows = torch.arange(len(targets_N), device=targets_N.device)
        at_target_N = p_NV[rows, targets_N].float()
        loss = at_target_N.log().sum().neg_()
        if smoothing:  # mean_v -log p_v - -log p_t = logit_t - mean logit
            mean_D = weight_VD.float().mean(dim=0)
            excess = (hidden_ND.float() * (weight_VD[targets_N].float() - mean_D)).sum()
            if bias_V is not None:
                excess += (bias_V[targets_N].float() - bias_V.float().mean()).sum()
            loss += smoothing * excess
        if not torch.isfinite(loss):  # a target less likely than fp32's smallest number, or a true NaN
            loss = linear_cross_entropy_reference(hidden_ND, weight_VD, targets_N, bias_V, smoothing=smoothing)
        if not grad:
            return loss
        # The gradient of the logits, without e / V:
        p_NV[rows, targets_N] = (at_target_N - (1.0 - smoothing)).to(hidden_ND.dtype)
        ctx.save_for_backward(hidden_ND, weight, p_NV)
        ctx.weight_dtype, ctx.smoothing = weight_VD.dtype, smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, Tensor | None, None]:
        hidden_ND, weight, d_logits_NV = ctx.saved_tensors
        share = ctx.smoothing / len(weight)
        g = grads[0].to(hidden_ND.dtype)
        d_hidden = d_logits_NV @ weight
        if share:
            d_hidden -= (share * weight.float().sum(dim=0)).to(d_hidden.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_logits_NV.T @ hidden_ND).to(ctx.weight_dtype)
            if share:
                d_weight -= share * hidden_ND.float().sum(dim=0)
            d_weight.mul_(grads[0])
        d_bias = None
        if ctx.needs_input_grad[3]:
            d_bias = (d_logits_NV.float().sum(dim=0) - share * len(hidden_ND)).mul_(grads[0])
        return d_hidden.mul_(g), d_weight, None, d_bias, None
