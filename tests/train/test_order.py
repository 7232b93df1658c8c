"""The order of examples: a permutation an epoch, decided by seed and step alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfcli.train import order


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_epoch_sees_every_example_once(size: int, key: int) -> None:
    """Catches examples drawn twice or never: training on a part of the text."""
    places = np.arange(size, dtype=np.int64)
    assert sorted(order.permute(places, size=size, key=key)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batches_straddle_epochs(size: int, batch: int) -> None:
    """Catches a last partial batch that is dropped, and an epoch that is counted wrong where a batch spans two."""
    steps = 3 * size
    seen = [order.batch(step, seed=1, size=size, batch=batch) for step in range(steps)]
    indices = np.concatenate([indices for indices, _ in seen])
    epochs = np.concatenate([epochs for _, epochs in seen])
    assert (epochs == np.arange(steps * batch) // size).all()
    for epoch in range(epochs[-1]):
        assert sorted(indices[epochs == epoch]) == list(range(size))


def test_a_pure_function_of_seed_and_step() -> None:
    """Catches hidden state: a run that is resumed at step 7 must see what it would have seen."""
    forward = [order.batch(step, seed=5, size=37, batch=4)[0].tolist() for step in range(20)]
    backward = [order.batch(step, seed=5, size=37, batch=4)[0].tolist() for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [order.batch(step, seed=6, size=37, batch=4)[0].tolist() for step in range(20)]


def test_epochs_differ() -> None:
    """Catches one order used for every epoch."""
    orders = {tuple(order.batch(epoch, seed=0, size=50, batch=50)[0]) for epoch in range(20)}
    assert len(orders) == 20


def test_neighbors_are_separated() -> None:
    """Catches a weak mixer: of 4096 examples, about one pair in 4096 / 2 stays side by side by chance."""
    places = order.permute(np.arange(4096, dtype=np.int64), size=4096, key=3)
    assert sum(abs(b - a) == 1 for a, b in itertools.pairwise(places.tolist())) < 12
    assert abs(np.corrcoef(np.arange(4096), places)[0, 1]) < 0.06  # 4 standard deviations of 1 / sqrt(4096)


def test_does_not_depend_on_the_size_of_a_batch() -> None:
    """Catches an order that changes with the batch: the stream of examples is one."""
    one = np.concatenate([order.batch(step, seed=9, size=11, batch=2)[0] for step in range(12)])
    other = np.concatenate([order.batch(step, seed=9, size=11, batch=8)[0] for step in range(3)])
    assert (one == other).all()


def test_buckets_hold_the_same_examples() -> None:
    """Catches an example that is seen twice or never in an epoch, and batches of mixed lengths."""
    lengths = np.random.default_rng(0).integers(1, 100, 64)
    seen = [order.bucketed(step, seed=3, lengths=lengths, batch=4, chunk=8, steps=32)[0] for step in range(32)]
    for epoch in range(2):
        assert sorted(np.concatenate(seen[16 * epoch : 16 * epoch + 16])) == list(range(64))
    spread = [int(np.ptp(lengths[indices])) for indices in seen]
    mixed = [int(np.ptp(lengths[order.batch(step, seed=3, size=64, batch=4)[0]])) for step in range(32)]
    assert np.mean(spread) < np.mean(mixed) / 3
    firsts = [lengths[indices].mean() for indices in seen[:8]]
    assert sorted(firsts) != firsts, "short ones first is no order of chance"


def test_buckets_end_with_the_run_and_do_not_depend_on_the_past() -> None:
    """Catches a last chunk that reaches beyond the run, and a resumed run that sees other batches."""
    lengths = np.arange(10)

    def batch(step: int) -> list[int]:
        return order.bucketed(step, seed=1, lengths=lengths, batch=2, chunk=4, steps=5)[0].tolist()

    assert sorted(index for step in range(5) for index in batch(step)) == list(range(10))
    assert [batch(step) for step in reversed(range(5))] == [batch(step) for step in range(5)][::-1]
