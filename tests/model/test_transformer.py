"""The decoder: causality, padding, initial values and the names of its parameters."""

import pytest
import torch
from tiny_models import config, model

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    NormConfig,
    WindowConfig,
)
from tfcli.formats.hf.families.llama import NAMES
from tfcli.model.cache import KVCache
from tfcli.model.transformer import Transformer, initialize


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it() -> None:
    """Exact: a single leaked bit would let training look at the answer."""
    core = model()
    ids = torch.randint(3, 400, (2, 16), generator=torch.Generator().manual_seed(1))
    before = core(ids)
    for position in (3, 15):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 400
        after = core(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


@torch.no_grad()
def test_rows_of_different_length_read_together_are_those_alone() -> None:
    """Would catch padding that is attended to, or positions that do not go on behind a row's own end."""
    core, lengths = model(), [9, 4, 1]
    ids = torch.randint(3, 400, (3, 12), generator=torch.Generator().manual_seed(2))
    cache = KVCache(core.config, batch=3, capacity=32, dtype=torch.float32, device=core.device)
    core(ids[:, :9], cache=cache)
    cache.set_lengths(lengths)
    after = core(ids[:, 9:10], cache=cache)
    more = core(ids[:, 10:], cache=cache)
    for row, length in enumerate(lengths):
        alone = core(torch.cat([ids[row, :length], ids[row, 9:]])[None])[0, length:]
        torch.testing.assert_close(torch.cat([after, more], dim=1)[row], alone, atol=1e-5, rtol=1e-5)


ENCODER = Architecture(
    causal=False,
    norms=NormConfig(kind="layer", bias=True, place="post"),
    embedding=EmbeddingConfig(norm=True, token_types=2, positions="learned"),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    feed_forward=FeedForwardConfig(activation="gelu", gated=False, bias=True),
)
WINDOWED = Architecture(
    causal=False,
    norms=NormConfig(kind="layer"),
    feed_forward=FeedForwardConfig(activation="gelu"),
    windows=WindowConfig(size=6, every=2, theta=100.0),
)


@pytest.mark.parametrize("architecture", [ENCODER, WINDOWED], ids=["bert", "windows"])
@torch.no_grad()
def test_an_encoder_sees_both_sides_and_no_padding(architecture: Architecture) -> None:
    """Would catch padding that is attended to, and NaN of a padded query whose whole window is padding."""
    core = model(architecture=architecture)
    ids = torch.randint(3, 400, (3, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(20) < torch.tensor([[20], [9], [1]])
    out = core(ids, mask_BT=mask)
    assert torch.isfinite(out).all()
    for row, length in enumerate((20, 9, 1)):
        torch.testing.assert_close(out[row, :length], core(ids[row : row + 1, :length])[0], atol=1e-4, rtol=1e-4)
    changed = ids.clone()
    changed[:, 8] += 1
    assert not torch.equal(core(changed)[0, 6], out[0, 6])
    cache = KVCache(core.config, batch=3, capacity=32, dtype=torch.float32, device=core.device)
    with pytest.raises(ValueError, match="an encoder"):
        core(ids, cache=cache)


@pytest.mark.parametrize(
    "architecture",
    [ENCODER, WINDOWED, Architecture(norms=NormConfig(place="sandwich"))],
    ids=["bert", "windows", "gemma"],
)
def test_every_architecture_starts_finite_and_learns(architecture: Architecture) -> None:
    """Would catch a parameter that is never filled, or one that no gradient reaches."""
    core = Transformer(config(architecture=architecture, tied=False))
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.fill_(float("nan"))
    initialize(core, 0)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            assert torch.isfinite(parameter).all(), name
            assert not name.endswith(".bias") or (parameter == 0).all(), name
            parameter.add_(0.1)
    ids = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(4))
    core.loss(core(ids, dtype=torch.bfloat16, dropout=0.1), ids).backward()
    assert all(parameter.grad is not None for parameter in core.parameters())


def test_initial_values_follow_the_table() -> None:
    """Would catch a parameter left uninitialised, or a family with another spread than the table says."""
    core = Transformer(config(width=64, heads=4, head_width=16, ffn_width=256, tied=False))
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.fill_(float("nan"))
    initialize(core, 0)
    state = core.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert state["embed.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert state["embed.weight"].mean().item() == pytest.approx(0.0, abs=0.001)
    for name, value in state.items():
        if value.dim() == 1:
            assert (value == 1).all(), name
        elif name.endswith((".o.weight", ".down.weight")) or name == "head.weight":
            assert (value == 0).all(), name
        elif name != "embed.weight":
            assert value.std().item() == pytest.approx(value.shape[1] ** -0.5, rel=0.05), name
            assert value.abs().max().item() <= (3 / value.shape[1]) ** 0.5


def test_the_seed_decides_the_initial_values() -> None:
    """Would catch initial values drawn from the global generator."""
    first, second, third = (Transformer(config()) for _ in range(3))
    for core, seed in ((first, 1), (second, 1), (third, 2)):
        torch.manual_seed(seed * 100 + 7)
        initialize(core, seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embed.weight, third.embed.weight)


@torch.no_grad()
def test_a_fresh_untied_model_predicts_uniformly() -> None:
    """The first loss is ln V: would catch a head that is not zero."""
    core = Transformer(config(tied=False))
    initialize(core, 0)
    logits = core.logits(core(torch.tensor([[5, 6, 7]])))
    assert logits.abs().max() == 0


@pytest.mark.parametrize("tied", [True, False])
def test_names_of_parameters_are_the_table(tied: bool) -> None:
    """Would catch a renamed parameter, which makes every saved model unreadable."""
    core = Transformer(config(tied=tied))
    expected = {f"{part}.weight" for part in (*NAMES.outer, "head")}
    for layer in range(core.config.depth):
        expected |= {f"blocks.{layer}.{part}.weight" for part in NAMES.layer}
    assert set(core.state_dict()) == expected
    assert (core.head.weight is core.embed.weight) == tied


@torch.no_grad()
def test_few_rows_and_many_rows_take_the_same_product() -> None:
    """Decoding multiplies fused layers one by one, training in one: would catch a difference."""
    core, ids = model(context=300), torch.randint(3, 400, (1, 300), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(core(ids)[:, :200], core(ids[:, :200]), atol=1e-5, rtol=1e-5)
