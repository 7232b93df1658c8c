"""The cost of a model from its configuration alone: parameters, FLOPs, bytes. Nothing here is measured.

Multiply and add are two FLOPs. Only matrix products count, which are nearly all of the work (Kaplan et al. 2020, 2.1):
not norms, biases, rotations, activations and softmax. Query t of a decoder attends to t + 1 keys, so that over T
positions the mean is (T + 1) / 2; of an encoder to all T; in a local layer to no more than the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tfcli.config.model import ModelConfig
from tfcli.errors import unknown

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Number of parameters by part; a tied head has none of its own.

    ``embedding`` counts tokens, positions and segments; ``attention`` and ``feed_forward`` their matrices; ``biases``
    those of both, while the bias of a norm is counted with the ``norms``.
    """

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    biases: int
    head: int

    @property
    def total(self) -> int:
        """The number of all parameters."""
        return self.embedding + self.attention + self.feed_forward + self.norms + self.biases + self.head

    @property
    def matrices(self) -> int:
        """The size of the blocks' matrices, by which every token is multiplied and which scaling laws count."""
        return self.attention + self.feed_forward


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """Forecast of a training step's peak, in bytes by what holds them.

    A step has two peaks. After the forward pass all ``activations`` and ``logits`` are held; after the backward pass
    the ``gradients`` and the optimizer's ``workspace``. Gradients and activations are held together only where
    micro-batches are accumulated. ``total`` is the higher peak; the program itself (Python, torch) comes on top.
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
    """Count the parameters of each part of ``tfcli.model.transformer.Transformer``, with its encoder if any."""
    D, H, G, K, F = config.width, config.heads, config.kv_heads, config.head_width, config.ffn_width
    arch = config.architecture
    norm = D * (2 if arch.norms.kind == "layer" and arch.norms.bias else 1)
    norms = {"pre": 2, "post": 2, "sandwich": 4}[arch.norms.place]
    outer = (arch.norms.place != "post") + arch.embedding.norm
    rows = config.vocab_size + arch.embedding.token_types
    rows += config.context if arch.embedding.positions == "learned" else 0
    biases = arch.attention.qkv_bias * (H + 2 * G) * K + arch.attention.out_bias * D
    biases += arch.feed_forward.bias * ((1 + arch.feed_forward.gated) * F + D)
    parts = Parameters(
        embedding=rows * D,
        attention=config.depth * (D * (H + 2 * G) * K + H * K * D),
        feed_forward=config.depth * (2 + arch.feed_forward.gated) * D * F,
        norms=config.depth * (norms * norm + arch.attention.qk_norm * 2 * K) + (outer - (not arch.norms.first)) * norm,
        biases=config.depth * biases,
        head=0 if config.tied else config.vocab_size * D,
    )
    return _with_encoder(parts, config, norm) if config.encoder_depth else parts


def _with_encoder(decoder: Parameters, config: ModelConfig, norm: int) -> Parameters:
    """Add cross-attention and the encoder to a decoder, which share the token embedding."""
    arch, encoder = config.architecture, parameters(config.encoder)
    HK, GK = config.heads * config.head_width, config.kv_heads * config.head_width
    cross = 2 * config.width * (HK + GK)
    biases = arch.attention.qkv_bias * (HK + 2 * GK) + arch.attention.out_bias * config.width
    return Parameters(
        embedding=decoder.embedding + encoder.embedding - config.vocab_size * config.width,
        attention=decoder.attention + encoder.attention + config.depth * cross,
        feed_forward=decoder.feed_forward + encoder.feed_forward,
        norms=decoder.norms + encoder.norms + config.depth * (2 if arch.norms.place == "sandwich" else 1) * norm,
        biases=decoder.biases + encoder.biases + config.depth * biases,
        head=decoder.head,
    )


def forward_flops(config: ModelConfig, length: int) -> float:
    """Return the FLOPs per token of a forward pass over ``length`` positions with logits at each."""
    return _read_flops(config, length) / length + _head_flops(config)


def training_flops(config: ModelConfig, length: int) -> float:
    """Return the FLOPs per token of a training step: backward costs twice the forward (Kaplan et al. 2020, 2.1)."""
    return 3 * forward_flops(config, length)


def prefill_flops(config: ModelConfig, length: int) -> float:
    """Return the FLOPs to read ``length`` tokens: a prompt with the last position's logits, or an encoder's text."""
    return _read_flops(config, length) + (_head_flops(config) if config.architecture.causal else 0.0)


def decode_flops(config: ModelConfig, length: int) -> float:
    """Return the FLOPs of one new token that attends to ``length`` positions with its own, and to a source as long."""
    matrices, seen = parameters(config).matrices, _seen(config, length)
    if config.encoder_depth:
        matrices, seen = matrices - _once(config), seen + config.depth * length
    return 2 * matrices + seen * _flops_per_key(config) + _head_flops(config)


def pair_flops(config: ModelConfig, source: int, target: int) -> float:
    """Return the FLOPs of a forward pass of an encoder-decoder over a source and a target, with its logits."""
    once = _once(config)
    keys = config.encoder_depth * source**2 + config.depth * (target * (target + 1) // 2 + source * target)
    products = 2.0 * (once * source + (parameters(config).matrices - once) * target) + keys * _flops_per_key(config)
    return products + _head_flops(config) * target


def _once(config: ModelConfig) -> int:
    """Size of the matrices that read the source: the encoder's and those of cross-attention's keys and values."""
    kept = config.depth * 2 * config.width * config.kv_heads * config.head_width
    return parameters(config.encoder).matrices + kept


def weight_bytes(config: ModelConfig, precision: Precision) -> int:
    """Return the bytes of all weights in one precision. Raises UserError for one that is not fp32 or bf16."""
    return parameters(config).total * width_of(precision)


def kv_bytes_per_token(config: ModelConfig, precision: Precision) -> int:
    """Return the bytes of keys and values in the cache for each position of one row."""
    return 2 * config.depth * config.kv_heads * config.head_width * width_of(precision)


def decode_bytes(config: ModelConfig, length: int, precision: Precision) -> int:
    """Return the bytes that must move through memory for one new token at batch 1 after ``length`` positions.

    Every matrix, bias and norm and the head (tied or not) are read once, and one row of each embedding; the whole cache
    is read, in local layers the window, and one position written. Decoding is bound by this: its rate is at most
    bandwidth / ``decode_bytes``.
    """
    parts, arch = parameters(config), config.architecture
    rows = 1 + (arch.embedding.positions == "learned") + (arch.embedding.token_types > 0)
    read = parts.matrices + parts.norms + parts.biases + (config.vocab_size + rows) * config.width
    layer = kv_bytes_per_token(config, precision) // config.depth
    return read * width_of(precision) + (_seen(config, length) + config.depth) * layer


def training_memory(
    config: ModelConfig, *, micro_batch: int, length: int, precision: Precision, device: str = "cpu",
    accumulated: bool = False,
) -> TrainingMemory:  # fmt: skip
    """Forecast the peak memory of a training step of ``micro_batch`` rows of ``length`` tokens.

    Weights, gradients and optimizer state are fp32: Muon keeps one momentum for each of the blocks' matrices, AdamW
    two moments for everything else. Activations are what autograd keeps for the backward pass of this code, not
    compiled; ``device`` is "cpu" or another of torch's types, because the CPU's kernels (``tfcli/model/fused.py``) keep
    other tensors. The forecast counts live tensors, not what the allocator keeps (on Linux a fifth to a half more).
    """
    parts, b, tokens = parameters(config), width_of(precision), micro_batch * length
    # Each product's weight is kept in the dtype of the product: a copy for fused layers and where it was cast.
    D, F, V = config.width, config.ffn_width, config.vocab_size
    qkv = D * (config.heads + 2 * config.kv_heads) * config.head_width
    feed_forward = config.architecture.feed_forward
    swiglu = feed_forward.gated and feed_forward.activation == "silu"
    fused = config.depth * (qkv + 2 * D * F * swiglu)
    cast = parts.matrices - fused + V * D if b != 4 else 0
    far, near = _layers(config)
    short, causal = device == "cpu" and length <= 512, config.architecture.causal
    # Causality alone hides keys, without a mask, where no window does.
    hides = (causal, causal and config.architecture.windows.size >= length)
    batched = [short and (b == 2 or alone) for alone in hides]
    kept = far * _kept_per_token(config, length, batched[0]) + near * _kept_per_token(config, length, batched[1])
    held = tokens * (kept + (2 + config.architecture.embedding.norm) * D)  # and the final norm's two ends
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


def _kept_per_token(config: ModelConfig, length: int, batched: bool) -> int:
    """Count the numbers per token that a block keeps for backward; ``batched``: with attention as batched products."""
    D, H, G, K, F = config.width, config.heads, config.kv_heads, config.head_width, config.ffn_width
    arch = config.architecture
    attention = D + D + H * K  # x, its norm, the output
    if arch.attention.qk_norm or not batched:
        attention += (H + 2 * G) * K  # the outputs of the projections
    if batched:  # q, k, v of every head and the weights
        attention += 3 * H * K + H * length
    else:
        rotated = arch.attention.qk_norm or arch.embedding.positions == "rope"
        attention += rotated * (H + G) * K + (2 * H * K if G != H else 0)  # then k, v repeated for each query head
    feed_forward = D + D  # x, its norm
    if arch.feed_forward.gated:
        feed_forward += 2 * F + F + F  # gate and up, sigmoid or activation of the gate, the product
    else:
        feed_forward += F if arch.feed_forward.activation == "relu" else 2 * F
    return attention + feed_forward + (2 * D if arch.norms.place == "sandwich" else 0)


def _largest_group(config: ModelConfig) -> int:
    """Count the parameters in Muon's largest group, the matrices of one shape, transposed or not.

    For each it holds gradient and momentum in fp32, the step twice in bf16 and once in fp32: 16 bytes.
    """
    D, F, HK, GK = config.width, config.ffn_width, config.heads * config.head_width, config.kv_heads * config.head_width
    matrices = [(HK, D), (GK, D), (GK, D), (D, HK), *[(F, D)] * (1 + config.architecture.feed_forward.gated), (D, F)]
    shapes = [tuple(sorted(shape)) for shape in matrices]
    return max(config.depth * shapes.count((a, b)) * a * b for a, b in shapes)


def width_of(precision: str) -> int:
    """Return the bytes of one number. Raises UserError for a precision that is not fp32 or bf16."""
    widths = {"fp32": 4, "bf16": 2}
    if precision not in widths:
        raise unknown("precision", precision, tuple(widths))
    return widths[precision]


def _head_flops(config: ModelConfig) -> float:
    return 2.0 * config.vocab_size * config.width


def _read_flops(config: ModelConfig, length: int) -> float:
    """Count the FLOPs of all blocks over ``length`` positions that are read at once."""
    far, near = _layers(config)
    window = config.architecture.windows.size
    if config.architecture.causal:
        w = min(window, length)
        keys = far * (length * (length + 1) // 2) + near * (w * (w + 1) // 2 + (length - w) * w)
    else:
        w = min(window // 2, length - 1)  # to each side, except near the ends
        keys = far * length**2 + near * (length * (2 * w + 1) - w * (w + 1))
    if config.encoder_depth:  # a source as long: its tokens and the target's attend to all of it
        keys += (config.encoder_depth + config.depth) * length**2
    return length * 2.0 * parameters(config).matrices + keys * _flops_per_key(config)


def _seen(config: ModelConfig, length: int) -> int:
    """Count the keys that the query at position ``length`` attends to, summed over the layers."""
    far, near = _layers(config)
    return far * length + near * min(length, config.architecture.windows.size)


def _layers(config: ModelConfig) -> tuple[int, int]:  # global and local ones
    near = sum(map(config.is_local, range(config.depth)))
    return config.depth - near, near


def _flops_per_key(config: ModelConfig) -> float:
    """FLOPs of one query with one key and value in every head of a layer: q k^T and weights v."""
    return 2.0 * 2 * config.heads * config.head_width
