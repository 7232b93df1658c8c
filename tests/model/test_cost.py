"""The forecasts of model/cost.py against real modules, a FLOP counter and the bytes that torch allocates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    WindowConfig,
)
from tfcli.config.options import OptimOptions
from tfcli.errors import UserError
from tfcli.model import cost
from tfcli.model.attention import band_mask
from tfcli.model.cache import KVCache
from tfcli.model.transformer import Transformer, initialize
from tfcli.tasks.lm import task as lm
from tfcli.train.optim import Optimizers

CONFIG = ModelConfig(
    vocab_size=512, context=64, depth=3, width=64, heads=4, kv_heads=2, head_width=24, ffn_width=160
)  # fmt: skip
GPT2 = Architecture(
    norms=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    embedding=EmbeddingConfig(positions="learned"),
    feed_forward=FeedForwardConfig(activation="gelu", gated=False, bias=True),
)
ARCHITECTURES = {
    "llama": Architecture(attention=AttentionConfig(qk_norm=False)),
    "gpt2": GPT2,
    "bert": replace(
        GPT2,
        causal=False,
        norms=replace(GPT2.norms, place="post"),
        embedding=replace(GPT2.embedding, norm=True, token_types=2),
    ),
    "gemma": Architecture(
        norms=NormConfig(place="sandwich"),
        feed_forward=FeedForwardConfig(activation="gelu_tanh"),
        windows=WindowConfig(size=16, every=2),
    ),
    "modernbert": Architecture(
        causal=False,
        norms=NormConfig(kind="layer"),
        feed_forward=FeedForwardConfig(activation="gelu"),
        windows=WindowConfig(size=16),
        embedding=EmbeddingConfig(norm=True),
    ),
    "relu": Architecture(
        feed_forward=FeedForwardConfig(activation="relu", gated=False), attention=AttentionConfig(qkv_bias=True)
    ),
}
WIRED = [replace(CONFIG, architecture=architecture) for architecture in ARCHITECTURES.values()]
VARIANTS = [
    CONFIG,
    *WIRED,
    replace(CONFIG, tied=False),
    replace(CONFIG, kv_heads=4),
    replace(CONFIG, depth=1, head_width=16, kv_heads=1),
]


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    initialize(model, seed=0)
    return model


@pytest.mark.parametrize("config", VARIANTS)
def test_parameters_are_those_of_the_module(config: ModelConfig) -> None:
    model = Transformer(config)
    counted = {"embedding": 0, "attention": 0, "feed_forward": 0, "norms": 0, "biases": 0, "head": 0}
    called = {"embed": "embedding", "positions": "embedding", "types": "embedding", "ffn": "feed_forward"}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0] if "blocks" not in name else name.split(".")[2]
        part = "norms" if "norm" in name else "biases" if name.endswith("bias") else part
        counted[called.get(part, part)] += parameter.numel()
    parts = cost.parameters(config)
    assert {name: getattr(parts, name) for name in counted} == counted
    assert parts.total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["ours", *ARCHITECTURES])
def test_flops_are_those_that_torch_counts(architecture: str) -> None:
    # torch counts attention over all T keys of each query; the forecast counts those that it may see.
    config, T = replace(CONFIG, kv_heads=4, architecture=ARCHITECTURES.get(architecture, Architecture())), 32
    model = build(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(1, T, dtype=torch.long)))
    attention = 2 * 2 * config.depth * config.heads * config.head_width
    keys = sum(int(model_mask(config, T, config.is_local(layer)).sum()) for layer in range(config.depth))
    expected = counter.get_total_flops() - attention * T * T + attention / config.depth * keys
    # On CPU the counter misses the fused attention kernel: accept the count with and without it.
    assert T * cost.forward_flops(config, T) in (expected, expected + attention * T * T)
    assert cost.training_flops(config, T) == 3 * cost.forward_flops(config, T)


def model_mask(config: ModelConfig, T: int, local: bool) -> torch.Tensor:
    """True where a query looks."""
    if local:
        return band_mask(T, config.architecture.windows.size, config.architecture.causal, torch.device("cpu"))
    return torch.ones(T, T, dtype=torch.bool).tril(0 if config.architecture.causal else T)


def test_two_sides_of_one_length_cost_what_a_step_of_each_does() -> None:
    """Would catch a part that is counted on the wrong side, and a shorter target that is paid for in full."""
    config = replace(CONFIG, kv_heads=4, encoder_depth=2, architecture=GPT2)
    assert cost.pair_flops(config, 20, 20) == 20 * cost.forward_flops(config, 20)
    model = build(config)
    source, target = torch.zeros(1, 24, dtype=torch.int64), torch.zeros(1, 7, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.logits(model(target, memory=model.encode(source)))
    # As above: torch counts attention over all keys, or on CPU not at all.
    per_key, D, E = 4 * config.heads * config.head_width, config.depth, config.encoder_depth
    seen, whole = E * 24 * 24 + D * (7 * 8 // 2 + 24 * 7), E * 24 * 24 + D * (7 * 7 + 24 * 7)
    products = cost.pair_flops(config, 24, 7) - per_key * seen
    assert counter.get_total_flops() in (products, products + per_key * whole)


def test_a_local_layer_costs_its_window() -> None:
    """Would catch a long context charged in full to layers that never look back so far."""
    config = replace(CONFIG, depth=4, architecture=Architecture(windows=WindowConfig(size=8, every=2)))
    assert cost.decode_flops(config, 40) - cost.decode_flops(config, 39) == 2 * 4 * config.heads * config.head_width
    layer = cost.kv_bytes_per_token(config, "bf16") // 4
    assert cost.decode_bytes(config, 40, "bf16") - cost.decode_bytes(config, 39, "bf16") == 2 * layer
    steps = sum(cost.decode_flops(config, length) for length in range(1, 31))
    assert cost.prefill_flops(config, 30) == steps - 29 * 2 * config.vocab_size * config.width


def test_prefill_is_the_sum_of_its_positions_with_one_row_of_logits() -> None:
    head = 2 * CONFIG.vocab_size * CONFIG.width
    steps = sum(cost.decode_flops(CONFIG, length) for length in range(1, 11))
    assert cost.prefill_flops(CONFIG, 10) == steps - 9 * head
    assert cost.forward_flops(CONFIG, 10) == pytest.approx(steps / 10)
    assert cost.prefill_flops(CONFIG, 1) == cost.decode_flops(CONFIG, 1)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_bytes_are_those_of_the_tensors(precision: cost.Precision, dtype: torch.dtype) -> None:
    model = build(CONFIG).to(dtype)
    assert cost.weight_bytes(CONFIG, precision) == sum(p.nbytes for p in model.parameters())
    cache = KVCache(CONFIG, batch=1, capacity=64, dtype=dtype, device=torch.device("cpu"))
    assert cost.kv_bytes_per_token(CONFIG, precision) * 64 == sum(
        t.nbytes for t in (*cache.buffers.keys, *cache.buffers.values)
    )
    # A tied model reads all its weights and one row of the embedding, and ten cached positions; it writes an eleventh.
    row = CONFIG.width * dtype.itemsize
    assert cost.decode_bytes(CONFIG, 10, precision) == (
        cost.weight_bytes(CONFIG, precision) + row + 11 * cost.kv_bytes_per_token(CONFIG, precision)
    )


def test_unknown_precision_names_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        cost.weight_bytes(CONFIG, "bf61")  # type: ignore[arg-type]
    assert error.value.hint == "did you mean 'bf16'?"


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, kv_heads=4), replace(CONFIG, tied=False), *WIRED])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_activations_are_what_autograd_keeps(
    config: ModelConfig, precision: cost.Precision, dtype: torch.dtype
) -> None:
    model, kept = build(config), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = lm.loss(model, torch.zeros(4, 65, dtype=torch.long), dtype=dtype)
    assert loss.isfinite()
    forecast = cost.training_memory(config, micro_batch=4, length=64, precision=precision)
    logits = 4 * 64 * config.vocab_size * dtype.itemsize  # their gradient, computed ahead, is kept as well
    # 3 %: norms' scales, masks and ids are left out.
    assert sum(kept.values()) == pytest.approx(forecast.activations + logits, rel=0.03)


@pytest.mark.parametrize(
    ("precision", "dtype", "micro_batches", "rows"),
    [("fp32", torch.float32, 1, 16), ("bf16", torch.bfloat16, 1, 16), ("fp32", torch.float32, 2, 1)],
)
def test_training_memory_is_what_torch_allocates(
    precision: cost.Precision, dtype: torch.dtype, micro_batches: int, rows: int
) -> None:
    config = replace(CONFIG, width=128, ffn_width=344, vocab_size=1024)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build(config)
        optimizers = Optimizers(model, OptimOptions(), muon_lr=1e-3, lr=1e-3)
        for _ in range(2):
            for _ in range(micro_batches):
                loss, count = lm.loss(model, torch.zeros(rows, 65, dtype=torch.long), dtype=dtype)
                (loss / count).backward()
            optimizers.step(1.0)
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    forecast = cost.training_memory(
        config, micro_batch=rows, length=64, precision=precision, accumulated=micro_batches > 1
    )
    assert forecast.total == pytest.approx(peak, rel=0.15)


def test_training_memory_has_two_crests() -> None:
    one = cost.training_memory(CONFIG, micro_batch=1, length=8, precision="fp32")
    many = cost.training_memory(CONFIG, micro_batch=64, length=64, precision="fp32")
    accumulated = cost.training_memory(CONFIG, micro_batch=64, length=64, precision="fp32", accumulated=True)
    assert one.total == one.weights + one.optimizer + one.gradients + one.workspace
    assert many.total == many.weights + many.optimizer + many.activations + many.logits
    assert accumulated.total == many.total + many.gradients
    # Past the CPU kernels' length the T x T weights are no longer held.
    long = [
        cost.training_memory(CONFIG, micro_batch=1, length=n, precision="fp32").activations / n for n in (512, 1024)
    ]
    assert long[1] < long[0]
