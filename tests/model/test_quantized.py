"""Whole models in 8 or 4 bits: what is replaced and what is not, and that they compute what their numbers say."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import model

from tfcli.config.model import Architecture, AttentionConfig, EmbeddingConfig, FeedForwardConfig, NormConfig
from tfcli.errors import UserError
from tfcli.model import heads
from tfcli.model.quant import quantize as quantized
from tfcli.model.quant.matrix import QuantEmbedding, QuantMatrix, quantize
from tfcli.model.quant.quantize import Quantization, bits, quantize_model, weight_bytes
from tfcli.model.transformer import Transformer

GPT2 = Architecture(
    norms=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    embedding=EmbeddingConfig(positions="learned"),
    feed_forward=FeedForwardConfig(activation="gelu", gated=False, bias=True),
)
BERT = Architecture(
    causal=False,
    norms=NormConfig(kind="layer", bias=True, place="post"),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    embedding=EmbeddingConfig(positions="learned", norm=True, token_types=2),
    feed_forward=FeedForwardConfig(gated=False, activation="gelu", bias=True),
)
INNER = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.down")
WHOLE = Quantization(bits=4, whole_groups=True)
SHAPES: list[dict[str, Any]] = [{}, {"tied": False, "width": 40}, {"architecture": GPT2}, {"architecture": BERT}]


def dequantized(made: Transformer, plain: Transformer) -> Transformer:
    """``plain`` with the numbers that the quantized model's matrices stand for."""
    with torch.no_grad():
        for path, module in made.named_modules():
            if isinstance(module, QuantMatrix):
                path = path.removesuffix(".matrix")
                plain.get_submodule(path).weight.copy_(module.dequantized_reference())
    return plain


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.no_grad()
def test_a_quantized_model_computes_what_its_numbers_say(kind: str, changes: dict[str, Any]) -> None:
    """Would catch a matrix that was left out or put elsewhere, and a bias that got lost."""
    plain = model(**changes)
    made = quantize_model(copy.deepcopy(plain), Quantization.of(kind))
    kept = {name for name, _ in made.named_parameters()}
    assert all("norm" in name or name in ("positions.weight", "types.weight") for name in kept), kept
    assert isinstance(made.embed, QuantEmbedding)
    assert (made.embed.matrix is made.head) == plain.config.tied
    assert bits(made) == {"int8": [8], "int4": [4, 8]}[kind]
    assert made.head.bits == 8  # embedding and head: see Quantization
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    twin = dequantized(made, plain)
    torch.testing.assert_close(made.logits(made(ids)), twin.logits(twin(ids)), atol=2e-4, rtol=1e-4)


@torch.inference_mode()
def test_an_encoder_rounds_its_inputs_and_a_decoder_does_not() -> None:
    """Hidden states in bf16 stay as near as 8 bits allow; would catch a decoder whose text depends on its batch."""
    plain = model(architecture=BERT)
    ids = torch.randint(0, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    expected = plain(ids)
    heads.attach(plain, heads.make("sequence", plain.config.width, 2, causal=False))
    made = quantize_model(copy.deepcopy(plain), Quantization.of("int8"))
    for parameter in made.parameters():  # not the fp16 scales
        parameter.data = parameter.data.to(torch.bfloat16)
    int8_activations = {
        path for path, part in made.named_modules() if isinstance(part, QuantMatrix) and part.int8_activations
    }
    assert int8_activations == {f"blocks.{i}.{part}" for i in range(2) for part in INNER}
    assert not any(isinstance(part, QuantMatrix) for part in made.task_head.modules())
    off = (made(ids).float() - expected).norm() / expected.norm()
    assert off < 0.02
    decoder = quantize_model(model(architecture=GPT2), Quantization.of("int8"))
    assert not any(part.int8_activations for part in decoder.modules() if isinstance(part, QuantMatrix))


def test_slices_make_the_same_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch rows that are lost or doubled where a matrix is quantized in parts."""
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(50)
    for wanted in (8, 4):
        whole = quantize(weight, wanted, bias=bias)
        monkeypatch.setattr(quantized, "AT_ONCE", 500)
        parts = quantized.quantized(weight, wanted, bias=bias)
        for ours, theirs in ((parts.codes, whole.codes), (parts.scale, whole.scale), (parts.low, whole.low)):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        assert torch.equal(parts.bias, bias)
        monkeypatch.undo()


def test_a_model_is_a_quarter_of_its_size() -> None:
    """And what is shared counts once."""
    plain = model(width=64, ffn_width=128, vocab_size=1000)
    before = weight_bytes(plain)
    assert before == 4 * sum(p.numel() for p in plain.parameters())
    assert weight_bytes(quantize_model(copy.deepcopy(plain), Quantization.of("int8"))) < 0.28 * before
    assert weight_bytes(quantize_model(copy.deepcopy(plain), Quantization.of("int4"))) < 0.24 * before
    assert weight_bytes(quantize_model(plain, Quantization(bits=4, outer=4))) < 0.17 * before


def test_quantizing_twice_is_refused() -> None:
    made = quantize_model(model(), Quantization.of("int8"))
    with pytest.raises(UserError, match="the model is quantized already, to 8 bits"):
        quantize_model(made, Quantization.of("int4"))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'int8'"):
        quantize_model(model(), Quantization.of("int9"))


def test_rows_of_broken_groups_can_be_left_as_they_are() -> None:
    """For files whose blocks have no padding."""
    made = quantize_model(model(ffn_width=48), WHOLE)
    assert isinstance(made.blocks[0].attention.q, QuantMatrix)
    assert isinstance(made.blocks[0].ffn.up, QuantMatrix)
    assert not isinstance(made.blocks[0].ffn.down, QuantMatrix)
    made = quantize_model(model(width=40), WHOLE)
    assert made.head.weight is made.embed.weight
