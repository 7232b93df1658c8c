"""Sampling the next token: pure filters ``logits_BV -> logits_BV``, composed by ``filtered``, and the draw itself.

Every filter works in fp32 and sets removed tokens to -inf. Greedy choice is a function of its own, not a very low
temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfcli.config.options import Sampling
from tfcli.errors import UserError

BLOCK = 256
"""Uniform numbers drawn at once."""
HEAD = 256
"""Likeliest tokens that top-p sorts first."""


def check(sampling: Sampling) -> None:
    """Raise UserError for a value out of range, naming the option and its range."""
    bounds: list[tuple[str, float | None, bool, str]] = [
        ("--max-tokens", sampling.max_tokens, (sampling.max_tokens or 0) >= 1, "at least 1"),
        ("--repetition-penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0, "above 0; 1 is off"),
        ("--temperature", sampling.temperature, sampling.temperature >= 0, "at least 0; 0 is greedy"),
        ("--top-k", sampling.top_k, sampling.top_k >= 0, "at least 0; 0 is off"),
        ("--top-p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1; 1 is off"),
        ("--min-p", sampling.min_p, 0 <= sampling.min_p <= 1, "at least 0 and at most 1; 0 is off"),
        ("--num-samples", sampling.num_samples, sampling.num_samples >= 1, "at least 1"),
        ("--seed", sampling.seed, 0 <= (sampling.seed or 0) < 2**63, "at least 0 and below 2^63"),
    ]
    for name, value, holds, expected in bounds:
        if value is not None and not (holds and value != float("inf")):
            raise UserError(f"{name} is {value}", hint=f"it must be {expected}")
    if any(not stop for stop in sampling.stop):
        raise UserError("--stop is empty", hint="give the text to stop at, such as --stop '###'")


def repetition_penalty(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of tokens of the context (``seen_BV``) by ``penalty``, multiply negative ones by it
    (Keskar et al. 2019, 4.1)."""
    scaled_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    largest = torch.finfo(torch.float32).max
    return torch.where(seen_BV, scaled_BV.clamp(-largest, largest), logits_BV)


def temperature(logits_BV: Tensor, value: float) -> Tensor:
    """Compute ``logits / value``: below 1 sharper, above 1 flatter.

    The maximum is subtracted first, which changes no probability, so that no temperature overflows.
    """
    smallest = torch.finfo(torch.float32).tiny  # below it the divisor is zero, or denormal and slow
    return (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / max(value, smallest)


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens, and those as likely as the k-th (Fan et al. 2018)."""
    if k >= logits_BV.shape[-1]:
        return logits_BV
    kth_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))


def top_p(logits_BV: Tensor, mass: float) -> Tensor:
    """Keep the likeliest tokens until their probabilities sum to ``mass``, and those as likely as the last of them
    (Holtzman et al. 2020, 3.1)."""
    total_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
    size = logits_BV.shape[-1]
    # Sorting the whole vocabulary takes longer than a small model: its head nearly always suffices.
    head = min(HEAD, size) if logits_BV.device.type == "cpu" else size
    sorted_BN = logits_BV.topk(head, dim=-1).values
    reached_BN = (sorted_BN - total_B1).exp().cumsum(dim=-1)
    if head < size and bool((reached_BN[:, -1] < mass).any()):
        sorted_BN = logits_BV.sort(dim=-1, descending=True).values
        reached_BN = (sorted_BN - total_B1).exp().cumsum(dim=-1)
    last_B1 = (reached_BN < mass).sum(dim=-1, keepdim=True).clamp_max(sorted_BN.shape[-1] - 1)
    return logits_BV.masked_fill(logits_BV < sorted_BN.gather(1, last_B1), float("-inf"))


def min_p(logits_BV: Tensor, ratio: float) -> Tensor:
    """Keep tokens at least ``ratio`` times as likely as the likeliest (Nguyen et al. 2024)."""
    floor_B1 = logits_BV.amax(dim=-1, keepdim=True) + torch.tensor(ratio, dtype=torch.float64).log().item()
    return logits_BV.masked_fill(logits_BV < floor_B1, float("-inf"))


def filtered(logits_BV: Tensor, seen_BV: Tensor | None, sampling: Sampling) -> Tensor:
    """Apply the filters of ``sampling`` in the order of its fields; the penalty needs ``seen_BV``."""
    logits_BV = logits_BV.float()
    if sampling.repetition_penalty != 1.0 and seen_BV is not None:
        logits_BV = repetition_penalty(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature not in (0.0, 1.0):
        logits_BV = temperature(logits_BV, sampling.temperature)
    if sampling.temperature == 0.0:
        return logits_BV
    if sampling.top_k:
        logits_BV = top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1.0:
        logits_BV = top_p(logits_BV, sampling.top_p)
    if sampling.min_p:
        logits_BV = min_p(logits_BV, sampling.min_p)
    return logits_BV


def greedy(logits_BV: Tensor) -> Tensor:
    """Return the likeliest token of each row (B,), the first of equals."""
    return logits_BV.argmax(dim=-1)


def exact_device(device: torch.device) -> torch.device:
    """Return a device for float64: ``device`` itself, or the CPU for MPS, which has none."""
    return torch.device("cpu") if device.type == "mps" else device


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw tokens (B,) from softmax(logits), by inverting the cumulative distribution at ``uniform_B`` in [0, 1).

    Each row uses one number, so that its tokens do not depend on the rest of the batch. ``uniform_B`` is float64 and
    may be on the CPU. For logits that are not finite the token is undefined.
    """
    exact = exact_device(logits_BV.device)
    cumulative_BV = logits_BV.softmax(dim=-1).to(exact).double().cumsum(dim=-1)
    # The last sum may not round to 1; a target below it always has a token with some probability.
    uniform_B = uniform_B.to(exact, non_blocking=True)
    target_B1 = uniform_B[:, None].clamp_max(1 - 2**-40) * cumulative_BV[:, -1:]
    drawn_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    return drawn_B.clamp_max(logits_BV.shape[-1] - 1).to(logits_BV.device)


class Uniforms:
    """An endless sequence of uniform numbers in [0, 1) for one row, from its seed.

    Drawn on the CPU, so that a seed gives the same numbers on every device.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._block: list[float] = []

    def draw(self) -> float:
        """Return the next number."""
        if not self._block:
            self._block = torch.rand(BLOCK, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._block.pop()
