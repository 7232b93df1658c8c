"""Rotary positions in GGUF files: rows are put back in order, and Llama 3's rule is found from its factors."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_gguf import config

from tfcli.config.model import RopeScaling
from tfcli.formats.gguf import blocks as ggml_blocks
from tfcli.formats.gguf.families import places, written
from tfcli.formats.gguf.rope import llama3_factors, llama3_scaling, rotary_halves, rotary_pairs, stretch
from tfcli.model.layers import rope_frequencies


def converted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Permute q and k of llama models as llama.cpp's convert_hf_to_gguf.py does (its ``permute``)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.mark.parametrize(("heads", "head_width"), [(3, 64), (1, 2), (4, 10)])
def test_rotary_rows_are_put_back(heads: int, head_width: int) -> None:
    """Numbers, biases and quantized rows are put back, and nothing is quantized twice."""
    rows = np.random.default_rng(0).normal(0, 1, (heads * head_width, 64)).astype(np.float32)
    stored = converted(rows, heads)
    np.testing.assert_array_equal(rows[rotary_pairs(heads, head_width)], stored)
    np.testing.assert_array_equal(stored[rotary_halves(heads, head_width)], rows)
    np.testing.assert_array_equal(converted(rows[:, 0], heads)[rotary_halves(heads, head_width)], rows[:, 0])
    blocks = ggml_blocks.quantize("Q4_1", rows)
    put_back = ggml_blocks.quantize("Q4_1", stored)[rotary_halves(heads, head_width)]
    np.testing.assert_array_equal(put_back, blocks)


def test_stored_rows_turn_as_pairs() -> None:
    """The reason for the order: turning neighbors of what is stored is turning halves of what was (Su et al. 2021)."""
    rng = np.random.default_rng(1)
    q, angle = rng.normal(0, 1, 8), rng.normal(0, 1, 4)
    cos, sin = np.cos(angle), np.sin(angle)
    halves = np.concatenate([q[:4] * cos - q[4:] * sin, q[4:] * cos + q[:4] * sin])
    stored = q[rotary_pairs(1, 8)]
    turned = np.empty(8)
    turned[0::2] = stored[0::2] * cos - stored[1::2] * sin
    turned[1::2] = stored[1::2] * cos + stored[0::2] * sin
    np.testing.assert_allclose(turned[rotary_halves(1, 8)], halves, rtol=1e-12)


def test_rows_come_back() -> None:
    """Weights and biases that a family stores in pairs are permuted, and no others."""
    made = config("llama", qkv_bias=True, out_bias=True, ffn_bias=True)
    found = places(written(made)[0], made)
    paired = {name for name, place in found.items() if place.rows_read is not None}
    assert paired == {
        f"blk.{layer}.attn_{part}.{kind}" for layer in (0, 1) for part in "qk" for kind in ("weight", "bias")
    }
    for name in paired:
        there, back = found[name].rows_written, found[name].rows_read
        assert there is not None and back is not None
        np.testing.assert_array_equal(there[back], np.arange(found[name].shape[0]))
    qwen = config("qwen3")
    assert all(place.rows_read is place.rows_written is None for place in places(written(qwen)[0], qwen).values())


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


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (RopeScaling(), RopeScaling(kind="linear", factor=1.0), True),
        (RopeScaling(), RopeScaling(kind="yarn", factor=1.0, original_context=8), True),
        (RopeScaling(), RopeScaling(kind="linear", factor=2.0), False),
        (RopeScaling(kind="yarn", factor=2.0), RopeScaling(kind="linear", factor=2.0), False),
    ],
)
def test_scalings_that_do_the_same_are_the_same(one: RopeScaling, other: RopeScaling, same: bool) -> None:
    assert (stretch(one, 8, 1e4) == stretch(other, 8, 1e4)) is same


def test_llama_3_s_lengths_count_by_their_ratios() -> None:
    rule = RopeScaling(kind="llama3", factor=8.0, original_context=32)
    twice = dataclasses.replace(rule, original_context=64, low_freq_factor=2.0, high_freq_factor=8.0)
    assert stretch(rule, 16, 1e4) == pytest.approx(stretch(twice, 16, 1e4))
