"""Models written as GGUF files: transformers and the gguf package read what was meant, codes stay bit by bit."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
from test_gguf_load import FAMILIES, load
from tiny_gguf import config, transformers_model
from tiny_models import model, tokenizer

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError
from tfcli.formats.gguf import save as gguf_save
from tfcli.formats.gguf.file import open_gguf
from tfcli.model.quant.quantize import Quantization, quantize_model
from tfcli.model.transformer import Transformer

WIDE: dict[str, Any] = {"width": 64, "ffn_width": 96, "head_width": 16}


def random_model(made: ModelConfig, seed: int = 0) -> Transformer:
    core = Transformer(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1.0)
    return core


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_transformers_reads_the_same_model(tmp_path: Path, name: str) -> None:
    """Would catch a row out of order, a wrong name, a setting or the rotary factors that are not written."""
    made, changes = FAMILIES[name]
    core = random_model(made)
    gguf_save.save(tmp_path / "m.gguf", core, tokenizer(), type="F32", name="tiny")
    ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = transformers_model(tmp_path / "m.gguf", **changes)(ids).logits
    torch.testing.assert_close(core.logits(core(ids)), theirs, atol=1e-4, rtol=0)


def test_biases_are_in_the_file_s_order(tmp_path: Path) -> None:
    made = config("llama", qkv_bias=True, out_bias=True, ffn_bias=True)
    for type in ("F32", "Q8_0"):
        core = random_model(made)
        if type == "Q8_0":
            quantize_model(core, Quantization(bits=8))
        gguf_save.save(tmp_path / "m.gguf", core, tokenizer(), type="F32")
        again = load(tmp_path / "m.gguf").state_dict()
        for name, tensor in core.state_dict().items():
            assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(("type", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_numbers_are_rounded_to_nearest_and_norms_stay(tmp_path: Path, type: str, dtype: torch.dtype) -> None:
    core = model()
    gguf_save.save(tmp_path / "m.gguf", core, tokenizer(), type=type)
    again = load(tmp_path / "m.gguf").state_dict()
    for name, tensor in core.state_dict().items():
        assert torch.equal(again[name], tensor.to(dtype).float() if tensor.dim() == 2 else tensor), name


@pytest.mark.parametrize(("bits", "type"), [(8, "Q8_0"), (4, "Q4_1")])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_codes_are_written_as_they_are(tmp_path: Path, bits: Any, type: str, architecture: str) -> None:
    """The gguf package's own numbers are ours to the last bit, and the model comes back with every code."""
    core = quantize_model(random_model(config(architecture, **WIDE)), Quantization(bits=bits, outer=bits))
    with torch.no_grad():
        core.blocks[1].ffn.down = quantize_zeros(core.blocks[1].ffn.down, bits)
    gguf_save.save(tmp_path / "m.gguf", core, tokenizer(), name="tiny")
    again = load(tmp_path / "m.gguf").state_dict()
    for name, tensor in core.state_dict().items():
        assert torch.equal(again[name], tensor), name
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert {t.tensor_type.name for t in theirs.values() if len(t.shape) == 2} == {type}
    for name, layer in {"token_embd": core.head, "blk.0.ffn_up": core.blocks[0].ffn.up}.items():
        tensor = theirs[f"{name}.weight"]
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(numbers, layer.dequantized_reference().numpy())
    file_type = {"Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1}[type]
    assert open_gguf(tmp_path / "m.gguf").metadata["general.file_type"] == file_type


def quantize_zeros(like: Any, bits: Any) -> Any:
    """A matrix of zeros, whose blocks another type would hold as well."""
    from tfcli.model.quant.matrix import quantize

    return quantize(torch.zeros(like.rows, like.columns), bits)


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_file_is_written_as_it_was_read(tmp_path: Path, type: str) -> None:
    """Llama's rows are permuted on the way in and back; nothing is quantized twice."""
    source = tiny_gguf.save(tmp_path / "a.gguf", config("llama", **WIDE), type=type, tokenizer=tokenizer())
    gguf_save.save(tmp_path / "b.gguf", load(source), tokenizer())
    before, after = open_gguf(source).tensors, open_gguf(tmp_path / "b.gguf").tensors
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.type == after[name].type
        np.testing.assert_array_equal(tensor.data, after[name].data)


def test_what_blocks_do_not_hold_is_refused(tmp_path: Path) -> None:
    source = tiny_gguf.save(tmp_path / "a.gguf", config("qwen3", **WIDE), type="Q5_0", tokenizer=tokenizer())
    with pytest.raises(UserError, match="8-bit codes with a minimum"):
        gguf_save.save(tmp_path / "b.gguf", load(source), tokenizer())
    with pytest.raises(UserError, match="rows of 48"):
        gguf_save.save(tmp_path / "b.gguf", quantize_model(model(), Quantization(bits=4)), tokenizer())
    core = model()
    with torch.no_grad():
        core.blocks[0].ffn.up.weight[3, 3] = 1e5
    with pytest.raises(UserError, match=r"blk.0.ffn_up.weight cannot be written: .* too large for F16"):
        gguf_save.save(tmp_path / "b.gguf", core, tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
