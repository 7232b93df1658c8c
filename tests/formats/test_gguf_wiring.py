"""GGUF's families as the core's wirings: there and back, and what neither has is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import config
from tiny_models import config as core_config

from tfcli.config.model import RopeScaling, Wiring
from tfcli.errors import UserError
from tfcli.formats.gguf import families as gguf_settings
from tfcli.formats.gguf.families import GgufConfig, tensor_names
from tfcli.formats.gguf.rope import (
    core_names,
    from_gguf,
    llama3_factors,
    llama3_scaling,
    rows_read,
    rows_written,
    to_gguf,
)
from tfcli.model.layers import rope_frequencies
from tfcli.model.transformer import Transformer

LINEAR = gguf_settings.RopeScaling(type="linear", factor=4.0, original_context=16)
YARN = gguf_settings.RopeScaling(type="yarn", factor=4.0, original_context=16, attention_factor=1.1)
CONFIGS = {
    "llama": config("llama", tied=False),
    "llama with biases": config("llama", qkv_bias=True, output_bias=True, ffn_bias=True),
    "llama, stretched": config("llama", rope_scaling=LINEAR),
    "qwen2": config("qwen2", qkv_bias=True),
    "qwen3": config("qwen3", rope_theta=1e6),
    "qwen3, yarn": config("qwen3", rope_scaling=YARN),
    "gemma3": config("gemma3", depth=6, sliding_window=8, sliding_layers=(True, True, False) * 2, sliding_theta=1e3),
    "gemma3, all slide": config("gemma3", sliding_window=8, sliding_layers=(True, True)),
    "gemma3 27B": config("gemma3", depth=62, sliding_window=8, sliding_layers=tuple(i % 6 < 5 for i in range(62))),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_come_back(name: str) -> None:
    """Would catch a setting that one way knows and the other does not."""
    assert to_gguf(from_gguf(CONFIGS[name])) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_of_the_core_has_its_tensor(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(from_gguf(CONFIGS[name]))
    names = core_names(CONFIGS[name])
    assert len(set(names.values())) == len(names) == len(tensor_names(CONFIGS[name]))
    assert set(names.values()) == {key for key, _ in model.named_parameters()}


def test_rows_come_back() -> None:
    llama = CONFIGS["llama with biases"]
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.bias"):
        there, back = rows_written(llama, name), rows_read(llama, name)
        assert there is not None and back is not None
        np.testing.assert_array_equal(there[back], np.arange(len(there)))
    assert rows_read(llama, "blk.0.attn_v.weight") is None
    assert rows_read(CONFIGS["qwen3"], "blk.0.attn_q.weight") is None


@given(
    head_width=st.sampled_from([8, 16, 64, 128]),
    theta=st.sampled_from([1e4, 5e5]),
    factor=st.sampled_from([2.0, 8.0, 32.0]),
    context=st.integers(16, 16384),
    low=st.sampled_from([1.0, 2.0]),
    high=st.sampled_from([4.0, 8.0]),
)
@settings(max_examples=200, deadline=None)
def test_llama_3_s_rule_is_found_again(
    head_width: int, theta: float, factor: float, context: int, low: float, high: float
) -> None:
    """The rule that is found gives the same frequencies, by the core's own formula."""
    rule = RopeScaling(
        kind="llama3", factor=factor, original_context=context, low_freq_factor=low, high_freq_factor=high
    )
    factors = llama3_factors(rule, head_width, theta).astype(np.float32)
    found = llama3_scaling(tuple(factors.tolist()), head_width, theta)
    assert found is not None
    wanted, made = (rope_frequencies(head_width, theta, scaling) for scaling in (rule, found))
    torch.testing.assert_close(made, wanted, rtol=2e-5, atol=0)


def test_llama_3_s_published_rule_is_found_as_it_was_published() -> None:
    rule = RopeScaling(kind="llama3", factor=32.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    factors = llama3_factors(rule, 64, 500_000.0).astype(np.float32)
    assert llama3_scaling(tuple(factors.tolist()), 64, 500_000.0) == rule
    made = to_gguf(from_gguf(config("llama", head_width=64, rope_theta=500_000.0, rope_freqs=tuple(factors.tolist()))))
    np.testing.assert_allclose(made.rope_freqs, factors, rtol=1e-6)


REFUSED: list[tuple[GgufConfig, str]] = [
    (config("gemma3", logit_softcap=30.0), "caps its logits"),
    (
        config("gemma3", depth=4, sliding_window=8, sliding_layers=(True, False, False, True)),
        "has sliding windows in an",
    ),
    (config("llama", rope_freqs=(1.0, 9.0, 2.0, 3.0, 1.0, 1.0, 4.0, 5.0)), "stretches its rotary positions"),
    (config("llama", rope_freqs=(1.0,) * 7 + (8.0,), rope_scaling=LINEAR), "stretches its rotary positions"),
]


@pytest.mark.parametrize(("made", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_the_core_does_not_have_is_refused(made: GgufConfig, said: str) -> None:
    with pytest.raises(UserError, match=f"x.gguf {said}"):
        from_gguf(made, name="x.gguf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"causal": False}, "is an encoder"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"positions": "learned"}, "positions is 'learned'"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"qkv_bias": True}, "qkv_bias is True"),
        ({"qk_norm": False, "local_window": 8, "local_every": 2}, "local_window is 8"),
        ({"attention_scale": 0.5}, "attention_scale is 0.5"),
        (
            {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=32)},
            "rope_scaling is 'llama3'",
        ),
    ],
)
def test_what_no_family_has_is_refused(changes: dict[str, Any], said: str) -> None:
    """Would catch a file that says one model and holds another."""
    made = core_config(wiring=dataclasses.replace(Wiring(), **changes))
    with pytest.raises(UserError, match=said):
        to_gguf(made)
