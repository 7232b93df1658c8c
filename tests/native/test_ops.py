"""The compiled step against its twin: PyTorch's operators on the same weights."""

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import config, model

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    NormConfig,
    RopeScaling,
    WindowConfig,
)
from tfcli.infer import step as stepper
from tfcli.infer.decode import Decoder
from tfcli.infer.residency import pack_weights
from tfcli.model import fused
from tfcli.model.attention import additive, attend, attend_reference, causal_mask
from tfcli.model.cache import KVCache
from tfcli.model.layers import activate, gated
from tfcli.model.quant import matrix as quant
from tfcli.model.transformer import Transformer
from tfcli.native import library, ops

GPT2 = Architecture(
    norms=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    embedding=EmbeddingConfig(positions="learned"),
    feed_forward=FeedForwardConfig(activation="gelu_tanh", gated=False, bias=True),
)
GEMMA = Architecture(
    norms=NormConfig(place="sandwich"),
    feed_forward=FeedForwardConfig(activation="gelu_tanh"),
    embedding=EmbeddingConfig(scale=5.6),
    windows=WindowConfig(size=4, every=2),
    attention=AttentionConfig(scale=0.3),
)
LLAMA3 = Architecture(
    attention=AttentionConfig(qk_norm=False, rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_context=16))
)
ODD = {"head_width": 10, "heads": 3, "kv_heads": 1, "width": 30, "ffn_width": 50, "vocab_size": 403}
MODELS = {
    "ours": {},
    "untied": {"tied": False},
    "gpt2": {"architecture": GPT2},
    "gemma": {"architecture": GEMMA},
    "llama3, odd widths": {"architecture": LLAMA3, **ODD},
    "relu": {"architecture": Architecture(feed_forward=FeedForwardConfig(activation="relu", gated=False))},
    "gelu": {"architecture": Architecture(feed_forward=FeedForwardConfig(activation="gelu"))},
}
PROMPTS = ([3, 4, 5, 6, 7, 8], [9, 8], [5])


def quantized(core: Transformer, bits: quant.Bits) -> Transformer:
    """Every matrix of a model in 4 or 8 bits, in place."""
    for block in core.blocks:
        for part, names in ((block.attention, "qkvo"), (block.ffn, ("gate", "up", "down"))):
            for name in names:
                if hasattr(part, name):
                    layer = getattr(part, name)
                    setattr(part, name, quant.quantize(layer.weight, bits, bias=layer.bias))
    head = quant.quantize(core.head.weight, bits)
    core.embed, core.head = quant.QuantEmbedding(head), head  # type: ignore[assignment]
    return core


@torch.inference_mode()
def compare(core: Transformer, twin: Transformer, *, dtype: torch.dtype, steps: int = 6) -> float:
    """Largest difference of the logits of three ragged rows, step by step, relative to the largest logit.

    The compiled step runs ``core``; ``twin`` in fp32 reads each row anew.
    """
    assert ops.ready(), ops.unavailable()
    native_step = stepper.Stepper(core, exact=dtype == torch.float32)
    cache = KVCache(core.config, batch=3, capacity=core.config.context, dtype=dtype, device=core.device)
    rows = [list(prompt) for prompt in PROMPTS]
    for index, row in enumerate(rows):
        if len(row) > 1:
            core(torch.tensor([row[:-1]]), cache=cache.rows(index, 1), dtype=dtype)
    worst = 0.0
    for _ in range(steps):
        logits = native_step.step([row[-1] for row in rows], cache)
        for index, row in enumerate(rows):
            expected = twin.logits(twin(torch.tensor([row]))[:, -1])[0]
            worst = max(worst, float((logits[index] - expected).abs().max() / expected.abs().max()))
            row.append(int(expected.argmax()))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_fp32_equals_pytorch(name: str) -> None:
    """Every architecture that decodes: would catch a wrong head, position, window, norm, bias or activation."""
    core = model(**MODELS[name]).requires_grad_(False)
    assert stepper.supports(core)
    assert compare(core, core, dtype=torch.float32) < 2e-5  # sums in another order


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama3, odd widths"])
def test_bf16_is_as_near_to_fp32_as_pytorch_is(name: str) -> None:
    """Products of bf16 numbers, all else in fp32: not further from the truth than bf16 throughout."""
    twin = model(scale=0.1, **MODELS[name]).requires_grad_(False)
    core = model(scale=0.1, **MODELS[name]).requires_grad_(False).to(torch.bfloat16)
    twin.load_state_dict(core.state_dict())  # the same numbers, computed with in fp32
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        expected = twin.logits(twin(ids))
        eager = float((core.logits(core(ids)).float() - expected).abs().max() / expected.abs().max())
    assert compare(core, twin, dtype=torch.bfloat16) < max(2 * eager, 0.01)
    pack_weights(core)
    assert compare(core, twin, dtype=torch.bfloat16) < max(2 * eager, 0.01)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["ours", "llama3, odd widths", "gpt2"])
def test_quantized_weights_equal_their_numbers(name: str, bits: quant.Bits) -> None:
    """The step on codes equals fp32 products with the numbers they stand for: exactly, and with bf16 activations."""
    core = quantized(model(scale=0.1, **{**MODELS[name], "tied": True}).requires_grad_(False), bits)
    assert compare(core, core, dtype=torch.float32) < 2e-5
    core_bf16 = quantized(model(scale=0.1, **{**MODELS[name], "tied": True}).requires_grad_(False), bits)
    for module in core_bf16.modules():  # norms and positions compute in bf16, codes stay
        if not isinstance(module, quant.QuantMatrix):
            for key, value in list(module._parameters.items()):
                if value is not None:
                    module._parameters[key] = torch.nn.Parameter(value.to(torch.bfloat16), requires_grad=False)
    assert compare(core_bf16, core, dtype=torch.bfloat16) < 0.03  # bf16: 2^-8 a rounding, some twenty of them


@pytest.mark.parametrize("head_width", [16, 64])
@pytest.mark.parametrize(
    ("dtype", "packed"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, packed: bool, head_width: int) -> None:
    """Bit for bit, at any batch size: what makes a batch give the same text as one by one."""
    core = model(width=96, heads=6, head_width=head_width, ffn_width=160).requires_grad_(False).to(dtype)
    if packed:
        pack_weights(core)
    native_step = stepper.Stepper(core, exact=dtype == torch.float32)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (3, 9, 1, 14, 5, 2, 8)]

    def logits(some: list[list[int]]) -> torch.Tensor:
        cache = KVCache(core.config, batch=len(some), capacity=20, dtype=dtype, device=core.device)
        out = torch.empty(0)
        for position in range(max(map(len, some))):  # all by steps; rows that are done are fed their last again
            held = [min(position, len(row) - 1) for row in some]
            cache.set_lengths(held)
            out = native_step.step([row[at] for row, at in zip(some, held, strict=True)], cache)
        return out

    together = logits(rows)
    for index, row in enumerate(rows):
        assert torch.equal(logits([row])[0], together[index])
    assert torch.equal(logits(rows[:5]), together[:5])


@pytest.mark.parametrize(
    "architecture", [Architecture(), Architecture(windows=WindowConfig(size=70, every=2))], ids=["global", "windows"]
)
@torch.inference_mode()
def test_long_rows_read_in_parts_equal_pytorch_and_stand_alone(architecture: Architecture) -> None:
    """Rows on both sides of the length from which positions are shared among threads, one row crossing it, in bf16."""
    made = {
        "context": 320,
        "head_width": 64,
        "heads": 6,
        "kv_heads": 2,
        "width": 96,
        "scale": 0.1,
        "architecture": architecture,
    }
    core = model(**made).requires_grad_(False).to(torch.bfloat16)
    twin = model(**made).requires_grad_(False)
    twin.load_state_dict(core.state_dict())
    native_step = stepper.Stepper(core, exact=False)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (300, 126, 41, 171)]

    def steps(some: list[list[int]]) -> list[torch.Tensor]:
        cache = KVCache(core.config, batch=len(some), capacity=320, dtype=torch.bfloat16, device=core.device)
        for index, row in enumerate(some):
            core(torch.tensor([row[:-5]]), cache=cache.rows(index, 1))
        return [native_step.step([row[at] for row in some], cache) for at in range(-5, 0)]

    together = steps(rows)
    for index, row in enumerate(rows):
        alone = steps([row])
        assert all(torch.equal(one[0], both[index]) for one, both in zip(alone, together, strict=True))
        expected = twin.logits(twin(torch.tensor([row])))[0, -5:]
        got = torch.stack([step[index] for step in together])
        assert float((got - expected).abs().max() / expected.abs().max()) < 0.03


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "G", "T", "S", "K"), [(9, 3, 70, 70, 64), (4, 4, 33, 100, 32), (2, 1, 5, 5, 96)])
@torch.inference_mode()
def test_attention_of_prompts_equals_the_formula(causal: bool, H: int, G: int, T: int, S: int, K: int) -> None:
    """Groups, chunks that follow others, sizes that fill no block: as near to fp32 as bf16 weights allow."""
    if not ops.fast(torch.bfloat16):
        pytest.skip("this processor does not multiply bf16")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, t, K, generator=generator).to(torch.bfloat16) for n, t in ((H, T), (G, S), (G, S)))
    mask = causal_mask(T, S, q.device) if causal else torch.ones(1, 1, T, S, dtype=torch.bool)
    expected, _ = attend_reference(q.float(), k.float(), v.float(), mask=mask)
    strided = torch.zeros(2, G, S + 20, K, dtype=torch.bfloat16)  # as a cache that has room to grow
    strided[:, :, :S] = k
    assert ops.attends(q, strided[:, :, :S], None, causal=causal)
    for keys in (k, strided[:, :, :S]):
        got = attend(q, keys, v, causal=causal)
        torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.01)
    real = torch.arange(S) < torch.tensor([S, S // 2])[:, None]  # rows padded at their end, as of an encoder
    added = additive(real[:, None, None], q.dtype)
    assert ops.attends(q, k, added, causal=False)
    expected, _ = attend_reference(q.float(), k.float(), v.float(), mask=real[:, None, None])
    torch.testing.assert_close(attend(q, k, v, mask=added).float(), expected, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_rotations_and_activations_equal_their_formulas(dtype: torch.dtype) -> None:
    """Each fused kernel against its twin; bf16 differs by the twin's intermediate roundings."""
    generator = torch.Generator().manual_seed(0)
    near = {"atol": 0.03, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    x = torch.randn(2, 7, 3, 50, generator=generator).to(dtype)
    weight = torch.rand(50, generator=generator) + 0.5
    cos, sin = torch.rand(7, 1, 25, generator=generator).to(dtype), torch.rand(7, 1, 25, generator=generator).to(dtype)
    with torch.inference_mode():
        got = [
            fused.rms_norm(x, weight, 1e-6),
            fused.rotate(x, cos, sin),
            fused.norm_rope(x, weight.expand(3, 50), cos, sin, 1e-6),
            ops.rotate(x, cos[None].expand(2, 7, 1, 25), sin[None].expand(2, 7, 1, 25)),
        ]
    expected = [
        fused.rms_norm_reference(x, weight, 1e-6),
        fused.rotate_reference(x, cos, sin),
        fused.norm_rope_reference(x, weight.expand(3, 50), cos, sin, 1e-6),
        fused.rotate_reference(x, cos, sin),
    ]
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other.float(), **near)
    gate, up = (torch.randn(3, 1100, generator=generator).to(dtype) * 4 for _ in range(2))
    for activation in ops.ACTIVATIONS:
        with torch.inference_mode():
            both, alone = gated(gate, up, activation), ops.activate(None, up, activation)
        torch.testing.assert_close(both.float(), (activate(gate, activation) * up).float(), **near)
        torch.testing.assert_close(alone.float(), activate(up, activation).float(), **near)


def test_pick_is_argmax_with_log_softmax() -> None:
    """Ties go to the first; what is not finite is said by -1; sizes around sixteen and the block of 1024."""
    generator = torch.Generator().manual_seed(3)
    for size in (1, 7, 16, 17, 1023, 1024, 1040, 5000):
        logits = torch.randn(3, size, generator=generator) * 10
        logits[1, size // 2 :] = logits[1].max()
        ids, logprobs = ops.pick(logits)
        assert ids == logits.argmax(dim=-1).tolist()
        expected = logits.log_softmax(dim=-1).amax(dim=-1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=2e-5, rtol=1e-5)
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits = torch.randn(2, 2000, generator=generator)
        logits[1, 1500] = bad
        assert ops.pick(logits)[0][1] == -1


def test_an_id_outside_the_vocabulary_is_no_memory_access() -> None:
    """Would catch a read past the embedding."""
    core = model().requires_grad_(False)
    cache = KVCache(core.config, batch=1, capacity=4, dtype=torch.float32, device=core.device)
    for bad in (-1, 400):
        with pytest.raises(IndexError):
            stepper.Stepper(core, exact=True).step([bad], cache)
    matrix = quant.quantize(torch.randn(5, 40), 4)
    with pytest.raises(IndexError):
        matrix.dequantized(torch.float32, torch.tensor([0, 5]))


def test_running_out_of_memory_is_an_error() -> None:
    """Allocations fail in the calling thread and in all threads: no exception of C++ ends the process."""
    lib, _ = ops.library()
    wide = ops.MatrixStruct(kind=1, rows=1, cols=1 << 30)
    with pytest.raises(MemoryError, match="tfcli_linear"):
        lib.tfcli_linear(ctypes.byref(wide), 1 << 30, None, None, 1, 2)
    with pytest.raises(MemoryError, match="tfcli_norm"):
        lib.tfcli_norm(None, None, 0, -1, None, 0.0, 1, 2)


@pytest.fixture
def without_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library as it is on processors that multiply bf16 by vectors only."""
    flags = ("-mno-amx-bf16",) if platform.machine() == "x86_64" else ()
    path = library.build(library.find_compiler(), tmp_path, "-fopenmp", *flags)
    monkeypatch.setattr(library, "load", lambda: ctypes.CDLL(str(path)))
    ops.library.cache_clear()
    yield
    ops.library.cache_clear()


@pytest.mark.usefixtures("without_amx")
@torch.inference_mode()
def test_a_prompt_read_in_parts_goes_by_the_kernel() -> None:
    """Every part counts its positions from where it begins: as fp32 in one piece has it, and without a T x S mask."""
    made = {"context": 4500, "head_width": 32, "heads": 4, "kv_heads": 2, "width": 64, "scale": 0.1}
    core = model(**made).requires_grad_(False).to(torch.bfloat16)
    twin = model(**made).requires_grad_(False)
    twin.load_state_dict(core.state_dict())
    ids = torch.randint(3, 400, (1, 4300), generator=torch.Generator().manual_seed(0))
    expected = twin.logits(twin(ids)[:, -1])
    with torch.inference_mode(False), torch.no_grad():  # where native code does not serve
        by_pytorch = float((core.logits(core(ids)[:, -1]).float() - expected).abs().max() / expected.abs().max())
    cache = KVCache(core.config, batch=1, capacity=4500, dtype=torch.bfloat16, device=core.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits = Decoder(core).prefill([ids[0].tolist()], cache)
    assert float((logits - expected).abs().max() / expected.abs().max()) < max(2 * by_pytorch, 0.01)
    operators = {event.key for event in profile.key_averages()}
    assert ops.fast(torch.bfloat16) != ("aten::scaled_dot_product_attention" in operators)
    assert ops.fast(torch.bfloat16) != ("aten::tril" in operators)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a level of x86-64")
def test_codes_with_minima_are_exact_where_nothing_multiplies_bf16(tmp_path: Path) -> None:
    """The sums for the minima use the numbers of the products, on processors without bf16 products too."""
    path = library.build(library.find_compiler(), tmp_path, "-march=x86-64-v3")
    lib = ctypes.CDLL(str(path))
    assert not lib.tfcli_bf16_products()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 96, generator=generator)
    for bits in (4, 8):
        matrix = quant.quantize(torch.randn(70, 96, generator=generator), bits)
        y, described = torch.empty(3, 70), ctypes.byref(matrix.describe())
        pointers = (ctypes.c_void_p(ops.address(tensor)) for tensor in (x, y))
        assert lib.tfcli_linear(described, 3, *pointers, 0, 2) == 0
        expected = x @ matrix.dequantized_reference().T
        assert float((y - expected).abs().max() / expected.abs().max()) < 1e-5


def test_systems_without_flags_for_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no RTLD_NOW."""
    monkeypatch.delattr(os, "RTLD_NOW", raising=False)
    assert library.load().tfcli_sizes(0) == ctypes.sizeof(ops.MatrixStruct)


def test_without_a_compiler_everything_runs_as_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """No compiler, one that fails, and a cache that others can write to: a reason in words, never an error."""
    core = model().requires_grad_(False)
    failing = tmp_path / "bad-compiler"
    failing.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path, cxx, reason in (
        (str(tmp_path / "nothing"), "", "no C++ compiler"),
        ("", str(failing), "this compiler is broken"),
    ):
        ops.library.cache_clear()
        monkeypatch.setenv("CXX", cxx)
        if path:
            monkeypatch.setenv("PATH", path)
        else:
            monkeypatch.undo()
            monkeypatch.setenv("CXX", cxx)
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert not ops.ready()
        assert reason in str(ops.unavailable())
        assert not stepper.supports(core)
        matrix = quant.quantize(torch.randn(64, 64), 4)
        x = torch.randn(2, 64)
        torch.testing.assert_close(matrix(x), x @ matrix.dequantized_reference().T)
    shared = tmp_path / "shared" / "tfcli"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    ops.library.cache_clear()
    assert "can be written to by others" in str(ops.unavailable())
    monkeypatch.undo()
    ops.library.cache_clear()
    assert ops.ready()


def test_the_names_of_fields_are_those_of_the_source() -> None:
    """Python and C++ share structures by layout: the fields stand in the same order in both."""
    source = library.SOURCE.read_text(encoding="utf-8")
    body = source[source.index("struct Model {") : source.index("struct Cache {")]
    order = [body.index(f"{name}") for name in ("depth", "layer_norm", "eps", "frequencies", "Matrix embed", "layers;")]
    assert order == sorted(order)
    assert config().architecture.causal
