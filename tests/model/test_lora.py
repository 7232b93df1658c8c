"""Adapters: nothing changes when one is attached, only they learn, and merging gives what they give."""

import pytest
import torch
from tiny_models import model

from tfcli.config.model import Architecture, AttentionConfig, EmbeddingConfig, FeedForwardConfig, NormConfig
from tfcli.config.options import LoraOptions
from tfcli.errors import UserError
from tfcli.infer import step
from tfcli.model import lora
from tfcli.model.quant import matrix as quant
from tfcli.model.quant.quantize import Quantization, quantize_model
from tfcli.model.transformer import Transformer

IDS = torch.randint(0, 400, (2, 20), generator=torch.Generator().manual_seed(3))
ALL = {"q", "k", "v", "o", "gate", "up", "down"}
GPT2 = Architecture(
    norms=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    embedding=EmbeddingConfig(positions="learned"),
    feed_forward=FeedForwardConfig(activation="gelu_tanh", gated=False, bias=True),
)


def made(bits: int = 0, architecture: Architecture | None = None) -> Transformer:
    core = model() if architecture is None else model(architecture=architecture, kv_heads=4)
    return quantize_model(core, Quantization(bits=bits)) if bits else core  # type: ignore[arg-type]


def trained(core: Transformer, options: LoraOptions) -> Transformer:
    """With adapters that say something."""
    generator = torch.Generator().manual_seed(9)
    for layer in lora.attach(core, options, seed=1).values():
        with torch.no_grad():
            layer.b.normal_(0.0, 0.1, generator=generator)
    return core


@torch.no_grad()
def logits(core: Transformer) -> torch.Tensor:
    return core.logits(core(IDS))


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("architecture", [None, GPT2], ids=["qwen3", "gpt2"])
def test_an_adapter_that_was_just_attached_changes_no_logit(bits: int, architecture: Architecture | None) -> None:
    """Exact. Would catch a B that is not zero, and a layer that lost its bias."""
    core = made(bits, architecture)
    before = logits(core)
    attached = lora.attach(core, LoraOptions(rank=4), seed=1)
    assert {path.rpartition(".")[2] for path in attached} == ALL - ({"gate"} if architecture else set())
    assert all(layer.a.abs().max() > 0 for layer in attached.values())
    assert torch.equal(logits(core), before)


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_only_adapters_learn_and_the_formula_says_what(bits: int) -> None:
    """Against a plain model of the merged weights, by autograd alone: dA = s B^T dW, dB = s dW A^T (chain rule)."""
    options = LoraOptions(rank=3, alpha=6.0)
    core = trained(made(bits), options)
    names = lora.trainable(core)
    assert {name.rpartition(".")[2] for name in names} == {"a", "b"}
    core.loss(core(IDS), IDS).backward()
    plain = trained(made(bits), options)
    lora.merge(plain)
    plain.requires_grad_(False)
    for path in lora.layers(plain):
        if isinstance(layer := plain.get_submodule(path), lora.Linear):
            layer.weight.requires_grad_(True)
    plain.loss(plain(IDS), IDS).backward()
    for path, layer in lora.adapters(core).items():
        d_W = plain.get_parameter(f"{path}.weight").grad
        assert d_W is not None and layer.a.grad is not None and layer.b.grad is not None
        scale = float(d_W.abs().max())
        torch.testing.assert_close(layer.a.grad, 2.0 * layer.b.T @ d_W, atol=1e-4 * scale, rtol=1e-3)
        torch.testing.assert_close(layer.b.grad, 2.0 * d_W @ layer.a.T, atol=1e-4 * scale, rtol=1e-3)
    assert all(p.grad is None for name, p in core.named_parameters() if name not in names)


@pytest.mark.parametrize("bits", [0, 4])
def test_merging_gives_the_same_logits_and_is_taken_back_exactly(bits: int) -> None:
    core = trained(made(bits), LoraOptions(rank=4))
    before = logits(core)
    assert (before - logits(made(bits))).abs().max() > 0.1
    taken = lora.merge(core)
    assert not lora.adapters(core)
    torch.testing.assert_close(logits(core), before, atol=2e-4, rtol=1e-4)
    lora.put(core, taken)
    assert torch.equal(logits(core), before)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(("q", "v"), {"q", "v"}), (("ffn.up",), {"up"}), (("attention.o", "down"), {"o", "down"}), ((), ALL)],
)
def test_targets_are_named_by_the_end_of_their_path(targets: tuple[str, ...], expected: set[str]) -> None:
    core = made()
    attached = lora.attach(core, LoraOptions(targets=targets), seed=0)
    assert {path.rpartition(".")[2] for path in attached} == expected
    assert len(attached) == core.config.depth * len(expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (LoraOptions(targets=("qq",)), "unknown target of LoRA 'qq' .*did you mean 'q'"),
        (LoraOptions(targets=("head",)), "unknown target of LoRA 'head'"),
        (LoraOptions(rank=0), "lora.rank is 0"),
    ],
)
def test_what_cannot_be_attached_is_refused(options: LoraOptions, said: str) -> None:
    with pytest.raises(UserError, match=said):
        lora.attach(made(), options, seed=0)


def test_adapters_are_not_put_on_adapters() -> None:
    core = trained(made(), LoraOptions())
    with pytest.raises(UserError, match="adapters already"):
        lora.attach(core, LoraOptions(), seed=0)


def test_the_compiled_step_is_not_taken_past_an_adapter() -> None:
    """It reads weights where they lie and knows nothing of what is beside them."""
    core = made()
    assert step.supports(core)
    trained(core, LoraOptions())
    assert not step.supports(core)
    lora.merge(core)
    assert step.supports(core)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 40])
def test_gradients_pass_through_quantized_matrices(dtype: torch.dtype, rows: int) -> None:
    """Few rows are multiplied by a kernel that autograd does not know: the gradient is the dequantized matrix's."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    matrix = quant.quantize(weight, 4, bias=torch.arange(48.0))
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    g = torch.randn(rows, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = matrix(x)
    y.backward(g)
    expected = g.float() @ matrix.dequantized_reference()
    assert x.grad is not None and x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0.01)
    assert torch.equal(y.detach(), matrix(x.detach()))
