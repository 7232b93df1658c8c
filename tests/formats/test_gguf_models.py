"""Models in GGUF files: names and shapes as in transformers and llama.cpp, settings both ways, lies refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tfcli.errors import UserError
from tfcli.formats.gguf import blocks as ggml_blocks
from tfcli.formats.gguf import families as gguf_settings
from tfcli.formats.gguf.families import (
    FAMILIES,
    GgufConfig,
    RopeScaling,
    config_from_gguf,
    metadata_from_config,
    rotary_halves,
    rotary_pairs,
    tensor_names,
    tensor_shapes,
)
from tfcli.formats.gguf.file import GgufFile, NewTensor, open_gguf, write_gguf

SMALL: dict[str, Any] = {
    "vocab_size": 40, "context": 64, "depth": 2, "width": 24, "heads": 4, "kv_heads": 2, "head_width": 8,
    "ffn_width": 48,
}  # fmt: skip
CONFIGS = {
    "llama": GgufConfig(architecture="llama", **SMALL, rope_theta=500_000.0, norm_eps=1e-5, tied=False),
    "llama with biases": GgufConfig(architecture="llama", **SMALL, qkv_bias=True, output_bias=True, ffn_bias=True),
    "llama 3": GgufConfig(architecture="llama", **SMALL, rope_freqs=(1.0, 1.0, 2.5, 8.0)),
    "llama, stretched": GgufConfig(
        architecture="llama", **SMALL, rope_scaling=RopeScaling(type="linear", factor=4.0, original_context=16)
    ),
    "qwen2": GgufConfig(architecture="qwen2", **SMALL, qkv_bias=True, rope_theta=1e6),
    "qwen3": GgufConfig(architecture="qwen3", **SMALL),
    "qwen3, yarn": GgufConfig(
        architecture="qwen3",
        **SMALL,
        rope_scaling=RopeScaling(
            type="yarn", factor=4.0, original_context=32, attention_factor=1 + 0.1 * math.log(4), beta_fast=16.0
        ),
    ),
    "gemma3": GgufConfig(
        architecture="gemma3",
        **{**SMALL, "depth": 7},
        rope_theta=1e6,
        sliding_window=16,
        sliding_layers=(True, True, True, True, True, False, True),
        logit_softcap=30.0,
    ),
}


def save(path: Path, config: GgufConfig, tensors: dict[str, NewTensor] | None = None, **changes: Any) -> GgufFile:
    """A file of such a model with zeros for weights; ``changes`` of the metadata, None to leave a key out."""
    if tensors is None:
        tensors = zeros(config)
    metadata = metadata_from_config(config, type="F16") | {name.replace("__", "."): v for name, v in changes.items()}
    write_gguf(path, {name: value for name, value in metadata.items() if value is not None}, tensors.values())
    return open_gguf(path)


def zeros(config: GgufConfig) -> dict[str, NewTensor]:
    shapes = dict(tensor_shapes(config))
    data: dict[str, NDArray[np.float32]] = {}
    if config.rope_freqs is not None:
        shapes[gguf_settings.ROPE_FREQS] = (len(config.rope_freqs),)
        data[gguf_settings.ROPE_FREQS] = np.array(config.rope_freqs, np.float32)
    return {
        name: NewTensor(name=name, shape=shape, type="F32", data=data.get(name, np.zeros(shape, np.float32)))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_come_back(tmp_path: Path, name: str) -> None:
    """Would catch a key that is written but not read, or read as something else."""
    assert config_from_gguf(save(tmp_path / "m.gguf", CONFIGS[name])) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_those_of_llama_cpp(name: str) -> None:
    """The package's own table maps Hugging Face's names onto ours, and its keys are those that we write."""
    config = CONFIGS[name]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == config.architecture)
    table = gguf.get_tensor_name_map(arch, config.depth)
    for ours, theirs in tensor_names(config).items():
        assert table.get_name(theirs, try_suffixes=(".weight", ".bias")) == ours
    known = {
        value.replace("{arch}", config.architecture)
        for group in (gguf.Keys.General, gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    assert metadata_from_config(config, type="Q8_0", name="x").keys() <= known


def transformers_shapes(config: GgufConfig) -> dict[str, tuple[int, ...]]:
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_width, "tie_word_embeddings": config.tied,
    }  # fmt: skip
    if config.architecture == "llama":
        fields |= {"attention_bias": config.output_bias, "mlp_bias": config.ffn_bias}
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}[config.architecture]
    suffix = "TextConfig" if family == "Gemma3" else "Config"
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, family + suffix)(**fields))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "llama with biases", "qwen3", "qwen2", "gemma3"])
def test_shapes_are_those_of_transformers(name: str) -> None:
    """Would catch a matrix lying on its side, a missing or an invented tensor."""
    config = CONFIGS[name]
    if config.architecture == "qwen2":  # transformers has no other head width there
        config = dataclasses.replace(config, head_width=config.width // config.heads)
    shapes = tensor_shapes(config)
    assert {theirs: shapes[ours] for ours, theirs in tensor_names(config).items()} == transformers_shapes(config)


def converted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """What llama.cpp's convert_hf_to_gguf.py does to q and k of llama models (its ``permute``)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.mark.parametrize(("heads", "head_width"), [(3, 64), (1, 2), (4, 10)])
def test_rotary_rows_are_put_back(heads: int, head_width: int) -> None:
    """Of numbers, biases and quantized rows: nothing is quantized twice."""
    rows = np.random.default_rng(0).normal(0, 1, (heads * head_width, 64)).astype(np.float32)
    stored = converted(rows, heads)
    np.testing.assert_array_equal(rows[rotary_pairs(heads, head_width)], stored)
    np.testing.assert_array_equal(stored[rotary_halves(heads, head_width)], rows)
    np.testing.assert_array_equal(converted(rows[:, 0], heads)[rotary_halves(heads, head_width)], rows[:, 0])
    blocks = ggml_blocks.quantize("Q4_1", rows)
    put_back = ggml_blocks.groups("Q4_1", ggml_blocks.quantize("Q4_1", stored)).take(rotary_halves(heads, head_width))
    np.testing.assert_array_equal(put_back.dequantize(), ggml_blocks.dequantize("Q4_1", blocks))


def test_stored_rows_turn_as_pairs() -> None:
    """The reason for the order: turning neighbours of what is stored is turning halves of what was (Su et al. 2021)."""
    rng = np.random.default_rng(1)
    q, angle = rng.normal(0, 1, 8), rng.normal(0, 1, 4)
    cos, sin = np.cos(angle), np.sin(angle)
    halves = np.concatenate([q[:4] * cos - q[4:] * sin, q[4:] * cos + q[:4] * sin])
    stored = q[rotary_pairs(1, 8)]
    turned = np.empty(8)
    turned[0::2] = stored[0::2] * cos - stored[1::2] * sin
    turned[1::2] = stored[1::2] * cos + stored[0::2] * sin
    np.testing.assert_allclose(turned[rotary_halves(1, 8)], halves, rtol=1e-12)


def test_types_follow_llama_cpp() -> None:
    for name, shape, type, stored in [
        ("blk.0.attn_norm.weight", (24,), "Q8_0", "F32"),
        ("blk.0.attn_q.bias", (32,), "F16", "F32"),
        ("blk.0.attn_q.weight", (32, 64), "Q8_0", "Q8_0"),
        ("blk.0.attn_q.weight", (32, 24), "Q8_0", "F16"),
        ("blk.0.attn_q.weight", (32, 24), "BF16", "BF16"),
    ]:
        assert gguf_settings.stored_type(name, shape, type) == stored


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    """llama.cpp's defaults; a list with one number for each layer; old names; a table that is passed over."""
    config = dataclasses.replace(CONFIGS["llama"], head_width=6)
    tensors = zeros(config)
    tensors["rot"] = NewTensor(name="blk.1.attn_rot_embd.weight", shape=(4,), type="F32", data=np.ones(4, np.float32))
    file = save(
        tmp_path / "m.gguf", config, tensors, llama__vocab_size=None, llama__attention__key_length=None,
        llama__attention__value_length=None, llama__rope__dimension_count=None, llama__rope__freq_base=None,
        llama__attention__head_count_kv=[2, 2], general__type=None, llama__rope__scale_linear=2.0,
    )  # fmt: skip
    assert config_from_gguf(file) == dataclasses.replace(
        config, rope_theta=10_000.0, rope_scaling=RopeScaling(type="linear", factor=2.0, original_context=64)
    )
    equal = dataclasses.replace(config, kv_heads=4)
    assert config_from_gguf(save(tmp_path / "m.gguf", equal, llama__attention__head_count_kv=None)).kv_heads == 4


def test_gemma_says_which_layers_slide(tmp_path: Path) -> None:
    config, key = CONFIGS["gemma3"], "gemma3__attention__sliding_window_pattern"
    assert config_from_gguf(save(tmp_path / "m.gguf", config, **{key: None})) == config  # five of six
    every = config_from_gguf(save(tmp_path / "m.gguf", config, **{key: 2})).sliding_layers
    assert every == (True, False, True, False, True, False, True)
    none = config_from_gguf(save(tmp_path / "m.gguf", config, gemma3__attention__sliding_window=0))
    assert none.sliding_window is None and none.sliding_layers == ()


def test_gemma_s_largest_model_scales_by_its_width() -> None:
    base = {**SMALL, "head_width": 128, "width": 5376, "heads": 32}
    shapes = {"depth": 62}, {"depth": 34}
    scales = [GgufConfig(architecture="gemma3", **{**base, **shape}).attention_scale for shape in shapes]
    assert scales == pytest.approx([168**-0.5, 128**-0.5])  # Gemma 3 27B, and the others
    assert GgufConfig(architecture="llama", **base).attention_scale == 128**-0.5


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general__architecture": "gpt2"}, r"architecture 'gpt2'.*llama, qwen2, qwen3, gemma3"),
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
    "width": ({"qwen3__embedding_length": 32}, r"mis-shaped \(token_embd\.weight \(40, 24\), expected \(40, 32\)"),
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
    "attention factor": ({"qwen3__rope__scaling__attn_factor": 2.0}, "attn_factor is 2.0"),
    "vocabulary": ({"tokenizer__ggml__tokens": ["a", "b"]}, "a vocabulary of 2 pieces, its embedding 40 rows"),
    "vocabulary size": ({"qwen3__vocab_size": 41}, "a vocabulary of 41 pieces"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_metadata_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    """Would catch a model built by what a header says: sizes are compared with the tensors before anything is made."""
    changes, said = LIES[name]
    with pytest.raises(UserError, match=said) as caught:
        config_from_gguf(save(tmp_path / "m.gguf", CONFIGS["qwen3"], **changes))
    assert len(str(caught.value)) < 500


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["llama 3"]

    def refused(said: str, **changes: NewTensor | None) -> None:
        tensors = {name: made for name, made in (zeros(config) | changes).items() if made is not None}
        with pytest.raises(UserError, match=said):
            config_from_gguf(save(tmp_path / "m.gguf", config, tensors))

    def tensor(name: str, *shape: int, value: float = 0.0) -> NewTensor:
        return NewTensor(name=name, shape=shape, type="F32", data=np.full(shape, value, np.float32))

    refused("has no token_embd", **{"token_embd.weight": None})
    refused(r"1 missing \(blk\.1\.ffn_up\.weight\)", **{"blk.1.ffn_up.weight": None})
    refused(r"1 unexpected \(cls\.output\.weight\)", x=tensor("cls.output.weight", 2, 24))
    refused(r"expected \(32, 24\)", **{"blk.0.attn_q.weight": tensor("blk.0.attn_q.weight", 24, 32)})
    refused(r"5 missing \(blk\.0\.attn_k\.bias, blk\.0", x=tensor("blk.0.attn_q.bias", 32))
    refused("rope_freqs.weight is F32 of shape", **{"rope_freqs.weight": tensor("rope_freqs.weight", 8)})
    refused("not positive", **{"rope_freqs.weight": tensor("rope_freqs.weight", 4, value=0.0)})
    refused("not positive", **{"rope_freqs.weight": tensor("rope_freqs.weight", 4, value=-1.0)})


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no more than its 0 tensors make"):
        config_from_gguf(save(tmp_path / "m.gguf", CONFIGS["qwen3"], {}))


def test_every_family_has_a_test() -> None:
    assert {config.architecture for config in CONFIGS.values()} == FAMILIES.keys()


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
            config = config_from_gguf(file := open_gguf(path))
        except UserError:
            continue
        assert all(file.tensors[key].shape == shape for key, shape in tensor_shapes(config).items())
