"""Texts packed into one row: each is what it is alone, in every architecture of a decoder."""

import pytest
import torch
from tiny_models import model

from tfcli.config.model import (
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    NormConfig,
    WindowConfig,
)
from tfcli.model.cache import KVCache
from tfcli.model.transformer import packed_positions

LENGTHS = (7, 1, 9, 4)
LEARNED = Architecture(
    norms=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(qk_norm=False, qkv_bias=True, out_bias=True),
    embedding=EmbeddingConfig(positions="learned"),
    feed_forward=FeedForwardConfig(activation="gelu_tanh", gated=False, bias=True),
)
WINDOWED = Architecture(windows=WindowConfig(size=4, every=2, theta=100.0))


@pytest.mark.parametrize("architecture", [Architecture(), LEARNED, WINDOWED], ids=["qwen3", "learned", "windows"])
@pytest.mark.parametrize("train", [True, False])
def test_packed_texts_are_those_alone(architecture: Architecture, train: bool) -> None:
    """Would catch a look into the text before, and positions that go on instead of beginning anew."""
    core = model(architecture=architecture)
    ids = torch.randint(0, 400, (2, sum(LENGTHS) + 3), generator=torch.Generator().manual_seed(1))
    first = torch.repeat_interleave(torch.arange(5), torch.tensor([*LENGTHS, 3]))
    other = torch.repeat_interleave(torch.arange(2), torch.tensor([20, 4]))
    with torch.set_grad_enabled(train):
        packed = core.logits(core(ids, segments_BT=torch.stack([first, other])))
        for row, segments in enumerate((first, other)):
            for number in segments.unique():
                alone = core.logits(core(ids[row, segments == number][None]))[0]
                torch.testing.assert_close(packed[row, segments == number], alone, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_nothing_of_another_text_is_seen() -> None:
    """Exact: one bit of a neighbour would let training look at what it is not asked about."""
    core = model()
    ids = torch.randint(0, 399, (1, 16), generator=torch.Generator().manual_seed(2))
    segments = torch.tensor([[0] * 6 + [1] * 5 + [2] * 5])
    before = core(ids, segments_BT=segments)
    changed = ids.clone()
    changed[0, 6:11] += 1
    after = core(changed, segments_BT=segments)
    assert torch.equal(after[0, :6], before[0, :6]) and torch.equal(after[0, 11:], before[0, 11:])
    assert not torch.equal(after[0, 6:11], before[0, 6:11])


def test_positions_begin_anew() -> None:
    assert packed_positions(torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, 3, 0]])).tolist() == [
        [0, 1, 0, 1, 2],
        [0, 1, 2, 3, 0],
    ]


def test_a_cache_has_no_segments() -> None:
    core, ids = model(), torch.zeros(1, 4, dtype=torch.int64)
    cache = KVCache(core.config, batch=1, capacity=8, dtype=torch.float32, device=core.device)
    with pytest.raises(ValueError, match="without a cache"):
        core(ids, cache=cache, segments_BT=ids)
