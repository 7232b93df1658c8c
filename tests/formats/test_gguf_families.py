"""Models in GGUF files: names and shapes as in transformers and llama.cpp, settings both ways, lies refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
from tiny_gguf import factors
from tiny_models import config as core_config

from tfcli.config.model import ModelConfig, RopeScaling, from_flat
from tfcli.errors import UserError
from tfcli.formats.gguf.families import FAMILIES, places, read, written
from tfcli.formats.gguf.file import GgufFile, NewTensor, open_gguf, write_gguf
from tfcli.formats.gguf.rope import stretch
from tfcli.formats.gguf.save import general, stored_type
from tfcli.formats.hf.families import registry
from tfcli.model.transformer import Transformer

SMALL: dict[str, Any] = {"vocab_size": 40, "width": 24, "head_width": 8, "ffn_width": 48}
LINEAR = RopeScaling(kind="linear", factor=4.0)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_context=32)
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=32, attention_factor=1 + 0.1 * math.log(4))


def config(architecture: str, **changes: Any) -> ModelConfig:
    return tiny_gguf.config(architecture, **{**SMALL, **changes})


CONFIGS = {
    "llama": config("llama", rope_theta=500_000.0, norm_eps=1e-5, tied=False),
    "llama with biases": config("llama", qkv_bias=True, out_bias=True, ffn_bias=True),
    "llama 3": config("llama", rope_scaling=LLAMA3),
    "llama, stretched": config("llama", rope_scaling=LINEAR),
    "qwen2": config("qwen2", rope_theta=1e6),
    "qwen3": config("qwen3"),
    "qwen3, yarn": config("qwen3", rope_scaling=dataclasses.replace(YARN, beta_fast=16.0)),
    "qwen3, yarn weighed": config("qwen3", rope_scaling=dataclasses.replace(YARN, attention_factor=1.25)),
    "gemma3": config("gemma3", depth=7, rope_theta=1e6, local_window=16, local_every=6, local_theta=1e3),
    "gemma3, all slide": config("gemma3", local_window=8),
    "gemma3, none slides": config("gemma3"),
    "gemma3 27B": config("gemma3", depth=62, local_window=8, local_every=6),
}


def save(path: Path, config: ModelConfig, tensors: dict[str, NewTensor] | None = None, **changes: Any) -> GgufFile:
    """A file of such a model with zeros for weights; ``changes`` of the metadata, None to leave a key out."""
    if tensors is None:
        tensors = zeros(config)
    family, settings = written(config)
    metadata = general(family, type="F16") | settings | {name.replace("__", "."): v for name, v in changes.items()}
    write_gguf(path, {name: value for name, value in metadata.items() if value is not None}, tensors.values())
    return open_gguf(path)


def zeros(config: ModelConfig) -> dict[str, NewTensor]:
    made = {
        name: NewTensor(name=name, shape=place.shape, type="F32", data=np.zeros(place.shape, np.float32))
        for name, place in places(written(config)[0], config).items()
    }
    return made | {tensor.name: tensor for tensor in factors(config)}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_come_back(tmp_path: Path, name: str) -> None:
    """Would catch a key that is written but not read, or read as something else, and a family taken for another."""
    family, made = read(save(tmp_path / "m.gguf", CONFIGS[name]))
    assert family.name == name.split()[0].strip(",")
    given = CONFIGS[name].architecture.attention.rope_scaling
    shape = (made.head_width, made.rope_theta)
    # A rule is found again from numbers in fp32, and other lengths may give the same rule.
    assert stretch(made.architecture.attention.rope_scaling, *shape) == pytest.approx(stretch(given, *shape), rel=1e-6)
    assert made.architecture.attention.rope_scaling.kind == given.kind
    same = from_flat({"rope_scaling": given}, made.architecture)
    assert dataclasses.replace(made, architecture=same) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_metadata_come_back(tmp_path: Path, name: str) -> None:
    """The other way round: what a file says is what is written of its model."""
    family, settings = written(CONFIGS[name])
    again, same = written(read(save(tmp_path / "m.gguf", CONFIGS[name]))[1])
    assert again is family
    assert same == {key: pytest.approx(value) if isinstance(value, float) else value for key, value in settings.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_of_the_core_has_its_tensor(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(CONFIGS[name])
    found = {place.ours: place.shape for place in places(written(CONFIGS[name])[0], CONFIGS[name]).values()}
    assert found == {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


def hugging_face_names(config: ModelConfig) -> dict[str, str]:
    """{name in a GGUF file: transformers' name} of every weight."""
    names = registry.written(config)[0].names
    found = {name: place.ours for name, place in places(written(config)[0], config).items()}
    theirs = names.places(found.values(), names.prefixes[0])
    return {name: theirs[ours].name for name, ours in found.items()}


@pytest.mark.parametrize(
    "name", sorted(CONFIGS.keys() - {"gemma3, none slides"})
)  # which no config.json of theirs says
def test_names_are_those_of_llama_cpp(name: str) -> None:
    """The package's own table maps Hugging Face's names onto ours, and its keys are those that we write."""
    config = CONFIGS[name]
    family, settings = written(config)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.name)
    table = gguf.get_tensor_name_map(arch, config.depth)
    for ours, theirs in hugging_face_names(config).items():
        assert table.get_name(theirs, try_suffixes=(".weight", ".bias")) == ours
    known = {
        value.replace("{arch}", family.name)
        for group in (gguf.Keys.General, gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    assert (general(family, type="Q8_0", name="x") | settings).keys() <= known


def transformers_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of transformers' own model of the config.json that tfcli writes for it."""
    import transformers

    family, settings = registry.written(config)
    with torch.device("meta"):
        kind = transformers.AutoConfig.for_model(**settings)
        model = getattr(transformers, family.architecture)(kind)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "llama with biases", "qwen3", "qwen2", "gemma3"])
def test_shapes_are_those_of_transformers(name: str) -> None:
    """Would catch a matrix lying on its side, a missing or an invented tensor."""
    config = CONFIGS[name]
    if name == "qwen2":  # transformers has no other head width there
        config = dataclasses.replace(config, head_width=config.width // config.heads)
    found = places(written(config)[0], config)
    assert {theirs: found[ours].shape for ours, theirs in hugging_face_names(config).items()} == transformers_shapes(
        config
    )


def test_types_follow_llama_cpp() -> None:
    for name, shape, type, stored in [
        ("blk.0.attn_norm.weight", (24,), "Q8_0", "F32"),
        ("blk.0.attn_q.bias", (32,), "F16", "F32"),
        ("blk.0.attn_q.weight", (32, 64), "Q8_0", "Q8_0"),
        ("blk.0.attn_q.weight", (32, 24), "Q8_0", "F16"),
        ("blk.0.attn_q.weight", (32, 24), "BF16", "BF16"),
    ]:
        assert stored_type(name, shape, type) == stored


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    """llama.cpp's defaults; a list with one number for each layer; old names; an ignored table."""
    made = config("llama", head_width=6, norm_eps=1e-5, tied=False)
    tensors = zeros(made)
    tensors["rot"] = NewTensor(name="blk.1.attn_rot_embd.weight", shape=(4,), type="F32", data=np.ones(4, np.float32))
    file = save(
        tmp_path / "m.gguf", made, tensors, llama__vocab_size=None, llama__attention__key_length=None,
        llama__attention__value_length=None, llama__rope__dimension_count=None, llama__rope__freq_base=None,
        llama__attention__head_count_kv=[2, 2], general__type=None, llama__rope__scale_linear=2.0,
    )  # fmt: skip
    assert read(file)[1] == config(
        "llama", head_width=6, norm_eps=1e-5, tied=False, rope_scaling=RopeScaling(kind="linear", factor=2.0)
    )
    equal = dataclasses.replace(made, kv_heads=4)
    assert read(save(tmp_path / "m.gguf", equal, llama__attention__head_count_kv=None))[1].kv_heads == 4


def test_gemma_says_which_layers_slide(tmp_path: Path) -> None:
    made, key = CONFIGS["gemma3"], "gemma3__attention__sliding_window_pattern"
    assert read(save(tmp_path / "m.gguf", made, **{key: None}))[1] == made  # five of six
    other = read(save(tmp_path / "m.gguf", made, **{key: 2}))[1]
    assert [other.is_local(layer) for layer in range(7)] == [True, False, True, False, True, False, True]
    for changes in ({"gemma3__attention__sliding_window": 0}, {key: 1}, {key: [False] * 7}):
        assert read(save(tmp_path / "m.gguf", made, **changes))[1].architecture.windows.size == 0
    with pytest.raises(UserError, match=r"m\.gguf has sliding windows in an irregular order"):
        read(save(tmp_path / "m.gguf", made, **{key: [True, False, False, True, True, False, True]}))
    with pytest.raises(UserError, match=r"sliding_window_pattern is .* expected 7 booleans"):
        read(save(tmp_path / "m.gguf", made, **{key: [True, False]}))


def test_gemma_s_largest_model_scales_by_its_width() -> None:
    sizes: dict[str, Any] = {"head_width": 128, "width": 5376, "heads": 32, "kv_heads": 16}
    scales = [config("gemma3", depth=depth, **sizes).architecture.attention.scale for depth in (62, 34)]
    assert scales == [pytest.approx(168**-0.5), None]  # Gemma 3 27B, and the others
    assert config("llama", depth=62, **sizes).architecture.attention.scale is None


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general__architecture": "gpt2"}, r"architecture 'gpt2'.*qwen3, qwen2, llama, gemma3"),
    "architecture missing": ({"general__architecture": None}, "architecture 'None'"),
    "architecture a list": ({"general__architecture": ["llama"]}, "which tfcli does not read"),
    "part": ({"split__count": 3}, "one of 3 parts"),
    "adapter": ({"general__type": "adapter"}, "general.type is 'adapter'"),
    "experts": ({"qwen3__expert_count": 8}, "mixture of experts"),
    "encoder": ({"qwen3__attention__causal": False}, "encoder"),
    "no depth": ({"qwen3__block_count": None}, "has no qwen3.block_count"),
    "depth 0": ({"qwen3__block_count": 0}, "block_count is 0, expected a whole number from 1"),
    "depth absurd": ({"qwen3__block_count": 10**12}, "block_count is 1000000000000"),
    "depth too large": ({"qwen3__block_count": 10**8}, "no more than its 24 tensors make"),
    "depth one more": ({"qwen3__block_count": 3}, "missing|no more than"),
    "depth one fewer": ({"qwen3__block_count": 1}, r"11 unexpected \(blk\.1"),
    "depth a text": ({"qwen3__block_count": "2"}, "block_count is 2, expected a whole number"),
    "context 0": ({"qwen3__context_length": 0}, "context_length is 0"),
    "context absurd": ({"qwen3__context_length": 10**12}, "context_length is 1000000000000"),
    "width": ({"qwen3__embedding_length": 32}, r"mis-shaped \(token_embd\.weight \[40, 24\], expected \[40, 32\]"),
    "width negative": ({"qwen3__embedding_length": -24}, "embedding_length is -24"),
    "heads 0": ({"qwen3__attention__head_count": 0}, "head_count is 0"),
    "heads true": ({"qwen3__attention__head_count": True}, "head_count is True"),
    "heads by layer": ({"qwen3__attention__head_count": [4, 2]}, "one number for all layers"),
    "heads do not divide": ({"qwen3__attention__head_count_kv": 3}, "head_count_kv is 3, expected a divisor of 4"),
    "no head width": ({"qwen3__attention__head_count": 5, "qwen3__attention__head_count_kv": 5,
                       "qwen3__attention__key_length": None}, "has no qwen3.attention.key_length"),
    "odd head width": ({"qwen3__attention__key_length": 7, "qwen3__attention__value_length": 7,
                        "qwen3__rope__dimension_count": 7}, "even"),
    "two head widths": ({"qwen3__attention__value_length": 16}, "value_length is 16, expected the 8 of a head"),
    "half rotary": ({"qwen3__rope__dimension_count": 4}, "dimension_count is 4"),
    "ffn": ({"qwen3__feed_forward_length": 64}, r"6 mis-shaped \(blk\.0\.ffn_gate\.weight"),
    "no epsilon": ({"qwen3__attention__layer_norm_rms_epsilon": None}, "has no .*epsilon, expected a positive"),
    "epsilon nan": ({"qwen3__attention__layer_norm_rms_epsilon": math.nan}, "is nan, expected a positive"),
    "theta infinite": ({"qwen3__rope__freq_base": math.inf}, "is inf"),
    "theta 0": ({"qwen3__rope__freq_base": 0.0}, "is 0.0"),
    "theta too large": ({"qwen3__rope__freq_base": np.float64(1e300)}, r"is 1e\+300"),
    "scaling": ({"qwen3__rope__scaling__type": "longrope"}, "is longrope, expected none, linear or yarn"),
    "scaling a number": ({"qwen3__rope__scaling__type": 3}, "is 3, expected none"),
    "capped logits": ({"qwen3__final_logit_softcapping": 30.0}, r"m\.gguf caps its logits at 30\.0"),
    "attention factor": ({"qwen3__rope__scaling__attn_factor": 2.0}, "attn_factor is 2.0"),
    "vocabulary": ({"tokenizer__ggml__tokens": ["a", "b"]}, "a vocabulary of 2 pieces, its embedding 40 rows"),
    "vocabulary size": ({"qwen3__vocab_size": 41}, "a vocabulary of 41 pieces"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_metadata_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    """Would catch a model built by what a header says: sizes are compared with the tensors before anything is made."""
    changes, message = LIES[name]
    with pytest.raises(UserError, match=message) as caught:
        read(save(tmp_path / "m.gguf", CONFIGS["qwen3"], **changes))
    assert len(str(caught.value)) < 500


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["llama 3"]

    def refused(message: str, **changes: NewTensor | None) -> None:
        tensors = {name: made for name, made in (zeros(config) | changes).items() if made is not None}
        with pytest.raises(UserError, match=message):
            read(save(tmp_path / "m.gguf", config, tensors))

    def tensor(name: str, *shape: int, value: float = 0.0) -> NewTensor:
        return NewTensor(name=name, shape=shape, type="F32", data=np.full(shape, value, np.float32))

    refused("has no token_embd", **{"token_embd.weight": None})
    refused(r"1 missing \(blk\.1\.ffn_up\.weight\)", **{"blk.1.ffn_up.weight": None})
    refused(r"1 unexpected \(cls\.output\.weight\)", x=tensor("cls.output.weight", 2, 24))
    refused(r"expected \[32, 24\]", **{"blk.0.attn_q.weight": tensor("blk.0.attn_q.weight", 24, 32)})
    refused(r"5 missing \(blk\.0\.attn_k\.bias, blk\.0", x=tensor("blk.0.attn_q.bias", 32))
    refused("rope_freqs.weight is F32 of shape", **{"rope_freqs.weight": tensor("rope_freqs.weight", 8)})
    refused("not positive", **{"rope_freqs.weight": tensor("rope_freqs.weight", 4, value=0.0)})
    refused("not positive", **{"rope_freqs.weight": tensor("rope_freqs.weight", 4, value=-1.0)})
    odd = np.array([1.0, 9.0, 2.0, 5.0], np.float32)
    rule = NewTensor(name="rope_freqs.weight", shape=(4,), type="F32", data=odd)
    refused("stretches its rotary positions", **{"rope_freqs.weight": rule})


def test_rotary_positions_stretched_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"m\.gguf stretches its rotary positions"):
        read(save(tmp_path / "m.gguf", CONFIGS["llama 3"], llama__rope__scaling__factor=4.0))


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no more than its 0 tensors make"):
        read(save(tmp_path / "m.gguf", CONFIGS["qwen3"], {}))


def test_every_family_has_a_test() -> None:
    assert {written(config)[0] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ["llama 3", "gemma3"])
def test_no_flipped_byte_gets_past_the_checks(tmp_path: Path, name: str) -> None:
    """A damaged header gives settings that fit the tensors, or a UserError."""
    path = tmp_path / "m.gguf"
    file = save(path, CONFIGS[name])
    content, header = path.read_bytes(), min(tensor.offset for tensor in file.tensors.values())
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(4, header, rng.integers(1, 3)):
            damaged[at] = rng.choice([0, 1, 0xFF, int(rng.integers(256))])
        path.write_bytes(damaged)
        try:
            family, made = read(file := open_gguf(path))
        except UserError:
            continue
        assert all(file.tensors[key].shape == place.shape for key, place in places(family, made).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": False}, "is an encoder"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"positions": "learned"}, "positions is 'learned'"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"qkv_bias": True}, "qkv_bias is True"),
        ({"qk_norm": False, "local_window": 8, "local_every": 2}, "local_window is 8"),
        ({"attention_scale": 0.5}, "attention_scale is 0.5"),
        ({"local_window": 8, "local_every": 2, "global_first": True}, "global_first is True"),
        (
            {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=32)},
            "rope_scaling is 'llama3'",
        ),
    ],
)
def test_what_no_family_has_is_refused(changes: dict[str, Any], message: str) -> None:
    """Would catch a file that says one model and holds another."""
    made = core_config(architecture=from_flat(changes))
    with pytest.raises(UserError, match=message):
        written(made)
