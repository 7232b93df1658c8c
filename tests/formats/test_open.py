"""Models by their path: each kind is found, quantized at load where asked, and what is none is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from tiny_models import cpu, model, save, tokenizer

from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.open import Opened, open_path
from tfcli.model.quant.matrix import QuantMatrix
from tfcli.model.quant.quantize import Quantization, quantize_model


def test_a_directory_a_file_and_a_directory_with_a_file(tmp_path: Path) -> None:
    """A directory with safetensors is one even where a GGUF file lies in it."""
    run = save(tmp_path / "run")
    inside = tmp_path / "gguf"
    inside.mkdir()
    file = tiny_gguf.save(inside / "m.gguf", tiny_gguf.config("llama"), tokenizer=tokenizer())
    assert open_path(run) == Opened(kind="hf", path=run)
    assert open_path(file) == open_path(inside) == Opened(kind="gguf", path=file)
    (run / "m.gguf").write_bytes(file.read_bytes())
    assert open_path(run).kind == "hf"
    assert open_path(run).config == model().config
    assert open_path(inside).config.architecture.attention.qk_norm is False
    made, codec = open_path(inside).load(runtime=cpu())
    assert made.config == open_path(file).config
    assert codec.encode("a king") == tokenizer().encode("a king")


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"tied": False, "width": 40}], ids=str)
def test_a_directory_is_quantized_as_its_model_would_be(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Would catch a matrix that is read in another dtype first, or left out."""
    save(tmp_path / "run", **changes)
    made, codec = open_path(tmp_path / "run").load(runtime=cpu("bf16"), quantize=kind)
    expected = quantize_model(model(**changes), Quantization.of(kind)).state_dict()
    assert made.state_dict().keys() == expected.keys()
    for name, tensor in made.state_dict().items():
        theirs = expected[name]
        assert torch.equal(tensor, theirs.to(tensor.dtype))
        assert tensor.dtype == (torch.bfloat16 if theirs.dtype == torch.float32 else theirs.dtype)
    assert (made.embed.matrix is made.head) == made.config.tied
    assert codec.hash == tokenizer().hash


def test_biases_stay_beside_quantized_matrices(tmp_path: Path) -> None:
    """GPT-2's queries, keys and values are one stored tensor, their biases another."""
    import transformers
    from tiny_models import foreign

    theirs = foreign("gpt2", bos_token_id=0, eos_token_id=0)
    transformers.utils.logging.disable_progress_bar()
    theirs.save_pretrained(tmp_path)
    tokenizer_like(tmp_path)
    made, _ = open_path(tmp_path).load(runtime=cpu(), quantize="int8")
    attention = made.blocks[1].attention
    assert isinstance(attention.k, QuantMatrix)
    stored = theirs.transformer.h[1].attn.c_attn
    torch.testing.assert_close(attention.k.bias, stored.bias[24:48].detach())
    torch.testing.assert_close(
        attention.k.dequantized(torch.float32), stored.weight.T[24:48].detach(), atol=0.02, rtol=0
    )
    ids = torch.randint(0, 90, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (made.logits(made(ids)) - theirs(ids).logits).abs().max() < 0.5


def tokenizer_like(directory: Path) -> None:
    """A tokenizer.json of 90 words."""
    import json

    vocab = {"<|endoftext|>": 0} | {f"w{at}": at for at in range(1, 90)}
    text = json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<|endoftext|>"},
        }
    )  # fmt: skip
    (directory / "tokenizer.json").write_text(text)
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')


def test_a_tokenizer_of_another_model_is_refused_at_quantization_too(tmp_path: Path) -> None:
    save(tmp_path / "run")
    tokenizer(vocab_size=390).save(tmp_path / "run" / hf.TOKENIZER)
    with pytest.raises(UserError, match="is not the tokenizer"):
        open_path(tmp_path / "run").load(runtime=cpu(), quantize="int8")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    """Each with what it is and what to do."""
    run = save(tmp_path / "run")
    (tmp_path / "text.txt").write_text("a king")
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04....")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.gguf", "b.gguf"):
        tiny_gguf.save(two / name, tiny_gguf.config("llama"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((run / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"PK\x03\x04....")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (pickled / name).write_bytes((run / name).read_bytes())
    bare, unweighted = tmp_path / "bare", tmp_path / "unweighted"  # neither has a tokenizer
    for folder in (bare, unweighted):
        folder.mkdir()
        (folder / "config.json").write_text((run / "config.json").read_text())
    (bare / "model.pt").write_bytes(b"PK\x03\x04....")
    cases = {
        tmp_path / "text.txt": "is text, expected a model",
        tmp_path / "empty.gguf": "is empty, expected a GGUF file",
        tmp_path / "pytorch_model.bin": "is a pickle",
        run / "model.safetensors": "is one file of a model",
        two: "holds 2 GGUF files",
        pickled: "pickle",
        pickled / "pytorch_model.bin": r"is a pickle, .*import Qwen3ForCausalLM as M; M\.from_pretrained",
        bare: r"its weights in a pickle \(.bin, .pt, .pth\), .*import Qwen3ForCausalLM as M.*bare\"\)\.save_pretrained",
        unweighted: "no model.safetensors in",
        tmp_path / "other-q8.gguf": r"no such file: .*other-q8.gguf \(is it in another directory",
        tmp_path / "emty.gguf": r"no such file: .*emty.gguf \(did you mean .*empty.gguf",
        tmp_path / "nothing": "no such model: .*name a directory that pretrain wrote",
        tmp_path / "run2": "did you mean .*run",
    }
    for path, message in cases.items():
        for options in ({}, {"quantize": "int8"}):
            with pytest.raises(UserError, match=message):
                open_path(path).load(runtime=cpu(), **options)
    with pytest.raises(UserError, match="unknown kind of quantization 'int5'"):
        open_path(run).load(runtime=cpu(), quantize="int5")
    with pytest.raises(UserError, match="has a tokenizer of its own"):
        open_path(run).load(runtime=cpu(), tokenizer="tok.bin")
