"""The size of a new model, from the text, the machine and the time. The rest follows from the depth."""

from __future__ import annotations

import math
import time

import torch

from tfcli.config.model import ModelConfig
from tfcli.config.options import ModelOptions, PretrainConfig
from tfcli.errors import UserError
from tfcli.model.cost import parameters
from tfcli.model.layers import FeedForward, RMSNorm
from tfcli.objectives.table import objective
from tfcli.runtime import Runtime

PARAMETERS_PER_TOKEN = 5
"""Most parameters of the blocks per token of the text; with more the model only memorizes it."""
TOKENS_PER_PARAMETER = 5
"""Fewest tokens per parameter of the blocks. Compute-optimal is 20 (Hoffmann et al. 2022, table 3), but the optimum is
flat, and a model that is somewhat too large for its first run is the better one to continue."""


def vocab_size(text_bytes: int, *, depth: int | None, budget: float | None) -> int:
    """The vocabulary for a corpus of that many bytes: 4096 for 1 MB, doubling with every factor of ten.

    At most 8192, or 32768 for more than 8 blocks or a ``budget`` of more than an hour (in seconds): the head of a small
    model would cost more than all of its blocks.
    """
    exponent = 12 + math.log10(max(text_bytes, 1) / 1e6)
    large = (depth or 0) > 8 or (budget or 0.0) > 3600
    return int(min(32768 if large else 8192, max(512, 2 ** round(exponent))))


def flops_per_second(runtime: Runtime) -> float:
    """Measure the machine on a feed-forward layer with its norm, forward and backward, on 1024 tokens."""
    config = objective("gpt").shape(ModelOptions(), depth=3, vocab_size=512)
    layer = torch.nn.Sequential(RMSNorm(config.width, 1e-6), FeedForward(config)).to(runtime.device)
    for p in layer.parameters():
        torch.nn.init.constant_(p, 0.01)
    x = torch.ones(8, 128, config.width, dtype=runtime.dtype, device=runtime.device, requires_grad=True)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        layer(x).sum().backward()
        runtime.synchronize()
        best = min(best, time.perf_counter() - start)
    return 6.0 * sum(p.numel() for p in layer.parameters()) * 1024 / best


def depth(config: PretrainConfig, *, vocab_size: int, train_tokens: int, budget: float, runtime: Runtime) -> int:
    """The depth of the largest model that the budget and the text have enough tokens for."""
    options, arch = config.model, objective(config.model.arch)
    if options.width is not None:
        return arch.depth(options.width)
    rate = flops_per_second(runtime)
    best = 0
    for deeper in range(2, 25):
        try:
            model = arch.shape(options, depth=deeper, vocab_size=vocab_size)
        except UserError:  # the heads that were asked for do not divide this width
            continue
        best = best or deeper
        tokens, matrices = budget * rate / arch.training_flops(config, model), parameters(model).matrices
        if tokens < TOKENS_PER_PARAMETER * matrices or matrices > PARAMETERS_PER_TOKEN * train_tokens:
            break
        best = deeper
    return best or 2


def batch_size(model: ModelConfig, train_tokens: int) -> int:
    """Sequences per step: 1024 tokens for the smallest model, more with depth, at most a tenth of the text."""
    tokens = 1024 * 2 ** max(0, (model.depth - 3) // 2)
    most = max(1, (train_tokens - 1) // model.context // 10)
    return max(1, min(tokens // model.context, most))


def check_text(model: ModelConfig, train_tokens: int, batch: int) -> None:
    """Raise UserError for a context or a batch that is larger than the text."""
    if model.context + 1 > train_tokens:
        raise UserError(
            f"the training text has {train_tokens:,} tokens, too few for a context of {model.context}",
            hint=f"use more text, or --context {(train_tokens - 1) // 2}" if train_tokens > 16 else "use more text",
        )
    windows = (train_tokens - 1) // model.context
    if batch > windows:
        raise UserError(
            f"a batch of {batch} sequences of {model.context} tokens is larger than the data ({windows} sequences)",
            hint=f"use --batch-size {windows} at most, a shorter --context, or more text",
        )
