"""A new family of models is one file and one line (of GGUF files, one row): here a toy one, added while running."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import cpu, model, tokenizer

from tfcli.config.model import Architecture, AttentionConfig, FeedForwardConfig, ModelConfig
from tfcli.errors import UserError
from tfcli.formats.gguf import families as gguf_families
from tfcli.formats.gguf import save as gguf_save
from tfcli.formats.gguf.file import NewTensor, open_gguf, write_gguf
from tfcli.formats.gguf.rope import rotary_halves
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf import heads as hf_heads
from tfcli.formats.hf.families import registry
from tfcli.formats.hf.families.base import ACTIVATIONS, WRITTEN, Family, Names, Place, classifier
from tfcli.formats.hf.settings import Settings
from tfcli.formats.open import open_path
from tfcli.inspection.describe import inspect
from tfcli.model import heads
from tfcli.model.transformer import Transformer

IDS = torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(1))
LLAMA: dict[str, Any] = {
    "architecture": Architecture(attention=AttentionConfig(qk_norm=False)),
    "kv_heads": 4,
    "rope_theta": 500.0,
    "tied": False,
}


def _read_toy(settings: Settings) -> dict[str, Any]:
    return {
        "kv_heads": settings.whole("heads"),
        "head_width": settings.whole("size") // settings.whole("heads"),
        "rope_theta": settings.number("base"),
        "norm_eps": settings.number("eps"),
        "tied": False,
        "architecture": Architecture(
            attention=AttentionConfig(qk_norm=False),
            feed_forward=FeedForwardConfig(activation=settings.one_of("act", ACTIVATIONS)),
        ),
    }


def _write_toy(config: ModelConfig) -> dict[str, Any]:
    return {
        "base": config.rope_theta,
        "eps": config.norm_eps,
        "act": WRITTEN[config.architecture.feed_forward.activation],
    }


TOY = Family(
    model_type="toy",
    architecture="ToyModel",
    names=Names(
        outer={"embed": "words", "norm": Place(name="last", plus=1.0)},
        layer={
            "attention_norm": Place(name="layer.{}.before", plus=1.0),
            "attention.q": Place(name="layer.{}.qkv", part=0, parts=3),
            "attention.k": Place(name="layer.{}.qkv", part=1, parts=3),
            "attention.v": Place(name="layer.{}.qkv", part=2, parts=3),
            "attention.o": "layer.{}.out",
            "ffn_norm": Place(name="layer.{}.after", plus=1.0),
            "ffn.gate": "layer.{}.w1",
            "ffn.up": "layer.{}.w3",
            "ffn.down": Place(name="layer.{}.w2", transposed=True),
        },
        head="scores",
        prefixes=("toy.", ""),
        others=("score.",),
    ),
    heads=classifier("ToyForSequenceClassification", prefix="toy."),
    sizes={
        "pieces": "vocab_size",
        "longest": "context",
        "layers": "depth",
        "size": "width",
        "heads": "heads",
        "inner": "ffn_width",
    },
    defaults={"base": 10_000.0, "act": "silu"},
    fixed={"gated": True},
    read=_read_toy,
    write=_write_toy,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Family:
    """The line in the registry."""
    monkeypatch.setattr(registry, "FAMILIES", (TOY, *registry.FAMILIES))
    return TOY


def by_hand(directory: Path, core: Transformer) -> Path:
    """The directory of a toy that is ``core``, written without the table that is under test."""
    state, out = core.state_dict(), {}
    for layer in range(core.config.depth):
        ours, theirs = f"blocks.{layer}.", f"toy.layer.{layer}."
        out[f"{theirs}qkv.weight"] = torch.cat([state[f"{ours}attention.{part}.weight"] for part in "qkv"])
        out[f"{theirs}out.weight"] = state[f"{ours}attention.o.weight"]
        out[f"{theirs}w1.weight"] = state[f"{ours}ffn.gate.weight"]
        out[f"{theirs}w3.weight"] = state[f"{ours}ffn.up.weight"]
        out[f"{theirs}w2.weight"] = state[f"{ours}ffn.down.weight"].T.contiguous()
        out[f"{theirs}before.weight"] = state[f"{ours}attention_norm.weight"] - 1
        out[f"{theirs}after.weight"] = state[f"{ours}ffn_norm.weight"] - 1
    out["toy.last.weight"] = state["norm.weight"] - 1
    out |= {"toy.words.weight": state["embed.weight"], "scores.weight": state["head.weight"]}
    directory.mkdir()
    save_file(out, directory / "model.safetensors")
    sizes = {"pieces": 400, "longest": 32, "layers": 2, "size": 32, "heads": 4, "inner": 48}
    settings = {"model_type": "toy", "architectures": ["ToyModel"], "base": 500.0, "eps": 1e-6, **sizes}
    (directory / "config.json").write_text(json.dumps(settings))
    tokenizer().save(directory / "tokenizer.model")
    return directory


@torch.no_grad()
def test_a_directory_of_a_new_family_has_the_logits_of_the_llama_that_it_is(tmp_path: Path, toy: Family) -> None:
    """Would catch a family that is known anywhere but in its file and in the registry."""
    core = model(**LLAMA)
    loaded, codec = open_path(by_hand(tmp_path / "toy", core)).load(runtime=cpu())
    assert loaded.config == core.config
    # Norms are stored less one, which rounds.
    torch.testing.assert_close(loaded.logits(loaded(IDS)), core.logits(core(IDS)), atol=1e-5, rtol=1e-5)
    assert codec.vocab_size == 400
    assert inspect(tmp_path / "toy")["family"] == "toy"


@torch.no_grad()
def test_a_new_family_is_written_as_it_was_read(tmp_path: Path, toy: Family) -> None:
    """Same tensors under the same names, and its class with a head where the model has one."""
    loaded = hf.load_model(by_hand(tmp_path / "toy", model(**LLAMA)), runtime=cpu())
    hf.save(tmp_path / "again", loaded, tokenizer())
    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("toy", "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0, msg=name)
    heads.attach(loaded, heads.fresh(loaded, "sequence", 3, seed=0))
    hf.save(tmp_path / "labels", loaded, tokenizer())
    assert json.loads((tmp_path / "labels" / "config.json").read_text())["architectures"] == [
        "ToyForSequenceClassification"
    ]
    again = hf_heads.load(tmp_path / "labels", runtime=cpu())
    assert again.kind == "sequence"
    with pytest.raises(UserError, match="a model of type toy has no head of kind 'token'"):
        registry.head_names(toy, "token")


def test_a_setting_that_a_new_family_does_not_have_is_refused(tmp_path: Path, toy: Family) -> None:
    directory = by_hand(tmp_path / "toy", model(**LLAMA))
    for key, value, message in (("gated", False, "gated is False"), ("act", "tanh", "act is 'tanh'")):
        settings = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(settings | {key: value}))
        with pytest.raises(UserError, match=message):
            hf.read_config(directory)
        (directory / "config.json").write_text(json.dumps(settings))


@torch.no_grad()
def test_a_gguf_file_of_a_new_family_has_the_logits_of_the_llama_that_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of the table, with q and k in order, reads it; it is written back under its own name."""
    core = model(**LLAMA)
    gguf_save.save(tmp_path / "llama.gguf", core, tokenizer(), type="F32")
    llama = open_gguf(tmp_path / "llama.gguf")
    metadata = {key.replace("llama.", "toy.", 1): value for key, value in llama.metadata.items()}
    assert metadata.pop("general.architecture") == "llama"
    tensors = []
    for name, tensor in llama.tensors.items():
        values, part = tensor.dequantize(), name.split(".")[-2]
        ordered = values[rotary_halves(4, 8)] if part in ("attn_q", "attn_k") else values
        tensors.append(NewTensor(name=name, shape=values.shape, type="F32", data=np.ascontiguousarray(ordered)))
    write_gguf(tmp_path / "toy.gguf", {"general.architecture": "toy"} | metadata, tensors)
    with pytest.raises(UserError, match="the architecture 'toy', which tfcli does not read"):
        gguf_families.read(open_gguf(tmp_path / "toy.gguf"))

    row = gguf_families.Family(name="toy", architecture=Architecture(attention=AttentionConfig(qk_norm=False)))
    monkeypatch.setattr(gguf_families, "FAMILIES", (row, *gguf_families.FAMILIES))
    loaded, codec = open_path(tmp_path / "toy.gguf").load(runtime=cpu())
    torch.testing.assert_close(loaded.logits(loaded(IDS)), core.logits(core(IDS)), atol=1e-5, rtol=1e-5)
    gguf_save.save(tmp_path / "again.gguf", loaded, codec, type="F32")
    again = open_gguf(tmp_path / "again.gguf")
    assert again.metadata["general.architecture"] == "toy"
    for tensor in tensors:
        np.testing.assert_array_equal(
            again.tensors[tensor.name].dequantize(), open_gguf(tmp_path / "toy.gguf").tensors[tensor.name].dequantize()
        )
