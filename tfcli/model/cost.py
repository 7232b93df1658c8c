"""What a model costs, from its configuration alone: parameters, FLOPs, bytes. Nothing here is measured.

Multiply and add are two FLOPs. Counted are the matrix products, which is where the work is (Kaplan et al. 2020, 2.1);
norms, biases, rotations, activations and softmax are left out. A decoder's query t sees t + 1 keys, so over T positions
each sees (T + 1) / 2 on average; an encoder's sees all T; a local layer's no more than its window. Standard library
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tfcli.config.model import ModelConfig
from tfcli.errors import unknown

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Number of parameters by part; a tied head has none of its own."""

    embedding: int
    """Of tokens, positions and segments."""
    attention: int
    """Its matrices."""
    feed_forward: int
    """Its matrices."""
    norms: int
    biases: int
    """Of attention and feed-forward; a norm's counts as the norm's."""
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.attention + self.feed_forward + self.norms + self.biases + self.head

    @property
    def matrices(self) -> int:
        """The blocks' matrices: what every token is multiplied by, and what scaling laws count."""
        return self.attention + self.feed_forward


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """Forecast of a training step's peak, in bytes by what holds them.

    A step has two crests. When the forward pass is done all ``activations`` and ``logits`` are held; when the backward
    pass is done the ``gradients`` and the optimizer's ``workspace`` are. Gradients and activations meet only where
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
    """Count the parameters of each part of ``tfcli.model.transformer.Transformer``, of an encoder beside it too."""
    D, H, G, K, F = config.width, config.heads, config.kv_heads, config.head_width, config.ffn_width
    arch = config.architecture
    norm = D * (2 if arch.norms.kind == "layer" and arch.norms.bias else 1)
    norms = {"pre": 2, "post": 2, "sandwich": 4}[arch.norms.place]
    outer = (arch.norms.place != "post") + arch.embedding.norm
    rows = (
        config.vocab_size
        + arch.embedding.token_types
        + (config.context if arch.embedding.positions == "learned" else 0)
    )
    biases = (
        arch.attention.qkv_bias * (H + 2 * G) * K
        + arch.attention.out_bias * D
        + arch.feed_forward.bias * ((1 + arch.feed_forward.gated) * F + D)
    )
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
    """A decoder with its cross-attention, and the encoder beside it; they share the tokens' embedding."""
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
    """FLOPs per token of a forward pass over ``length`` positions with logits at each: training, or scoring a text."""
    return _read_flops(config, length) / length + _head_flops(config)


def training_flops(config: ModelConfig, length: int) -> float:
    """FLOPs per token of a training step: the backward pass costs twice the forward (Kaplan et al. 2020, 2.1)."""
    return 3 * forward_flops(config, length)


def prefill_flops(config: ModelConfig, length: int) -> float:
    """FLOPs to read ``length`` tokens: a prompt with the last position's logits, an encoder's text without."""
    return _read_flops(config, length) + (_head_flops(config) if config.architecture.causal else 0.0)


def decode_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of one new token that attends to ``length`` positions, itself among them, and to a source as long."""
    matrices, seen = parameters(config).matrices, _seen(config, length)
    if config.encoder_depth:
        matrices, seen = matrices - _once(config), seen + config.depth * length
    return 2 * matrices + seen * _flops_per_key(config) + _head_flops(config)


def pair_flops(config: ModelConfig, source: int, target: int) -> float:
    """FLOPs of a forward pass of an encoder-decoder over a source and a target, with its logits."""
    once = _once(config)
    keys = config.encoder_depth * source**2 + config.depth * (target * (target + 1) // 2 + source * target)
    products = 2.0 * (once * source + (parameters(config).matrices - once) * target) + keys * _flops_per_key(config)
    return products + _head_flops(config) * target


def _once(config: ModelConfig) -> int:
    """The matrices of an encoder-decoder that read the source: of the encoder, and of the keys and values of it."""
    kept = config.depth * 2 * config.width * config.kv_heads * config.head_width
    return parameters(config.encoder).matrices + kept


def weight_bytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes of all weights in one precision. Raises UserError for a precision that is not fp32 or bf16."""
    return parameters(config).total * width_of(precision)


def kv_bytes_per_token(config: ModelConfig, precision: Precision) -> int:
    """Bytes of keys and values that the cache holds for each position of one row."""
    return 2 * config.depth * config.kv_heads * config.head_width * width_of(precision)


def decode_bytes(config: ModelConfig, length: int, precision: Precision) -> int:
    """Bytes that must move through memory for one new token at batch 1 after ``length`` positions.

    Every matrix, bias and norm is read once, the head (tied or not) too, of each embedding one row; the cache is read
    whole, of a local layer the window, and one position of it written. Decoding is bound by this: it is never faster
    than bandwidth / ``decode_bytes``.
    """
    parts, arch = parameters(config), config.architecture
    rows = 1 + (arch.embedding.positions == "learned") + (arch.embedding.token_types > 0)
    read = parts.matrices + parts.norms + parts.biases + (config.vocab_size + rows) * config.width
    layer = kv_bytes_per_token(config, precision) // config.depth
    return read * width_of(precision) + (_seen(config, length) + config.depth) * layer


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
    ``device`` is "cpu" or another of torch's types, for the CPU's kernels (``tfcli/model/fused.py``) keep other
    tensors. The forecast is of live tensors: what the allocator keeps beyond them (on Linux a fifth to a half) is
    not in it.
    """
    parts, b, tokens = parameters(config), width_of(precision), micro_batch * length
    # Each product's weight is kept in the dtype of the product: of fused layers always a copy, else where it was cast.
    D, F, V = config.width, config.ffn_width, config.vocab_size
    qkv = D * (config.heads + 2 * config.kv_heads) * config.head_width
    fused = config.depth * (qkv + (2 * D * F if _swiglu(config) else 0))
    cast = parts.matrices - fused + V * D if b != 4 else 0
    far, near = _layers(config)
    short = device == "cpu" and length <= 512
    batched = [short and (b == 2 or _hides(config, length, local)) for local in (False, True)]
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


def _hides(config: ModelConfig, length: int, local: bool) -> bool:
    """Whether causality alone hides keys, without a mask."""
    return config.architecture.causal and not (local and config.architecture.windows.size < length)


def _kept_per_token(config: ModelConfig, length: int, batched: bool) -> int:
    """Numbers of a token that one block keeps for its backward pass; ``batched``: attention by batched products."""
    D, H, G, K, F = config.width, config.heads, config.kv_heads, config.head_width, config.ffn_width
    arch = config.architecture
    attention = D + D + H * K  # x, its norm, the output
    if arch.attention.qk_norm or not batched:
        attention += (H + 2 * G) * K  # as they were multiplied
    if batched:  # attend() multiplies in batches: q, k, v of every head and the weights
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


def _swiglu(config: ModelConfig) -> bool:
    return config.architecture.feed_forward.gated and config.architecture.feed_forward.activation == "silu"


def _largest_group(config: ModelConfig) -> int:
    """Parameters in Muon's largest group, the matrices of one shape, transposed or not.

    Of each it holds the gradient and the momentum side by side in fp32, the step in bf16 twice, and in fp32: 16 bytes.
    """
    D, F, HK, GK = config.width, config.ffn_width, config.heads * config.head_width, config.kv_heads * config.head_width
    sizes: dict[tuple[int, int], int] = {}
    for shape in ((HK, D), (GK, D), (GK, D), (D, HK), *[(F, D)] * (1 + config.architecture.feed_forward.gated), (D, F)):
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


def _read_flops(config: ModelConfig, length: int) -> float:
    """Of all blocks, over ``length`` positions that are read at once."""
    far, near = _layers(config)
    window = config.architecture.windows.size
    if config.architecture.causal:
        w = min(window, length)
        keys = far * (length * (length + 1) // 2) + near * (w * (w + 1) // 2 + (length - w) * w)
    else:
        w = min(window // 2, length - 1)  # to each side, but for those near an end
        keys = far * length**2 + near * (length * (2 * w + 1) - w * (w + 1))
    if config.encoder_depth:  # as many tokens of a source: each sees all of them, and each target token too
        keys += (config.encoder_depth + config.depth) * length**2
    return length * 2.0 * parameters(config).matrices + keys * _flops_per_key(config)


def _seen(config: ModelConfig, length: int) -> int:
    """Keys that one query sees after ``length`` positions, itself among them, summed over the layers."""
    far, near = _layers(config)
    return far * length + near * min(length, config.architecture.windows.size)


def _layers(config: ModelConfig) -> tuple[int, int]:
    """Number of layers that see all, and of local ones."""
    near = sum(map(config.is_local, range(config.depth)))
    return config.depth - near, near


def _flops_per_key(config: ModelConfig) -> float:
    """One query against one key and value, in every head of a layer: q k^T and weights v."""
    return 2.0 * 2 * config.heads * config.head_width
