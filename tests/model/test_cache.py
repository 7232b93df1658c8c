"""The key/value cache as a value: what is decoded over it is what a full forward gives."""

import pytest
import torch
from tiny_models import config, model

from tfcli.model.cache import KVCache
from tfcli.model.transformer import Transformer


def cache_for(batch: int = 1, capacity: int = 32, **changes: int) -> KVCache:
    cpu = torch.device("cpu")
    return KVCache(config(**changes), batch=batch, capacity=capacity, dtype=torch.float32, device=cpu)


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
def test_shorter_lengths_forget() -> None:
    """Would catch a rejected draft that still influences what follows."""
    core, ids = model(), tokens()
    cache = cache_for()
    core(ids, cache=cache)
    cache.set_lengths([12])
    core(ids[:, :4], cache=cache)  # other tokens in the same places
    cache.set_lengths([12])
    again = core(ids[:, 12:], cache=cache)
    torch.testing.assert_close(again, core(ids)[:, 12:], atol=1e-5, rtol=1e-5)


def ragged(core: Transformer, ids: torch.Tensor, lengths: list[int]) -> KVCache:
    """A cache whose rows hold the first ``lengths`` ids, read together padded at their end."""
    cache = cache_for(len(lengths))
    core(ids, cache=cache)
    cache.set_lengths(lengths)
    return cache


@torch.no_grad()
def test_ragged_rows_go_on_each_from_its_own_end() -> None:
    """Would catch padding that is attended to, a position counted from the longest row, and stale keys."""
    core, ids, more = model(), tokens(3, 10), tokens(3, 3)
    cache = ragged(core, ids, [10, 4, 7])
    out = core(more, cache=cache)
    for row, length in enumerate([10, 4, 7]):
        whole = torch.cat([ids[row, :length], more[row]])[None]
        torch.testing.assert_close(out[row], core(whole)[0, -3:], atol=1e-5, rtol=1e-5)
    assert cache.lengths == [13, 7, 10]


@torch.no_grad()
@pytest.mark.parametrize("order", [[2, 0, 2], [1, 2], [1, 1, 1]], ids=str)
def test_select_reorders_drops_and_repeats_rows(order: list[int]) -> None:
    """Would catch rows that keep another row's keys, or a row read after it was written over."""
    core, ids = model(), tokens(3, 10)
    lengths = [10, 8, 6]
    cache = ragged(core, ids, lengths)
    cache.select(order)
    step = tokens(len(order), 1)
    out = core(step, cache=cache.rows(0, len(order)))
    for row, was in enumerate(order):
        whole = torch.cat([ids[was, : lengths[was]], step[row]])[None]
        torch.testing.assert_close(out[row], core(whole)[0, -1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_row_moves_and_another_enters_beside_it() -> None:
    """Continuous batching: row 2 takes the place of row 0, and a new prompt takes the place of row 2."""
    core, ids, new = model(), tokens(3, 10), tokens(1, 12)
    cache = ragged(core, ids, [10, 3, 7])
    cache.move(2, 0)
    entering = cache.rows(2, 1)
    entering.set_lengths([0])
    core(new, cache=entering)
    assert cache.lengths == [7, 3, 12]
    step = tokens(3, 1)
    out = core(step, cache=cache)
    for row, before in enumerate([ids[2, :7], ids[1, :3], new[0]]):
        whole = torch.cat([before, step[row]])[None]
        torch.testing.assert_close(out[row], core(whole)[0, -1:], atol=1e-5, rtol=1e-5)


def test_views_stay_within_the_cache() -> None:
    """Would catch a view onto rows that are not there, which would read another's memory."""
    for first, count in ((-1, 1), (0, 4), (3, 1), (0, 0)):
        with pytest.raises(ValueError, match="rows"):
            cache_for(3).rows(first, count)
    with pytest.raises(ValueError, match="2 lengths for 3 rows"):
        cache_for(3).set_lengths([1, 2])


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
