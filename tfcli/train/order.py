"""The examples of a step, a pure function of the seed and the step: resuming takes one integer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def batch(step: int, *, seed: int, size: int, batch: int) -> tuple[Indices, Indices]:
    """The examples of ``step`` (from 0): indices (batch,) below ``size``, and the epoch (batch,) of each.

    Every epoch visits every example once, in its own order; a batch may straddle two epochs.
    """
    return at(np.arange(step * batch, (step + 1) * batch, dtype=np.int64), seed=seed, size=size)


def at(positions: Indices, *, seed: int, size: int) -> tuple[Indices, Indices]:
    """The examples at ``positions`` in the endless sequence of epochs: indices below ``size``, and epochs."""
    epochs, places = np.divmod(positions, size)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        indices[mine] = permute(places[mine], size=size, key=mix(seed, int(epoch)))
    return indices, epochs


def bucketed(step: int, *, seed: int, lengths: Indices, batch: int, chunk: int, steps: int) -> tuple[Indices, Indices]:
    """Like ``batch``, with examples of similar ``lengths`` (size,) together, so that there is little padding.

    The steps of a chunk share the examples that ``batch`` would give them: sorted by length, split into batches, and
    the batches shuffled. The last chunk ends with the run, at ``steps``.
    """
    first = step // chunk * chunk
    count = max(1, min(chunk, steps - first))
    positions = np.arange(first * batch, (first + count) * batch, dtype=np.int64)
    indices, epochs = at(positions, seed=seed, size=len(lengths))
    by_length = np.argsort(lengths[indices], kind="stable")
    turn = permute(np.array([step - first]), size=count, key=mix(seed ^ 0x5DEECE66D, first))[0]
    mine = by_length[turn * batch : (turn + 1) * batch]
    return indices[mine], epochs[mine]


def permute(places: Indices, *, size: int, key: int) -> Indices:
    """The images of ``places`` under a random permutation of ``range(size)``, in constant memory.

    A four-round Feistel network on the smallest even number of bits that holds ``size``; values that fall outside go
    through it again until they fall inside (Black and Rogaway 2002, cycle walking).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    values = places.astype(np.uint64)
    todo = np.ones(len(values), dtype=bool)
    while todo.any():
        left, right = values[todo] >> np.uint64(half), values[todo] & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(right, mix(key, turn)) & mask)
        values[todo] = (left << np.uint64(half)) | right
        todo[todo] = values[todo] >= size
    return values.astype(np.int64)


def mix(seed: int, value: int) -> int:
    """Derive a 64-bit key from a key and a number."""
    return int(_hash(np.array([value], dtype=np.uint64), seed)[0])


def _hash(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014) over ``values`` + key."""
    x = values + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
