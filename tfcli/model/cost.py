"""What a model costs, from its configuration alone: parameters, FLOPs, bytes. Nothing here is measured.

Multiply and add are two FLOPs. Counted are the matrix products, which is where the work is (Kaplan et al. 2020, 2.1);
norms, rotations, activations and softmax are left out. Attention is causal: query t sees t + 1 keys, so over T
positions each sees (T + 1) / 2 on average. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tfcli.config import ModelConfig
from tfcli.errors import unknown

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Number of parameters by part; a tied head has none of its own."""

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.attention + self.feed_forward + self.norms + self.head

    @property
    def matrices(self) -> int:
        """The blocks' matrices: what every token is multiplied by, and what scaling laws count."""
        return self.attention + self.feed_forward


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """Forecast of a training step's peak, in bytes by what holds them.

    A step has two crests. When the forward pass is done all ``activations`` and ``logits`` are held; when the backward
    pass is done the ``gradients`` and the optimizer's ``workspace`` are. Gradients and activations meet only where
    micro-batches are accumulated. ``total`` is the higher crest; the program itself (Python, torch) comes on top.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    workspace: int
    accumulated: bool

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        forward = self.activations + self.logits + (self.gradients if self.accumulated else 0)
        return self.weights + self.optimizer + max(forward, self.gradients + self.workspace)


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of each part of ``tfcli.model.transformer.Transformer``."""
    D, H, G, K = config.width, config.heads, config.kv_heads, config.head_width
    return Parameters(
        embedding=config.vocab_size * D,
        attention=config.depth * (D * (H + 2 * G) * K + H * K * D),
        feed_forward=config.depth * 3 * D * config.ffn_width,
        norms=config.depth * (2 * D + 2 * K) + D,
        head=0 if config.tied else config.vocab_size * D,
    )


def forward_flops(config: ModelConfig, length: int) -> float:
    """FLOPs per token of a forward pass over ``length`` positions with logits at each: training, or scoring a text."""
    return prefill_flops(config, length) / length + (length - 1) / length * _head_flops(config)


def training_flops(config: ModelConfig, length: int) -> float:
    """FLOPs per token of a training step: the backward pass costs twice the forward (Kaplan et al. 2020, 2.1)."""
    return 3 * forward_flops(config, length)


def prefill_flops(config: ModelConfig, length: int) -> float:
    """FLOPs to read a prompt of ``length`` tokens: every position's keys and values, the last position's logits."""
    keys = length * (length + 1) / 2
    return length * 2 * parameters(config).matrices + keys * _flops_per_key(config) + _head_flops(config)


def decode_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of one new token that attends to ``length`` positions, itself among them."""
    return 2 * parameters(config).matrices + length * _flops_per_key(config) + _head_flops(config)


def weight_bytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes of all weights in one precision. Raises UserError for a precision that is not fp32 or bf16."""
    return parameters(config).total * width_of(precision)


def kv_bytes_per_token(config: ModelConfig, precision: Precision) -> int:
    """Bytes of keys and values that the cache holds for each position of one row."""
    return 2 * config.depth * config.kv_heads * config.head_width * width_of(precision)


def decode_bytes(config: ModelConfig, length: int, precision: Precision) -> int:
    """Bytes that must move through memory for one new token at batch 1 after ``length`` positions.

    Every matrix and norm is read once, the head (tied or not) too, of the embedding one row; the cache is read whole
    and one position of it written. Decoding is bound by this: it is never faster than bandwidth / ``decode_bytes``.
    """
    parts = parameters(config)
    read = parts.matrices + parts.norms + config.vocab_size * config.width + config.width
    return read * width_of(precision) + (length + 1) * kv_bytes_per_token(config, precision)


def training_memory(
    config: ModelConfig,
    *,
    micro_batch: int,
    length: int,
    precision: Precision,
    device: str = "cpu",
    accumulated: bool = False,
) -> TrainingMemory:
    """Forecast the peak memory of a training step of ``micro_batch`` rows of ``length`` tokens.

    Weights, gradients and optimizer state are fp32: Muon keeps one momentum for each of the blocks' matrices, AdamW
    two moments for all else. Activations are what autograd keeps for the backward pass of this very code, not compiled;
    ``device`` is "cpu" or another of torch's types, for the CPU's kernels (``tfcli/model/kernels.py``) keep other
    tensors. The forecast is of live tensors: what the allocator keeps beyond them (on Linux a fifth to a half) is
    not in it.
    """
    parts, b, tokens = parameters(config), width_of(precision), micro_batch * length
    # Each product's weight is kept in the dtype of the product: of fused layers always a copy, else where it was cast.
    D, F, V = config.width, config.ffn_width, config.vocab_size
    qkv = D * (config.heads + 2 * config.kv_heads) * config.head_width
    fused = config.depth * (qkv + 2 * D * F)
    cast = parts.matrices - fused + V * D if b != 4 else 0
    held = tokens * (config.depth * _kept_per_token(config, length, device) + 2 * D)  # and the final norm's two ends
    return TrainingMemory(
        weights=4 * parts.total,
        optimizer=4 * (parts.matrices + 2 * (parts.total - parts.matrices)),
        gradients=4 * parts.total,
        activations=(held + fused + cast) * b,
        # cpu: logits and probabilities; else log-probabilities and two gradients in fp32 as the backward pass begins.
        logits=tokens * V * (2 * b if device == "cpu" else 12),
        workspace=16 * _largest_group(config),
        accumulated=accumulated,
    )


def _kept_per_token(config: ModelConfig, length: int, device: str) -> int:
    """Numbers of a token that one block keeps for its backward pass."""
    D, H, G, K, F = config.width, config.heads, config.kv_heads, config.head_width, config.ffn_width
    attention = D + D + (H + 2 * G) * K + H * K  # x, its norm, qkv, the output
    if device == "cpu" and length <= 512:  # attend() multiplies in batches: q, k, v of every head and the weights
        attention += 3 * H * K + H * length
    else:
        attention += (H + G) * K + (2 * H * K if G != H else 0)  # rotated q, k; then k, v repeated for each query head
    feed_forward = D + D + 2 * F + F + F  # x, its norm, gate and up, sigmoid or silu of the gate, the product
    return attention + feed_forward


def _largest_group(config: ModelConfig) -> int:
    """Parameters in Muon's largest group, the matrices of one shape, transposed or not.

    Of each it holds the gradient and the momentum side by side in fp32, the step in bf16 twice, and in fp32: 16 bytes.
    """
    D, HK, GK = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    sizes: dict[tuple[int, int], int] = {}
    for shape in (
        (HK, D),
        (GK, D),
        (GK, D),
        (D, HK),
        (config.ffn_width, D),
        (config.ffn_width, D),
        (D, config.ffn_width),
    ):
        key = (min(shape), max(shape))
        sizes[key] = sizes.get(key, 0) + config.depth * shape[0] * shape[1]
    return max(sizes.values())


def width_of(precision: str) -> int:
    """Bytes of one number. Raises UserError for a precision that is not fp32 or bf16."""
    if precision == "fp32":
        return 4
    if precision == "bf16":
        return 2
    raise unknown("precision", precision, ("fp32", "bf16"))


def _head_flops(config: ModelConfig) -> float:
    return 2.0 * config.vocab_size * config.width


def _flops_per_key(config: ModelConfig) -> float:
    """One query against one key and value, in every layer and head: q k^T and weights v."""
    return 2.0 * 2 * config.depth * config.heads * config.head_width
