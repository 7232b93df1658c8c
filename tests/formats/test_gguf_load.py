"""Models in GGUF files: transformers gives the same logits for the same file, and codes stay what they are."""

from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from tiny_gguf import config, transformers_model
from tiny_models import cpu, tokenizer

from tfcli.config.model import ModelConfig, RopeScaling
from tfcli.errors import UserError
from tfcli.formats.gguf import families
from tfcli.formats.gguf import load as gguf_load
from tfcli.formats.gguf.file import open_gguf
from tfcli.model.quant import quantize
from tfcli.model.quant.matrix import QuantEmbedding, QuantMatrix
from tfcli.model.quant.quantize import Quantization
from tfcli.model.transformer import Transformer

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_context=32, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=16, attention_factor=1.2, beta_fast=8.0)
LINEAR = RopeScaling(kind="linear", factor=2.0)
FAMILIES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "llama": (config("llama", rope_theta=500.0, norm_eps=1e-4), {}),
    "llama, not tied": (config("llama", tied=False, heads=8, kv_heads=1, head_width=10), {}),
    "llama with biases": (
        config("llama", qkv_bias=True, out_bias=True, ffn_bias=True), {"attention_bias": True, "mlp_bias": True}
    ),
    "llama, stretched": (
        config("llama", rope_scaling=LINEAR),
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama 3": (
        config("llama", rope_scaling=LLAMA3),
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "rope_theta": 1e4,
            }
        },
    ),
    "qwen2": (config("qwen2", head_width=8, rope_theta=1e6), {}),
    "qwen3": (config("qwen3"), {"head_dim": 16}),
    "qwen3, yarn": (
        config("qwen3", rope_scaling=YARN),
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.2,
                "beta_fast": 8.0, "rope_theta": 1e4,
            },
        },
    ),
    "gemma3": (
        config("gemma3", depth=3, local_window=8, local_every=2, rope_theta=1e5),
        {
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}  # fmt: skip
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_TYPES = {"Q4_K": 1e-3, "Q5_K": 1e-3, "Q2_K": 0.02, "Q3_K": 0.02, "Q6_K": 0.02}
"""The largest change of a weight, of its row's largest: scales in fp16, or 8 bits anew."""


def load(path: Path, precision: str = "fp32", **options: Any) -> Transformer:
    file = open_gguf(path)
    made = gguf_load.load_model(file, *families.read(file), runtime=cpu(precision), **options)
    return made.requires_grad_(False)


def both(path: Path, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our logits and transformers' of two rows of 40 tokens."""
    ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    model = load(path)
    with torch.no_grad():
        return model.logits(model(ids)), transformers_model(path, **changes)(ids).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    """Would catch another order of rotary rows, a norm in another's place, a window one too wide, a lost setting."""
    made, changes = FAMILIES[name]
    ours, theirs = both(tiny_gguf.save(tmp_path / "m.gguf", made), **changes)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("type", EXACT)
def test_quantized_files_have_transformers_logits(tmp_path: Path, type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a nibble or a scale in another's place, rows permuted without their scales, slices out of order."""
    monkeypatch.setattr(quantize, "AT_ONCE", 1000)
    ours, theirs = both(tiny_gguf.save(tmp_path / "m.gguf", config("llama"), type=type))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_quantized_matrices_have_their_biases(tmp_path: Path) -> None:
    made = config("llama", qkv_bias=True, out_bias=True, ffn_bias=True)
    path = tiny_gguf.save(tmp_path / "m.gguf", made, type="Q8_0")
    ours, theirs = both(path, attention_bias=True, mlp_bias=True)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("type", [*EXACT, *K_TYPES])
def test_weights_stay_what_they_are(tmp_path: Path, type: str) -> None:
    """Blocks of 32 to the last bit; K types to within what the docstring says of them."""
    wide = {"width": 256, "ffn_width": 256, "depth": 1, "head_width": 64}
    path = tiny_gguf.save(tmp_path / "m.gguf", config("qwen3", **wide), type=type)
    model, file = load(path), open_gguf(path)
    for name, layer in {
        "token_embd": model.head,
        "blk.0.attn_v": model.blocks[0].attention.v,
        "blk.0.ffn_down": model.blocks[0].ffn.down,
    }.items():
        theirs = torch.from_numpy(file.tensors[f"{name}.weight"].dequantize())
        assert isinstance(layer, QuantMatrix)
        difference = (layer.dequantized(torch.float32) - theirs).abs()
        bound = K_TYPES.get(type, 0.0) * theirs.abs().amax(-1, keepdim=True)
        assert (difference <= bound).all(), difference.max()
        assert layer.bits == (4 if type in ("Q4_0", "Q4_1", "Q4_K") else 8)


def test_nothing_is_widened_and_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """Would catch a matrix held twice, or as plain numbers."""
    path = tiny_gguf.save(tmp_path / "m.gguf", config("llama", width=64), type="Q4_1", token_embd="Q8_0")
    model = load(path, "bf16")
    assert isinstance(model.embed, QuantEmbedding)
    assert model.embed.matrix is model.head
    assert model.head.bits == 8 and model.head.low is None
    floats = dict(model.named_parameters())
    assert all(name.endswith("norm.weight") and p.dtype == torch.bfloat16 for name, p in floats.items())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert quantize.weight_bytes(model) < 1.1 * sum(tensor.nbytes for tensor in open_gguf(path).tensors.values())


def test_an_untied_head_is_one_of_its_own(tmp_path: Path) -> None:
    path = tiny_gguf.save(tmp_path / "m.gguf", config("qwen3", tied=False), type="Q4_0", token_embd="F16")
    model = load(path)
    assert isinstance(model.head, QuantMatrix)
    assert isinstance(model.embed, torch.nn.Embedding)


def test_plain_files_take_the_dtype_asked_for(tmp_path: Path) -> None:
    """F16 and BF16 too; a tied head shares the embedding's memory."""
    for type in ("F16", "BF16"):
        path = tiny_gguf.save(tmp_path / "m.gguf", config("qwen3"), type=type, attn_q="F32")
        assert {p.dtype for p in load(path, "bf16").parameters()} == {torch.bfloat16}
        model = load(path, "bf16", dtype=torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.head.weight is model.embed.weight
        theirs = open_gguf(path).tensors["blk.0.ffn_up.weight"].dequantize()
        torch.testing.assert_close(model.blocks[0].ffn.up.weight, torch.from_numpy(theirs), atol=0, rtol=0)


def test_a_plain_file_is_quantized_at_load_as_a_model_would_be(tmp_path: Path) -> None:
    path = tiny_gguf.save(tmp_path / "m.gguf", config("llama", qkv_bias=True))
    at_load = load(path, quantize=Quantization(bits=4))
    after = quantize.quantize_model(load(path), Quantization(bits=4))
    assert at_load.state_dict().keys() == after.state_dict().keys()
    for name, tensor in at_load.state_dict().items():
        torch.testing.assert_close(tensor, after.state_dict()[name], atol=0, rtol=0)


def test_the_vocabulary_is_the_file_s(tmp_path: Path) -> None:
    path = tiny_gguf.save(tmp_path / "m.gguf", config("qwen3"), tokenizer=tokenizer())
    file = open_gguf(path)
    model, codec = gguf_load.load(file, runtime=cpu())
    assert families.read(file)[1] == model.config
    text = "a king, wondered\n 从前 <|endoftext|>"
    assert codec.encode(text) == tokenizer().encode(text)
    assert codec.eos_id == tokenizer().eos_id


def test_quantizing_twice_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf.save(tmp_path / "m.gguf", config("llama"), type="Q4_1", token_embd="Q8_0")
    with pytest.raises(UserError, match=r"quantized already \(Q4_1, Q8_0\)"):
        load(path, quantize=Quantization(bits=4))


def test_damaged_scales_are_refused(tmp_path: Path) -> None:
    """Would catch a model of NaN that answers something."""
    path = tiny_gguf.save(tmp_path / "m.gguf", config("qwen3"), type="Q8_0")
    data, offset = bytearray(path.read_bytes()), open_gguf(path).tensors["blk.1.ffn_up.weight"].offset
    data[offset : offset + 2] = b"\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight has scales that are not finite"):
        load(path)
