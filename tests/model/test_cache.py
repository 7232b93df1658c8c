"""The key/value cache as a value: what is decoded over it is what a full forward gives."""

import pytest
import torch
from tiny_models import config, model

from tfcli.model.cache import KVCache


def cache_for(batch: int = 1, capacity: int = 32, pad: list[int] | None = None, **changes: int) -> KVCache:
    return KVCache(
        config(**changes), batch=batch, capacity=capacity, dtype=torch.float32, device=torch.device("cpu"),
        pad_B=None if pad is None else torch.tensor(pad),
    )  # fmt: skip


def tokens(rows: int = 1, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 400, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("parts", [[20], [1] * 20, [7, 13], [12, 1, 1, 6]], ids=str)
@torch.no_grad()
def test_cached_equals_full_forward(parts: list[int]) -> None:
    """Would catch positions that start over, a mask for the wrong length, and chunked prefill that loses tokens."""
    core, ids = model(), tokens(2)
    cache = cache_for(2)
    pieces = [core(part, cache=cache) for part in ids.split(parts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), core(ids), atol=1e-5, rtol=1e-5)
    assert cache.length == 20


@torch.no_grad()
def test_trim_forgets() -> None:
    """Would catch a rejected draft that still influences what follows."""
    core, ids = model(), tokens()
    cache = cache_for()
    core(ids, cache=cache)
    cache.trim(8)
    core(ids[:, :4], cache=cache)  # other tokens in the same places
    cache.trim(4)
    again = core(ids[:, 12:], cache=cache)
    torch.testing.assert_close(again, core(ids)[:, 12:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_select_reorders_drops_and_repeats_rows() -> None:
    """Would catch rows that keep another row's keys, or their padding."""
    core = model()
    ids = tokens(3, 10)
    pad = [0, 2, 4]
    cache = cache_for(3, pad=pad)
    core(ids, cache=cache)
    order = [2, 0, 2]
    cache.select(torch.tensor(order))
    step = tokens(3, 1)
    out = core(step, cache=cache)
    for row, was in enumerate(order):
        whole = torch.cat([ids[was, pad[was] :], step[row]])[None]
        torch.testing.assert_close(out[row], core(whole)[0, -1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_growth_keeps_what_is_there() -> None:
    """Would catch a buffer that is enlarged without its content; it starts at 64 positions."""
    core, ids = model(context=200), tokens(1, 150)
    cache = cache_for(capacity=200, context=200)
    parts = [core(part, cache=cache) for part in ids.split([60, 1, 1, 1, 1, 1, 1, 84], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), core(ids), atol=1e-5, rtol=1e-5)


def test_capacity_is_a_limit() -> None:
    """Would catch silent overwriting past the end."""
    core = model()
    with pytest.raises(ValueError, match="20 positions do not fit a cache of 16"):
        core(tokens(), cache=cache_for(capacity=16))


def test_nbytes_counts_keys_and_values() -> None:
    """2 tensors x 2 layers x 2 heads x 32 positions x 8 x 4 bytes."""
    assert cache_for().nbytes == 2 * 2 * 2 * 32 * 8 * 4
