"""Keys and values of the positions already seen: a value passed into the model, never hung on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tfcli.config.model import ModelConfig


class KVCache:
    """Keys and values of every layer for a number of rows, each filled from position 0 up to its own length.

    Rows are ragged to the right: what lies beyond a row's length is never attended to, and is overwritten as the row
    grows. So prompts of different length are read together padded at their end, a finished row is dropped by moving
    the last one into its place, and a new one enters behind the others. ``rows(first, count)`` is the same cache seen
    as only some of its rows. Buffers (rows, G, S, K) grow by doubling up to ``capacity`` positions.
    """

    def __init__(
        self, config: ModelConfig, *, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._store = _Store(config, batch, capacity, dtype, device)
        self.first, self.batch = 0, batch

    @property
    def capacity(self) -> int:
        """Positions that a row can hold."""
        return self._store.capacity

    @property
    def lengths(self) -> list[int]:
        """Positions that each row holds."""
        return self._store.lengths[self.first : self.first + self.batch]

    @property
    def length(self) -> int:
        """Positions that the longest row holds."""
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all rows are equally long."""
        lengths = self.lengths
        return lengths.count(lengths[0]) == len(lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers of all rows."""
        return sum(t.numel() * t.element_size() for t in self._store.keys + self._store.values)

    def rows(self, first: int, count: int) -> KVCache:
        """The same cache, seen as ``count`` of these rows from ``first`` on."""
        if first < 0 or count < 1 or first + count > self.batch:
            raise ValueError(f"rows {first} to {first + count} of a cache of {self.batch}")
        view = KVCache.__new__(KVCache)
        view._store = self._store
        view.first, view.batch = self.first + first, count
        return view

    def keys(self, layer: int) -> Tensor:
        """The buffer of a layer's keys for these rows, (B, G, S, K), filled or not."""
        return self._store.keys[layer][self.first : self.first + self.batch]

    def values(self, layer: int) -> Tensor:
        """The buffer of a layer's values for these rows, (B, G, S, K), filled or not."""
        return self._store.values[layer][self.first : self.first + self.batch]

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions in every row. Raises ValueError past the capacity."""
        store = self._store
        if length > store.capacity:
            raise ValueError(f"{length} positions do not fit a cache of {store.capacity}")
        if length > store.keys[0].shape[2]:
            filled = max(store.lengths)
            for buffers in (store.keys, store.values):
                for layer, buffer in enumerate(buffers):
                    buffers[layer] = _grown(buffer, filled, length, store.capacity)

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions of one layer behind each row; returns keys and values up to the longest, (B, G, S, K).

        Lengths move only with ``advance``, once every layer has appended. Raises ValueError past the capacity.
        """
        T, lengths = k_BGTK.shape[2], self.lengths
        end = max(lengths) + T
        self.reserve(end)
        keys, values = self.keys(layer), self.values(layer)
        if self.uniform:
            keys[:, :, lengths[0] : end] = k_BGTK
            values[:, :, lengths[0] : end] = v_BGTK
        else:
            row_B1 = torch.arange(self.batch, device=keys.device)[:, None]
            position_BT = self.positions(T)
            keys[row_B1, :, position_BT] = k_BGTK.transpose(1, 2).to(keys.dtype)
            values[row_B1, :, position_BT] = v_BGTK.transpose(1, 2).to(values.dtype)
        return keys[:, :, :end], values[:, :, :end]

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens: (T,) where all rows are equally long, else (B, T)."""
        device = self._store.keys[0].device
        steps = torch.arange(T, device=device)
        if self.uniform:
            return steps + self.lengths[0]
        return torch.tensor(self.lengths, device=device)[:, None] + steps

    def mask(self, T: int, window: int = 0) -> Tensor | None:
        """(B or 1, 1, T, S), True where the next T tokens may look; None where plain causality says it all.

        ``window`` limits each to that many positions, itself among them; 0 is no limit.
        """
        if self.uniform and not (window and self.length + T > window):
            return None
        query = self.positions(T)
        query = query[None, None, :, None] if query.dim() == 1 else query[:, None, :, None]
        key = torch.arange(self.length + T, device=query.device)
        seen = key <= query
        return seen & (key > query - window) if window else seen

    def advance(self, positions: int) -> None:
        """Count ``positions`` more as filled in every row."""
        self.set_lengths([length + positions for length in self.lengths])

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many positions of each row count: after reading rows padded at their end, or to forget some."""
        if len(lengths) != self.batch:
            raise ValueError(f"{len(lengths)} lengths for {self.batch} rows")
        self._store.lengths[self.first : self.first + self.batch] = lengths

    def move(self, source: int, target: int) -> None:
        """Copy what row ``source`` holds into row ``target``."""
        if source == target:
            return
        length = self.lengths[source]
        for buffers in (self._store.keys, self._store.values):
            for buffer in buffers:
                buffer[self.first + target, :, :length] = buffer[self.first + source, :, :length]
        self._store.lengths[self.first + target] = length

    def select(self, rows: Sequence[int]) -> None:
        """Reorder or repeat rows in place: row i becomes what row ``rows[i]`` was, for the first len(rows) (beams)."""
        before = self.lengths
        filled = max((before[row] for row in rows), default=0)
        index = torch.tensor([self.first + row for row in rows], device=self._store.keys[0].device)
        for buffers in (self._store.keys, self._store.values):
            for buffer in buffers:
                buffer[self.first : self.first + len(rows), :, :filled] = buffer[:, :, :filled].index_select(0, index)
        self._store.lengths[self.first : self.first + len(rows)] = [before[row] for row in rows]


class Memory:
    """What a decoder sees of an encoder's output: keys and values of every layer's cross-attention, made once.

    ``keys[layer]`` and ``values[layer]`` are (B, G, S, K); ``mask`` (B, 1, 1, S) is added to the scores, None where
    every position is real.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None) -> None:
        self.keys, self.values, self.mask = tuple(keys), tuple(values), mask

    @property
    def batch(self) -> int:
        """Rows."""
        return self.keys[0].shape[0]

    def select(self, rows: Sequence[int]) -> Memory:
        """A memory of these rows, in this order."""
        index = torch.tensor(list(rows), device=self.keys[0].device)

        def picked(tensors: tuple[Tensor, ...]) -> list[Tensor]:
            return [tensor.index_select(0, index) for tensor in tensors]

        mask = None if self.mask is None else self.mask.index_select(0, index)
        return Memory(picked(self.keys), picked(self.values), mask)

    @classmethod
    def joined(cls, parts: Sequence[Memory]) -> Memory:
        """The rows of several memories one behind the other, padded to the longest source."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.keys[0].shape[2] for part in parts)

        def together(listed: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
            padded = ([F.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors] for tensors in listed)
            return [torch.cat(layer) for layer in zip(*padded, strict=True)]

        masks = []
        for part in parts:
            S = part.keys[0].shape[2]
            mask = part.keys[0].new_zeros(part.batch, 1, 1, S) if part.mask is None else part.mask
            masks.append(F.pad(mask, (0, longest - S), value=float("-inf")))
        return cls(together([p.keys for p in parts]), together([p.values for p in parts]), torch.cat(masks))


class _Store:
    """The buffers that all views of a cache share."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.lengths = [0] * batch
        shape = (batch, config.kv_heads, min(capacity, 64), config.head_width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.depth)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.depth)]


def _grown(buffer: Tensor, filled: int, needed: int, capacity: int) -> Tensor:
    size = min(capacity, max(needed, 2 * buffer.shape[2]))
    # Zeros, for 0 x NaN is NaN: a masked position has no weight, but what lies there must be a number.
    grown = buffer.new_zeros((*buffer.shape[:2], size, buffer.shape[3]))
    grown[:, :, :filled] = buffer[:, :, :filled]
    return grown
